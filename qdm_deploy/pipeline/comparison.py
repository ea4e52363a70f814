"""The same seeds through two bundles, backends or precisions."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import Target
from qdm_deploy.backends import open_session
from qdm_deploy.building.quality import compare_with, reference_run
from qdm_deploy.components.decoder import decoder_in, refuse_latents
from qdm_deploy.components.pictures import comparison_strip, save_png, to_pictures
from qdm_deploy.components.sampling import SamplingMaker, refuse_other_model
from qdm_deploy.pipeline.options import CompareOptions
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import QualityRow

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How far B is from A.

    Attributes:
        quality: per-step and final measurements, A being the reference.
        backend_a, backend_b: ``StepSession.describe`` of each.
        strip: the picture strip, where one was asked for.
    """

    quality: QualityRow
    backend_a: dict[str, object]
    backend_b: dict[str, object]
    strip: Path | None


def compare(options: CompareOptions, progress: Progress = SILENT) -> Comparison:
    """Run both on the same seeds and measure the difference.

    Raises:
        InputError: the two do not run the same model, or are the same thing twice.
    """
    first, second = Bundle.open(options.a), Bundle.open(options.b)
    refuse_other_model(first, second)
    model = first.pipeline
    if options.out is not None:
        refuse_latents(model)
    sampling = SamplingMaker.of_bundle(first, options).make(range(options.seed, options.seed + options.samples))
    with (
        open_session(
            first, options.backend_a, precision=options.precision_a, threads=options.threads, progress=progress
        ) as a,
        open_session(
            second, options.backend_b, precision=options.precision_b, threads=options.threads, progress=progress
        ) as b,
    ):
        reference = reference_run(a, sampling, progress=progress)
        # A row is filed under the target whose graph runs; every other backend has one of its own name.
        backend = str(b.describe()["backend"])
        target = cast(Target, "tensorrt" if backend == "tensorrt-rtx" else backend)
        described = dict(a.describe()), dict(b.describe())
        # One decoder for both: what is compared is the denoiser.
        decoder = decoder_in(model, first.path, str(described[0]["backend"]), threads=options.threads)
        shown = None if decoder is None else decoder.decode(reference.states[-1], progress=progress)
        row, pictures = compare_with(
            reference, b, shown=shown, decoder=decoder, target=target, backend=backend, progress=progress
        )
    if options.out is not None and shown is not None:
        names = (
            f"A {described[0]['backend']} {options.precision_a}",
            f"B {described[1]['backend']} {options.precision_b}",
        )
        strip = comparison_strip(to_pictures(shown, model), to_pictures(pictures, model), names=names)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_png(options.out, strip)
    return Comparison(row, *described, options.out)
