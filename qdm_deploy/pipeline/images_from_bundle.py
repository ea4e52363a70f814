"""From a bundle to pictures; no torch."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_directory
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.backends import choose_backend, open_session
from qdm_deploy.components.decoder import open_decoder, refuse_latents
from qdm_deploy.components.encoders import open_encoder
from qdm_deploy.components.pictures import ImageMetadata, contact_sheet, made_by, read_metadata, save_png, to_pictures
from qdm_deploy.components.prompt_lists import read_prompts
from qdm_deploy.components.prompts import PromptOptions
from qdm_deploy.components.sampling import SamplingMaker
from qdm_deploy.errors import InputError
from qdm_deploy.pipeline.options import GenerateOptions
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime import denoise

__all__ = ["GenerateResult", "generate"]

_SHEET = "contact_sheet.png"
_LATENTS = "latents.safetensors"
_MOST_ON_SHEET = 256


@dataclass(frozen=True)
class GenerateResult:
    """Where the pictures are and what made them.

    Attributes:
        images: one PNG per seed, in order; none where latents were asked for.
        sheet: the contact sheet of the first 256, or the file of latents.
        seconds: time in the denoising loop; ``images_per_second`` is over it.
        backend: ``StepSession.describe``.
        precision: "int8" or "float", which graph ran.
        seeds: the pictures' seeds.
    """

    images: tuple[Path, ...]
    sheet: Path
    seconds: float
    images_per_second: float
    backend: dict[str, object]
    precision: str
    seeds: tuple[int, ...]


def generate(options: GenerateOptions, progress: Progress = SILENT) -> GenerateResult:
    """Denoise ``options.count`` samples and write them as PNGs with a contact sheet.

    Raises:
        QdmError: see ``qdm_deploy.errors``; whatever is raised, nothing is left at ``options.out``.
    """
    bundle = Bundle.open(options.bundle)
    model = bundle.pipeline
    reading = PromptOptions(clip_skip=options.clip_skip, weighting=options.weighting)
    encoder = open_encoder(
        model, options.conditioning_file, root=bundle.path, options=None if reading == PromptOptions() else reading
    )
    maker = SamplingMaker(model, bundle.scheduler_config(), options, encoder)
    prompts, negatives = _asked(options)
    seeds = tuple(range(options.seed, options.seed + options.count))
    sampling = maker.make(seeds, prompts, negatives)
    if options.output == "images":
        refuse_latents(model)
        to_pictures(np.zeros((1, *(model.picture_shape or ())), dtype=np.float32), model)  # refuses before any work
    with new_directory(options.out, force=options.force, may_replace=_not_ours) as folder:
        chosen, precision = choose_backend(
            bundle, options.backend, options.precision, threads=options.threads, progress=progress
        )
        with open_session(
            bundle, chosen, precision=precision, threads=options.threads, mode="throughput", progress=progress
        ) as session:
            backend = session.describe()
            progress.say(f"Denoising {options.count} samples in {maker.run.steps} steps on {backend['backend']}")
            start = time.perf_counter()
            samples = denoise(session, sampling, batch_size=options.batch_size, progress=progress)
            seconds = time.perf_counter() - start
        names = maker.encoder.captions(prompts)
        against = maker.encoder.negatives(prompts, negatives)
        if options.output == "latents":
            save_file({"latents": samples}, folder / _LATENTS)
            rate = options.count / seconds
            return GenerateResult((), options.out / _LATENTS, seconds, rate, dict(backend), precision, seeds)
        with open_decoder(bundle, str(backend["backend"]), threads=options.threads) as decoder:
            pictures = to_pictures(decoder.decode(samples, progress=progress), model)
        ran = made_by(backend, precision)
        width = max(5, len(str(seeds[-1])))
        images = []
        for seed, picture, name, negative in zip(seeds, pictures, names, against, strict=True):
            path = folder / f"{seed:0{width}d}.png"
            save_png(
                path,
                picture,
                ImageMetadata(
                    version=installed_version() or "unknown",
                    bundle_id=bundle.id,
                    seed=seed,
                    sampler=maker.run.sampler,
                    steps=maker.run.steps,
                    eta=options.eta,
                    guidance=maker.run.guidance,
                    guidance_rescale=options.guidance_rescale,
                    label=name,
                    negative_prompt=negative,
                    clip_skip=options.clip_skip,
                    weighting=options.weighting,
                    backend=ran,
                ),
            )
            images.append(options.out / path.name)
        captions = [name or f"seed {seed}" for name, seed in zip(names, seeds, strict=True)]
        save_png(folder / _SHEET, contact_sheet(pictures[:_MOST_ON_SHEET], captions=captions[:_MOST_ON_SHEET]))
    return GenerateResult(
        tuple(images), options.out / _SHEET, seconds, options.count / seconds, dict(backend), precision, seeds
    )


def _asked(options: GenerateOptions) -> tuple[list[str | None], list[str | None] | None]:
    """Prompt and negative prompt of each picture; None where the model's encoder chooses."""
    if options.prompts_file is not None:
        prompts, negatives = read_prompts(options.prompts_file).in_turn(options.count)
        return list(prompts), negatives
    negative: list[str | None] | None = None
    if options.negative_prompt is not None:
        negative = [options.negative_prompt] * options.count
    return [options.prompt] * options.count, negative


def _not_ours(folder: Path) -> str | None:
    """Why ``--force`` may not replace a folder: it holds something that is not a picture of ours."""
    for path in sorted(folder.iterdir()):
        if path.name in (_SHEET, _LATENTS):
            continue
        if path.suffix != ".png" or not path.is_file():
            return f"it holds {path.name}, which is no picture of an earlier run"
        try:
            read_metadata(path)
        except InputError:
            return f"it holds {path.name}, which qdm-deploy did not make"
    return None
