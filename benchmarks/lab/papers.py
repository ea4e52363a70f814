"""What the papers found, letter by letter, and what we say to our own numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from lab.laboratory import EPS

__all__ = ["COMMENTS", "FINDINGS", "Finding"]


@dataclass(frozen=True)
class Finding:
    """A paper's table, and what of it can hold or fail in ours.

    Attributes:
        title: of our table.
        source: paper and table.
        columns, rows: the paper's own numbers; none where it has none.
        says: the ordering in words.
        chains: rows of our table, best first in each chain, as the paper orders them.
        metric: the column of ours that decides; higher is better.
        at_least: instead of an ordering, what the metric must reach in every row.
    """

    title: str
    source: str
    says: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str | float]] = ()
    chains: Sequence[Sequence[str]] = ()
    metric: str = EPS
    at_least: float | None = None


_PTQ4DM = "PTQ4DM (Shang et al., CVPR 2023, arXiv 2211.15736)"
_INCEPTION = ("", "IS", "FID", "sFID")

FINDINGS = {
    "a": Finding(
        "Calibration source",
        f"{_PTQ4DM}, table 2; the last row is uniform t of table 3. ImageNet 64x64, DDIM-250, W8A8.",
        "The denoising trajectory, then pure noise, then noised images, and raw images far behind (by FID).",
        _INCEPTION,
        (
            ("noise samples", 13.92, 33.15, 20.38),
            ("image samples", 6.90, 128.63, 90.04),
            ("training-mimic, q(x_t given x_0)", 12.91, 34.55, 25.18),
            ("denoising trajectory", 14.99, 26.19, 19.51),
        ),
        (
            (
                "denoising trajectory (ours)",
                "pure noise at every t",
                "q(x_t | x_0) of real images",
                "real images at every t",
            ),
        ),
    ),
    "b": Finding(
        "Timesteps of the calibration set",
        f"{_PTQ4DM}, table 3 and observation 2. ImageNet 64x64, DDIM-250, W8A8.",
        "NDTC, then uniform, then any single timestep; of the single ones the later, the better.",
        _INCEPTION,
        (
            ("full precision", 14.88, 21.63, 17.66),
            ("a single timestep", 11.92, 49.37, 41.33),
            ("uniform", 14.99, 26.19, 19.51),
            ("NDTC", 15.68, 24.26, 17.28),
        ),
        (("NDTC", "uniform", "single timestep, last", "single timestep, middle", "single timestep, first"),),
    ),
    "c": Finding(
        "Range metric",
        f"{_PTQ4DM}, table 4; its MSE is with p = 2.4. ImageNet 64x64, W8A8.",
        "The power 2.4, then cosine, KL and L1; it has no minimum and maximum and no percentile.",
        _INCEPTION,
        (
            ("L1 distance", 7.38, 100.52, 63.01),
            ("cosine distance", 12.85, 34.81, 23.75),
            ("KL divergence", 11.74, 47.27, 45.08),
            ("MSE (p = 2.4)", 13.76, 30.46, 19.42),
        ),
        (("Lp, p = 2.4", "cosine", "KL", "L1"),),
    ),
    "d": Finding(
        "Operation selection",
        f"{_PTQ4DM}, table 1. ImageNet 64x64, DDIM-250, 8 bits, 10 000 images.",
        "None of the three is sensitive: each alone and all together can be quantized.",
        _INCEPTION,
        (
            ("full precision", 14.88, 21.63, 17.66),
            ("quantize mu", 15.51, 21.38, 17.41),
            ("quantize Sigma", 15.47, 21.96, 17.62),
            ("quantize x_{t-1}", 15.26, 21.94, 17.67),
            ("quantize mu + Sigma + x_{t-1}", 14.94, 21.99, 17.84),
        ),
        metric="PSNR dB",
        at_least=30.0,
    ),
    "e": Finding(
        "Unit of weight reconstruction, W4A8",
        "BRECQ (Li et al., ICLR 2021, arXiv 2102.05426), section 3 and table 1: ImageNet classifiers, 2-bit weights. "
        "Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304), section 3.3, takes its blocks over.",
        "Block-wise, then layer-wise, then rounding to nearest.",
        chains=(("AdaRound, block-wise", "AdaRound, layer-wise", "nearest"),),
    ),
    "f": Finding(
        "Scales at skip concatenations",
        "Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304), section 3.3.2. CIFAR-10, DDIM-100, W4A8. The folded "
        "form is not in the paper.",
        "Split far above shared at W4A8.",
        ("", "FID"),
        (("shared, W4A8", 188.11), ("split, W4A8", 4.93)),
        (("split, W4A8", "shared, W4A8"),),
    ),
    "g": Finding(
        "Step-aware gains",
        "TDQ (So et al., NeurIPS 2023, arXiv 2306.02316), CIFAR-10, post-training at W8A5: one scale against scales by "
        "timestep. APQ-DM (Wang et al., arXiv 2305.18723) finds 8 groups of timesteps best, at 6 bits. Neither shows "
        "other numbers of groups at W8A8.",
        "More bins are better where activations have few bits.",
        ("", "FID"),
        (("PTQ4DM, one scale, W8A5", 22.43), ("TDQ, W8A5", 5.71)),
        (("K = 8, A6", "K = 4, A6", "K = 2, A6", "K = 1, A6"),),
    ),
    "h": Finding(
        "Other quantizers",
        "No paper has this table. NVIDIA's example for diffusion models keeps conv_in, conv_out, shortcuts and the "
        "time embedding in float, which is the diffusers filter here.",
        "Ours above ModelOpt with the diffusers filter, that above ModelOpt's default; ours above `quantize_static` "
        "where both are run by ONNX Runtime.",
        chains=(
            ("ours, default, tensorrt", "modelopt, diffusers filter", "modelopt INT8_DEFAULT_CFG"),
            ("ours, default, onnxruntime", "quantize_static, percentile"),
            ("ours, default, onnxruntime", "quantize_static, min-max"),
        ),
    ),
}

# Why our numbers are as they are, by letter; written by hand after the full run of 2026-11-27.
COMMENTS: dict[str, str] = {
    "a": """
