"""Is the INT8 model as good as its reference? The same seeds through both, side by side and beside real pictures."""

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_file
from qdm_deploy.artifacts.pipeline_spec import LabelTable, PipelineSpec
from qdm_deploy.components.encoders import LabelEncoder
from qdm_deploy.components.sampling import SamplingMaker, refuse_other_model
from qdm_deploy.errors import InputError
from qdm_deploy.evaluate.distribution_rows import distribution_rows
from qdm_deploy.evaluate.evaluated_side import EvaluatedSide, Run, features_of, make_samples, open_side
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier
from qdm_deploy.evaluate.inception import Inception, inception_rows, real_pictures
from qdm_deploy.evaluate.options import EvaluateOptions
from qdm_deploy.evaluate.paired_rows import image_rows, label_row, notes_on_steps, step_rows
from qdm_deploy.evaluate.paired_seeds import PairedSeeds
from qdm_deploy.evaluate.real_floor import real_floor
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.evaluation import DistributionRow, Evaluation, PairedRow, frechet_sentence, paired_sentence
from qdm_deploy.report.evaluation_page import render_evaluation

__all__ = ["evaluate"]

FP32 = "fp32"


def evaluate(options: EvaluateOptions, progress: Progress = SILENT) -> Evaluation:
    """Sample from both models with the same seeds and compare them, seed by seed and as sets.

    Samples and features are kept in the cache as they are made, so a run that was interrupted goes on.

    Raises:
        InputError: the two do not run the same model, the bundle is compared with itself, or the classifier does not
            fit the model; before any work.
        QdmError: see ``qdm_deploy.errors``.
    """
    bundle = Bundle.open(options.bundle)
    reference = bundle if options.against == FP32 else _other(bundle, options)
    model = bundle.pipeline
    classifier, notes = _classifier(model, options)
    inception, real = None, []
    if options.inception_weights is not None and options.real_images is not None:
        real = real_pictures(options.real_images, model)
        inception = Inception(options.inception_weights)
    count = _samples_needed(options, classifier is not None or inception is not None)
    run = Run(options, SamplingMaker.of_bundle(bundle, options))
    run.sampling(slice(0, 1))  # refused now or never
    with ExitStack() as stack:
        precision: Literal["int8", "float"] = "float" if options.against == FP32 else "int8"
        a = open_side(stack, "A", reference, precision, options)
        b = open_side(stack, "B", bundle, "int8", options)
        pairs = PairedSeeds(run, a, b)
        errors = pairs.measure(progress)
        for side in (a, b):
            make_samples(run, side, count, pairs.finished(side), progress)
        paired, per_step = step_rows(run.table, *errors)
        paired += image_rows(run, a, b, count, progress)
        rows: tuple[DistributionRow, ...] = ()
        if classifier is not None:
            rows, agreement = _beside_real(run, a, b, classifier, progress)
            paired += (agreement,)
        if inception is not None:
            rows += inception_rows(inception, run, a, b, real, progress)
            notes.append(
                f"FID and sFID: of {options.num} images, beside the {len(real)} pictures in {options.real_images}; "
                "values of other numbers of images do not compare with them."
            )
        notes += notes_on_steps(model)
    result = Evaluation(
        a=a.card,
        b=b.card,
        images=options.num if rows else 0,
        paired_seeds=options.paired,
        sampler=run.maker.run.sampler,
        steps=run.maker.run.steps,
        seed=options.seed,
        guidance=run.maker.run.guidance,
        classifier=None if classifier is None else classifier.id,
        classifier_accuracy=None if classifier is None else classifier.card.test_accuracy,
        paired=paired,
        per_step=per_step,
        distribution=rows,
        verdict=frechet_sentence(rows[0], options.num) if classifier is not None else paired_sentence(paired),
        notes=tuple(notes),
    )
    for path, text in (
        (options.out, result.model_dump_json(indent=1) + "\n"),
        (options.page, render_evaluation(result)),
    ):
        if path is not None:
            with new_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return result


def _samples_needed(options: EvaluateOptions, beside_real: bool) -> int:
    return max(options.num, options.paired) if beside_real else options.paired


def _beside_real(
    run: Run, a: EvaluatedSide, b: EvaluatedSide, classifier: FeatureClassifier, progress: Progress
) -> tuple[tuple[DistributionRow, ...], PairedRow]:
    """Both sets of pictures in the classifier's features, and how often both look alike to it."""
    count = run.options.num
    from_a, from_b = (features_of(run, side, classifier, count, progress) for side in (a, b))
    encoder = run.maker.encoder
    labels = encoder.numbers([None] * count) if isinstance(encoder, LabelEncoder) else None
    rows = distribution_rows(
        classifier,
        from_a,
        from_b,
        labels,
        real_floor(classifier, count, run.options.cache, progress),
        progress,
    )
    return rows, label_row(from_a, from_b)


def _other(bundle: Bundle, options: EvaluateOptions) -> Bundle:
    path = Path(options.against)
    if not path.exists():
        raise InputError(f"there is nothing to compare with at {path}; give {FP32}, or the folder of another bundle")
    other = Bundle.open(path)
    if other.id == bundle.id:
        raise InputError(f"{path} and {options.bundle} are the same bundle; give {FP32}, or another bundle")
    refuse_other_model(bundle, other)
    return other


def _classifier(model: PipelineSpec, options: EvaluateOptions) -> tuple[FeatureClassifier | None, list[str]]:
    """The classifier whose features are used, or None and why."""
    if options.features is not None:
        found = FeatureClassifier(options.features, threads=options.threads)
        if found.card.input_shape != model.sample_shape or model.makes != "pixels":
            raise InputError(
                f"the classifier in {options.features} takes pictures {list(found.card.input_shape)}, and "
                f"{options.bundle} makes {model.makes} {list(model.sample_shape)}; give one that fits, or none"
            )
        return found, []
    shipped = FeatureClassifier(SHIPPED, threads=options.threads)
    card = shipped.card
    classes = model.encoder.num_classes if isinstance(model.encoder, LabelTable) else None
    if model.makes == "pixels" and (model.sample_shape, classes) == (card.input_shape, card.classes):
        return shipped, [f"Features are those of the shipped {card.data} classifier."]
    why = f"the shipped one is for pictures {list(card.input_shape)} of {card.classes} classes"
    return None, [f"Only paired metrics: no classifier was given, and {why}."]
