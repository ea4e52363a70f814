"""A report in which every part is present, made of round numbers, and pictures to go with it."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from qdm_deploy.report import (
    CheckRow,
    EngineRow,
    LayerRow,
    QualityRow,
    Report,
    ReportPictures,
    RewriteRow,
    SizeBlock,
    SpeedRow,
    Thresholds,
    decide,
)
from qdm_deploy.report.ranges import Box, BranchRange, GridSpan, InputRanges
from qdm_deploy.report.sensitivity import FrontierRow, NoiseBlock

STEPS = 20


def quality_row(target: str = "openvino", **changes: Any) -> QualityRow:
    """34 dB of output, 40 dB of images, the worst step last."""
    values: dict[str, Any] = {
        "target": target,
        "backend": "simulation" if target == "tensorrt" else target,
        "samples": 16,
        "steps": STEPS,
        "sampler": "ddim",
        "guidance": 2.0,
        "timesteps": tuple(range(950, -1, -50)),
        "eps_sqnr_db": tuple(38.0 - 8.0 * step / (STEPS - 1) for step in range(STEPS)),
        "state_sqnr_db": tuple(60.0 - 28.0 * (step / (STEPS - 1)) ** 0.5 for step in range(STEPS)),
        "psnr_db": tuple(38.0 + 4.0 * index / 15 for index in range(16)),
        "max_abs": 0.125,
    }
    return QualityRow(**{**values, **changes})


def speed_row(backend: str, precision: str, batch: int, median: float) -> SpeedRow:
    return SpeedRow(
        backend=backend, precision=precision, batch=batch, median_ms=median, p95_ms=median * 1.25, runs=30
    )  # fmt: skip


def engine_row(**changes: Any) -> EngineRow:
    kernels = {"convolution": 31, "gemm": 12, "attention": 4, "generated": 40, "reformat": 3, "fake_quantize": 0}
    values: dict[str, Any] = {
        "backend": "tensorrt-rtx", "sm": "8.9", "planned": 42, "int8": 42, "kernels": kernels, "build_seconds": 41.5,
    }  # fmt: skip
    return EngineRow(**{**values, **changes})


SHAPE = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)


def make_box(first: int = 0, last: int = 999, size: float = 1.0) -> Box:
    return Box(first=first, last=last, quantiles=tuple(size * value for value in SHAPE))  # type: ignore[arg-type]


def input_row(name: str, growth: float = 2.0) -> InputRanges:
    branches = tuple(
        BranchRange(channels=8, box=make_box(size=size), factor=(1 / size, 1 / size), grid=(-4.0, 4.0))
        for size in (1.0, 0.5)
    )
    return InputRanges(
        layers=(name, name + ".to_k"),
        boxes=(make_box(0, 499), make_box(500, 999, growth)),
        grid=(GridSpan(first=0, last=499, low=-3, high=5), GridSpan(first=500, last=999, low=-6, high=10)),
        branches=branches if name == "concat" else (),
    )


def noise_block() -> NoiseBlock:
    return NoiseBlock(
        rows=8, timesteps=8, kept=1, sqnr_db=23.0, int8_share=0.75,
        frontier=(
            FrontierRow(layer=None, int8_share=1.0, noise_share=1.0, sqnr_db=20.0),
            FrontierRow(layer="noisy", int8_share=0.75, noise_share=0.5, sqnr_db=23.0),
            FrontierRow(layer="next", int8_share=0.5, noise_share=0.0004, sqnr_db=54.0),
        ),
    )  # fmt: skip


def make_report(**changes: Any) -> Report:
    quality = changes.pop("quality", (quality_row("onnxruntime", max_abs=0.25), quality_row(), quality_row("tensorrt")))
    engines = changes.pop("engines", (engine_row(),))
    checks = changes.pop("checks", (CheckRow(name="graph", ok=True, detail="42 of 42 layers are quantized"),))
    speedup = changes.pop("speedup", 1.84)
    verdict = decide(quality=quality, speedup=speedup, engines=engines, checks=checks, thresholds=Thresholds())
    layers = tuple(
        LayerRow(
            name=f"down_blocks.{index // 6}.resnets.{index % 6}.conv1",
            precision="int8" if index else "float",
            reason="" if index else "first layer: it reads the noisy image itself",
            scale=0.0123 if index else None,
            zero_offset=17 if index else 0,
            branch_factors=(0.25, 4.0) if index % 3 == 1 else None,
            step_gains=(1.0, 6.5) if index % 4 == 1 else None,
            weight_sqnr_db=43.25 if index else None,
            notes={"s": "least squared error over all bins.", "z": "the input follows a SiLU."} if index else {},
        )
        for index in range(43)
    )
    values: dict[str, Any] = {
        "created": datetime(2026, 1, 31, 12, 0, tzinfo=UTC),
        "command": "qdm-deploy build --int8 --sampler ddim --steps 50 --guidance 2.0 --seed 0 --out fashion.qdm",
        "versions": {"python": "3.11.7", "qdm-deploy": "0.1.0", "numpy": "2.4.1", "onnxruntime": "1.32.0"},
        "machine": {"cpu": "A CPU", "cores_usable": 2, "instruction_sets": ["avx2", "amx_int8"], "os": "Linux"},
        "model": {"name": "fashion", "sample_shape": [1, 28, 28], "num_train_timesteps": 1000, "labels": None},
        "recipe": {"strategy": "uniform", "calibration_samples": 16, "seed": 0, "targets": ["openvino", "tensorrt"]},
        "plan_summary": {"layers": 43, "int8": 42, "float": 1, "zero_offset": 30, "step_gains": 11},
        "layers": layers,
        "inputs": (input_row("concat"), input_row("down_blocks.0.resnets.1.conv1", 3.0)),
        "noise": noise_block(),
        "quality": quality,
        "speed": (
            speed_row("openvino", "float", 16, 24.8),
            speed_row("openvino", "int8", 16, 13.5),
            speed_row("onnxruntime", "float", 16, 33.0),
            speed_row("onnxruntime", "int8", 16, 21.0),
        ),
        "speedup": speedup,
        "size": SizeBlock(
            float_bytes=36_400_000, int8_bytes={"onnxruntime": 9_600_000, "openvino": 9_500_000, "tensorrt": 9_400_000}
        ),
        "engines": engines,
        "checks": checks,
        "rewrites": (
            RewriteRow(target="openvino", name="norms", done=61, expected=61),
            RewriteRow(target="openvino", name="SiLU", done=44, expected=45, missed=("node_mul_3: two nodes read it",)),
        ),
        "stage_seconds": {"calibrate": 21.0, "plan": 2.5, "export": 12.0, "engines": 41.5, "verify": 18.0},
        "verdict": verdict,
    }
    return Report(**{**values, **changes})


@pytest.fixture
def report() -> Callable[..., Report]:
    """Makes the report, with other values for some of its fields."""
    return make_report


@pytest.fixture
def inputs() -> Callable[..., InputRanges]:
    """An input whose range grows by a factor towards noise; two branches where its reader is called "concat"."""
    return input_row


@pytest.fixture
def box() -> Callable[..., Box]:
    return make_box


@pytest.fixture
def quality() -> Callable[..., QualityRow]:
    return quality_row


@pytest.fixture
def engine() -> Callable[..., EngineRow]:
    return engine_row


@pytest.fixture(scope="session")
def pictures() -> ReportPictures:
    """16 triplets of 28 x 28 noise, the worst case for PNG, and a sheet of them."""
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (16, 28, 28), dtype=np.uint8)
    quantized = np.clip(reference + random.integers(-9, 10, reference.shape), 0, 255).astype(np.uint8)
    sheet = quantized.reshape(4, 4, 28, 28).swapaxes(1, 2).reshape(112, 112)
    captions = [f"seed {seed} · 38.0 dB" for seed in range(16)]
    return ReportPictures.from_arrays(reference, quantized, captions, sheet=sheet, quantized_name="openvino")