Raw images are worst, as in the paper, and pure noise comes before them. Noised images are as good as the trajectory,
within the spread: they have the distribution that the trajectory has when the model is well trained. In the paper they
are behind noise, which at every t gives late steps a range that they never use. Raw images lose 5.6 dB on average and
nothing at the last step: only there is the network's input nearly an image.""",
    "b": """
NDTC and uniform differ by no more than their spread: where the samples lie matters less than that every part of the
trajectory has some. A single timestep in the middle loses 0.6 dB, the first 3 and the last 7: ranges of nearly finished
images clip the early steps, and the mean counts those as much. At the last step the three differ by 0.3 dB. FID, by
which the paper judges, sees what the last steps do to details.""",
    "c": """
The metric here is a squared error, so the squared error is the range metric that serves it best; a power of 2.4 gives
0.4 dB away to clip less, and cosine, which is the squared error up to a scale, comes out the same. KL and L1 are last
as in the paper: L1 weighs the tails so little that it clips them. By the finished images the squared error and cosine
are ahead too, 2.4 is 6 dB behind. With the weights of before, trained for less long, it was the other way round
(result of 2026-11-24): what is clipped moves the mean of the output, in the same direction at every step, and that
adds up, here with one metric and there with another. A build takes that mean away at the output, these plans do not;
`build` searches with 2.4 ([0005](adr/0005-ranges-by-lp.md)).""",
    "d": """
All are well above 30 dB, and quantizing all three costs 5.9 dB of the final image beside Sigma alone. The state x_{t-1}
is the one to leave alone: it carries every later step. Sigma costs the state nothing that can be seen.""",
    "e": """
Block-wise gains 7.8 dB over nearest and 0.7 dB over layer-wise, whose spread it touches. By the pictures block-wise is
as good as the float model: its Frechet distance is 0.4 below the float model's 4.7. Layer-wise is 0.6 above it, nearest
4.3.""",
    "f": """
With 8-bit weights splitting is 0.8 dB ahead of one shared scale and 0.3 dB ahead of the fold, which costs no kernel:
the two branches of a concatenation differ at most 2.3-fold in range on this model. With 4-bit weights the order says
little about concatenations. Rounding to nearest decides there, and the calibration seeds share it: split weights are
more precise than whole ones in every layer, and yet the output is 1.5 dB worse and the pictures are further away. With
the weights of before, trained for less long, the split form was the best of the three by both measures. Rounding that
is learned, (e), is more than 7 dB above all of them.""",
    "g": """
Gains do next to nothing here: eight bins are 0.1 dB ahead of one at 8 bits, less than the spread, and not at all at 6.
Most INT8 layers read what a normalization has just scaled, so their range does not follow the timestep. Four of the
others, three output projections of attention and one upsampler, move 1.4 to 1.9-fold; because of them `build` takes
two bins for this model ([0006](adr/0006-gains-where-the-range-moves.md)). On CPUs that costs no more than timings
differ from run to run, and it gains as little.""",
    "h": """
Part of the distance is what is quantized: ModelOpt's default and `quantize_static` take every layer, the time
embedding, the first and the last convolution included, which costs almost 9 dB (the diffusers filter leaves them out).
The rest is the offset, the searched ranges, the output correction and the few noisy layers that `build` leaves in
float.""",
}
