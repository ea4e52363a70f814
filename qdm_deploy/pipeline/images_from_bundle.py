"""From a bundle to pictures; no torch."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_directory
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.backends import choose_backend, open_session
from qdm_deploy.components.pictures import ImageMetadata, contact_sheet, made_by, read_metadata, save_png, to_pictures
from qdm_deploy.components.sampling import SamplingMaker
from qdm_deploy.errors import InputError
from qdm_deploy.pipeline.options import GenerateOptions
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime import denoise

__all__ = ["GenerateResult", "generate"]

_SHEET = "contact_sheet.png"
_MOST_ON_SHEET = 256


@dataclass(frozen=True)
class GenerateResult:
    """Where the pictures are and what made them.

    Attributes:
        images: one PNG per seed, in order.
        sheet: the contact sheet of the first 256.
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
    maker = SamplingMaker.of_bundle(bundle, options)
    prompts = [options.label] * options.count
    seeds = tuple(range(options.seed, options.seed + options.count))
    sampling = maker.make(seeds, prompts)
    to_pictures(np.zeros((1, *model.sample_shape), dtype=np.float32), model)  # refuses latents before any work
    with new_directory(options.out, force=options.force, may_replace=_not_ours) as folder:
        chosen, precision = choose_backend(
            bundle, options.backend, options.precision, threads=options.threads, progress=progress
        )
        with open_session(
            bundle, chosen, precision=precision, threads=options.threads, mode="throughput", progress=progress
        ) as session:
            backend = session.describe()
            progress.say(f"Denoising {options.count} samples in {options.steps} steps on {backend['backend']}")
            start = time.perf_counter()
            samples = denoise(session, sampling, batch_size=options.batch_size, progress=progress)
            seconds = time.perf_counter() - start
        pictures = to_pictures(samples, model)
        names = maker.encoder.captions(prompts)
        ran = made_by(backend, precision)
        width = max(5, len(str(seeds[-1])))
        images = []
        for seed, picture, name in zip(seeds, pictures, names, strict=True):
            path = folder / f"{seed:0{width}d}.png"
            save_png(
                path,
                picture,
                ImageMetadata(
                    version=installed_version() or "unknown",
                    bundle_id=bundle.id,
                    seed=seed,
                    sampler=options.sampler,
                    steps=options.steps,
                    eta=options.eta,
                    guidance=options.guidance,
                    label=name,
                    backend=ran,
                ),
            )
            images.append(options.out / path.name)
        captions = [name or f"seed {seed}" for name, seed in zip(names, seeds, strict=True)]
        save_png(folder / _SHEET, contact_sheet(pictures[:_MOST_ON_SHEET], captions=captions[:_MOST_ON_SHEET]))
    return GenerateResult(
        tuple(images), options.out / _SHEET, seconds, options.count / seconds, dict(backend), precision, seeds
    )


def _not_ours(folder: Path) -> str | None:
    """Why ``--force`` may not replace a folder: it holds something that is not a picture of ours."""
    for path in sorted(folder.iterdir()):
        if path.name == _SHEET:
            continue
        if path.suffix != ".png" or not path.is_file():
            return f"it holds {path.name}, which is no picture of an earlier run"
        try:
            read_metadata(path)
        except InputError:
            return f"it holds {path.name}, which qdm-deploy did not make"
    return None
