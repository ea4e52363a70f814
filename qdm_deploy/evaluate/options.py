"""What a user can ask of an evaluation; refused here, before any work starts, when it cannot be done."""

from dataclasses import dataclass, field
from pathlib import Path

from qdm_deploy.choices import within
from qdm_deploy.components.sampling import SamplingOptions
from qdm_deploy.errors import InputError

__all__ = ["EvaluateOptions"]

# Calibrations begin at 0 unless told otherwise, and verdicts at 2**40: no image is judged that scales were made from.
_UNSEEN_SEED = 2**41
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class EvaluateOptions(SamplingOptions):
    """Is a bundle's INT8 model (B) as good as a reference (A)?

    Attributes:
        bundle: the bundle that is judged.
        against: "fp32" for its own float graph, or the folder of another bundle.
        num: pictures of each that are compared with real ones.
        paired: how many of their seeds are compared step by step.
        seed: the first one; by default one that no build uses by default.
        features: a classifier's folder; None takes the one that is shipped, where it fits the model.
        backend, threads, batch_size: what runs it.
        cache: folder for samples and features; None takes the user's cache.
        inception_weights: safetensors file of torch-fidelity's Inception-v3, for FID, Inception score and sFID.
        real_images: folder of real pictures of the model's size that these are measured from.
        out: JSON file for the result; None writes none.
        html: page for it; None writes it beside ``out``, with the suffix html, and none without ``out``.
        force: replace existing files.
    """

    bundle: Path
    against: str = "fp32"
    num: int = 1000
    paired: int = 64
    steps: int = field(default=20, kw_only=True)
    seed: int = _UNSEEN_SEED
    features: Path | None = None
    backend: str = "auto"
    threads: int | None = None
    batch_size: int = 16
    cache: Path | None = None
    inception_weights: Path | None = None
    real_images: Path | None = None
    out: Path | None = None
    html: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        super().__post_init__()
        within("the number of images", self.num, 8, 100_000)
        within("the number of paired seeds", self.paired, 2, 4096)
        within("batch size", self.batch_size, 1, 1024)
        within("seed", self.seed, 0, _MAX_SEED - max(self.num, self.paired))
        if self.threads is not None:
            within("threads", self.threads, 1, 1024)
        self._check_inception()
        if self.out is not None and self.out == self.page:
            raise InputError(f"{self.out} cannot be both the JSON file and the page; name the JSON file .json")
        for path in (self.out, self.page):
            if path is not None and path.exists() and not self.force:
                raise InputError(f"{path} exists; choose another file, or add --force to replace it")

    @property
    def page(self) -> Path | None:
        """Where the page is written."""
        return self.html or (None if self.out is None else self.out.with_suffix(".html"))

    def _check_inception(self) -> None:
        weights, real = self.inception_weights, self.real_images
        if (weights is None) != (real is None):
            raise InputError(
                "FID, Inception score and sFID need both weights of Inception-v3 (--inception-weights) and a folder "
                f"of real pictures (--real-images); only {'the folder' if weights is None else 'the weights'} "
                f"{real or weights} was given"
            )
        if weights is None or real is None:
            return
        if weights.suffix != ".safetensors":
            raise InputError(
                f"{weights} is no safetensors file, and other formats can run code when they are read. Convert weights "
                "that you trust: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'new.safetensors')"
            )
        for path, there in ((weights, weights.is_file()), (real, real.is_dir())):
            if not there:
                raise InputError(f"{path} does not exist; give a file of weights and a folder of pictures")
