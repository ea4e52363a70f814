"""From the pipeline's results to text, JSON and exit codes; the pipeline's work is left out."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts import Compatibility, FileEntry, Manifest, PipelineSpec
from qdm_deploy.artifacts.pipeline_spec import Denoiser, LabelTable
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.artifacts.topology import Layer
from qdm_deploy.engines.cache import EngineCache, EngineIdentity
from qdm_deploy.engines.request import BatchProfile
from qdm_deploy.engines.request import BuildOptions as EngineOptions
from qdm_deploy.pipeline import BuildResult, Comparison, EngineResult, GenerateResult, Inspection, Verification
from qdm_deploy.report.evaluation import DistributionRow, Evaluation, PairedRow, Side
from qdm_deploy.report.model import (
    CheckRow,
    EngineRow,
    QualityRow,
    Report,
    RewriteRow,
    SizeBlock,
    SpeedRow,
    Thresholds,
    Verdict,
)

Invoke = Callable[..., Any]
OneDocument = Callable[[str], dict[str, Any]]
Replace = Callable[[str, Callable[..., Any]], None]

ENGINE = EngineRow(
    backend="tensorrt-rtx",
    sm="8.9",
    planned=17,
    int8=17,
    kernels={
        "kernels": 57,
        "convolutions": 17,
        "convolutions_int8": 17,
        "gemms": 0,
        "gemms_int8": 0,
        "fake_quantizes": 2,
        "planned": 17,
        "planned_int8": 17,
    },
    build_seconds=12,
)
MODEL = PipelineSpec(
    name="tiny",
    components=(
        Denoiser(
            interface=StepInterface.of((1, 8, 8), [TensorSpec(name="class_labels", dtype="int64")], coefficients=13),
            num_train_timesteps=1000,
        ),
        LabelTable(input="class_labels", num_classes=2, labels=("Sneaker", "Bag")),
    ),
)


def report_of(*problems: str) -> Report:
    merits = ("INT8 is 1.9 times as fast as float (at least 1.0 was asked for).",)
    return Report(
        created=datetime(2026, 1, 2, tzinfo=UTC),
        versions={},
        machine={},
        model={},
        recipe={},
        plan_summary={},
        quality=(
            QualityRow(
                target="openvino", backend="openvino", samples=1, steps=2, sampler="ddim", guidance=1,
                timesteps=(500, 0), eps_sqnr_db=(31, 33), state_sqnr_db=(40, 38.04), psnr_db=(36.5,), max_abs=0.1,
            ),
        ),
        speed=(SpeedRow(backend="openvino", precision="int8", batch=4, median_ms=8, p95_ms=9.125, runs=20),),
        speedup=1.9,
        size=SizeBlock(float_bytes=10_000_000, int8_bytes={"openvino": 2_600_000}),
        engines=(ENGINE,),
        checks=(CheckRow(name="onnx", ok=True, detail="equal"),),
        stage_seconds={"calibrate": 61.0, "export": 14.0},
        verdict=Verdict(ship=not problems, problems=problems, merits=merits, thresholds=Thresholds()),
    )  # fmt: skip


def test_build_prints_the_verdict_last_and_returns_it(
    replace: Replace, invoke: Invoke, one_document: OneDocument
) -> None:
    problem = "The mean PSNR on openvino is 24.0 dB, below 30.0 dB."
    for report, code, headline in ((report_of(), 0, "\nSHIP\n"), (report_of(problem), 1, "\nDO NOT SHIP\n")):
        replace("build", lambda options, progress, report=report: BuildResult(options.out, "0" * 64, report))
        result = invoke("build", "--int8")
        assert (result.exit_code, result.stderr) == (code, "")
        tables, _, verdict = result.stdout.partition(headline)
        squeezed = [" ".join(line.split()) for line in tables.splitlines()]
        assert "openvino 32.0 dB 31.0 dB 38.0 dB 36.5 dB 36.5 dB" in squeezed
        assert "openvino int8 4 8.00 ms 9.12 ms 500.0" in squeezed
        assert "openvino 2.6 MB 26%" in squeezed
        assert "tensorrt-rtx 8.9 17 of 17 12.0 s" in squeezed
        assert (f"  - {problem}\n" in verdict) == bool(code)
        assert "  + INT8 is 1.9 times as fast" in verdict
        assert "\nbuilt in 1 min 15 s\n" in verdict
        assert "report: ddpm-fashion-mnist.qdm/report.html\n" in verdict

        result = invoke("build", "--int8", "--json")
        document = one_document(result.stdout)
        assert (result.exit_code, document["bundle"]) == (code, "ddpm-fashion-mnist.qdm")
        assert Report.model_validate(document["report"]) == report
        assert invoke("build", "--int8", "-q").stdout == "ddpm-fashion-mnist.qdm\n"


def test_generate_prints_where_the_images_are(replace: Replace, invoke: Invoke, one_document: OneDocument) -> None:
    made = GenerateResult(
        images=(Path("o/0.png"), Path("o/1.png")),
        sheet=Path("o/sheet.png"),
        seconds=4.0,
        images_per_second=0.5,
        backend={"backend": "openvino"},
        precision="int8",
        seeds=(0, 1),
    )  # fmt: skip)
    replace("generate", lambda options, progress: made)
    assert invoke("generate", "b.qdm", "--out", "o").stdout == (
        "2 images in o, on one sheet: o/sheet.png\n4.0 s, 0.50 images per second on openvino, int8\n"
    )
    document = one_document(invoke("generate", "b.qdm", "--out", "o", "--json").stdout)
    assert (document["images"], document["seeds"]) == (["o/0.png", "o/1.png"], [0, 1])
    assert invoke("generate", "b.qdm", "--out", "o", "-q").stdout == "o/0.png\no/1.png\n"


def test_inspect_shows_every_layer(replace: Replace, invoke: Invoke, one_document: OneDocument) -> None:
    def layer(name: str) -> Layer:
        return Layer(name, "linear", (2, 4), name, (2, 2), False)

    weights = {
        "weight_codes": np.zeros((2, 4), dtype=np.int8),
        "weight_scale": np.ones(2, dtype=np.float32),
        "weight_sqnr_db": 42.34,
    }
    plan = QuantizationPlan(
        (
            LayerPlan(layer("conv_in"), "float", reason="first layer"),
            LayerPlan(layer("mid.to_q"), "int8", scale=0.015625, zero_offset=-3, notes={"s": "mse [x]"}, **weights),
            LayerPlan(
                layer("up.0"), "int8", scale=0.5, inverse_k=np.array([1, 1, 4, 4], dtype=np.float32),
                inverse_r=np.array([1, 0.5], dtype=np.float32), **weights,
            ),
        ),
        np.array([0, 500, 1000]),
    )  # fmt: skip
    manifest = Manifest(
        schema_version="2.0",
        name="tiny",
        created="2026-01-02T00:00:00Z",
        pipeline=MODEL,
        targets=("onnxruntime",),
        files=(FileEntry(path="unet/onnxruntime.onnx", size=12345, sha256="0" * 64, role="graph"),),
        compatibility=Compatibility(opset=21, min_runtime="0.1"),
        provenance={},
        recipe={},
    )
    rewrites = (
        RewriteRow(target="onnxruntime", name="weights", done=2, expected=2),
        RewriteRow(target="onnxruntime", name="norms", done=3, expected=3, left=("n: it is small",)),
    )
    inspection = Inspection(manifest.bundle_id, MODEL, plan, manifest, {"mid.to_q": 0.125}, rewrites)
    replace("inspect", lambda bundle: inspection)
    result = invoke("inspect", "tiny.qdm")
    assert result.exit_code == 0
    squeezed = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert squeezed[:3] == [
        f"tiny {manifest.bundle_id}",
        "created 2026-01-02T00:00:00Z for onnxruntime; opset 21",
        "tiny: 1 x 8 x 8 pixels, 1000 timesteps, 2 classes (Sneaker, Bag)",
    ]
    assert "12.3 kB unet/onnxruntime.onnx graph" in squeezed
    assert squeezed[-7:] == [
        "onnxruntime graph: weights 2 of 2, norms 3 of 3",
        "",
        "layers: 2 of 3 in INT8",
        "layer precision s z k r weight SQNR noise reason",
        "conv_in float - - - - - - first layer",
        "mid.to_q int8 0.01562 -3 - - 42.3 dB 12.5 %",
        "up.0 int8 0.5 0 0.25-1 1-2 42.3 dB -",
    ]
    assert invoke("inspect", "tiny.qdm", "-v").stdout.endswith(
        "\ndecisions\nmid.to_q\n  s: mse [x]\n\npassed by in the graphs\n  onnxruntime, norms: n: it is small\n"
    )
    assert invoke("inspect", "tiny.qdm", "-q").stdout == f"{manifest.bundle_id}\n"
    document = one_document(invoke("inspect", "tiny.qdm", "--json").stdout)
    assert [entry["branch_factors"] for entry in document["layers"]] == [None, None, [0.25, 1.0]]
    assert (document["timestep_edges"], document["plan_summary"]["int8"]) == ([0, 500, 1000], 2)


@pytest.mark.parametrize(
    ("findings", "selftest_ok", "code"), [((), True, 0), ((), False, 1), (("x is missing", "y is extra"), True, 3)]
)
def test_verify_lists_all_findings_and_tells_damage_from_a_failed_self_test(
    findings: tuple[str, ...], selftest_ok: bool, code: int, replace: Replace, invoke: Invoke, one_document: OneDocument
) -> None:
    check = CheckRow(name="self-test", ok=selftest_ok, detail="41.0 dB")
    asked = []

    def verify(bundle: Path, backend: str, progress: Any) -> Any:
        asked.append((bundle, backend))
        return Verification(findings, (check,))

    replace("verify", verify)
    result = invoke("verify", "b.qdm", "--backend", "openvino")
    assert (result.exit_code, asked) == (code, [(Path("b.qdm"), "openvino")])
    assert result.stdout.splitlines() == [
        *(f"damaged: {finding}" for finding in findings),
        f"{'ok' if selftest_ok else 'failed'}: self-test: 41.0 dB",
        f"b.qdm is {'good' if code == 0 else 'NOT good'}",
    ]
    quiet = [*findings, *([] if selftest_ok else ["self-test: 41.0 dB"])]
    assert invoke("verify", "b.qdm", "-q").stdout.splitlines() == quiet
    document = one_document(invoke("verify", "b.qdm", "--json").stdout)
    assert (document["ok"], document["findings"]) == (code == 0, list(findings))


def test_engine_prints_the_audit(replace: Replace, invoke: Invoke, one_document: OneDocument) -> None:
    asked = []

    def build_engine(bundle: Path, *, sm: str | None, progress: Any, **options: Any) -> Any:
        asked.append((bundle, sm, *(value for _, value in sorted(options.items()))))
        row = ENGINE if sm is None else ENGINE.model_copy(update={"sm": sm, "int8": 16, "failures": ("up.0: Half",)})
        return EngineResult(row, Path("c/engine.plan"), Path("c/log.txt"), from_cache=sm is None)

    replace("build_engine", build_engine)
    result = invoke("engine", "build", "b.qdm")
    assert result.exit_code == 0
    assert result.stdout.endswith("\nengine: c/engine.plan (from the cache)\nlog:    c/log.txt\n")
    squeezed = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert squeezed[-8:-2] == ["kernels", "kind count in INT8", "convolutions 17 17", "fake quantizes 2", "all 57", ""]
    result = invoke(
        "engine", "build", "b.qdm", "--sm", "12.0", "--backend", "tensorrt", "--profile", "1:8:32", "--workspace", "2G"
    )
    assert result.exit_code == 1
    assert "not INT8 on SM 12.0: up.0: Half" in result.stdout
    assert asked == [
        (Path("b.qdm"), None, "tensorrt-rtx", 3, (1, 4, 16), None),
        (Path("b.qdm"), "12.0", "tensorrt", 3, (1, 8, 32), "2G"),
    ]
    document = one_document(invoke("engine", "build", "b.qdm", "--json").stdout)
    assert (document["clean"], document["engine"]["int8"], document["path"]) == (True, 17, "c/engine.plan")


def test_compare_prints_each_step_and_the_means(replace: Replace, invoke: Invoke, one_document: OneDocument) -> None:
    quality = report_of().quality[0]

    def compare(options: Any, progress: Any) -> Comparison:
        return Comparison(quality, {"backend": "onnxruntime"}, {"backend": "openvino"}, options.out)

    replace("compare", compare)
    result = invoke("compare", "a", "b", "--out", "s.png")
    assert result.exit_code == 0
    squeezed = [" ".join(line.split()) for line in result.stdout.splitlines() if line]
    assert squeezed[1:] == [
        "timestep model sample",
        "500 31.0 dB 40.0 dB",
        "0 33.0 dB 38.0 dB",
        "model SQNR, mean over steps: 32.0 dB (worst step 31.0 dB)",
        "sample SQNR at the end: 38.0 dB",
        "image PSNR, mean: 36.5 dB (worst image 36.5 dB)",
        "images: s.png",
    ]
    assert invoke("compare", "a", "b", "-q").stdout.splitlines() == squeezed[4:7]
    document = one_document(invoke("compare", "a", "b", "--json").stdout)
    assert (document["quality"]["eps_sqnr_db"], document["strip"]) == ([31.0, 33.0], None)


def test_evaluate_prints_the_verdict_last(replace: Replace, invoke: Invoke, one_document: OneDocument) -> None:
    def side(precision: Any) -> Side:
        return Side(bundle="b.qdm", bundle_id="0" * 64, precision=precision, backend={"backend": "openvino"})

    found = Evaluation(
        a=side("float"), b=side("int8"), images=1000, paired_seeds=64, sampler="ddim", steps=20, seed=0, guidance=1.0,
        classifier="1" * 64, classifier_accuracy=0.92,
        paired=(PairedRow(metric="image PSNR (dB)", seeds=64, mean=34.25, low=34, high=34.5, worst=28.125),),
        per_step=(),
        distribution=(
            DistributionRow(metric="Frechet distance, features", a=1.5, b=1.75, low=0.125, high=0.5, floor=0.0625),
            DistributionRow(metric="recall", a=0.5, b=0.25),
        ),
        verdict="The difference is distinguishable.", notes=("A note.",),
    )  # fmt: skip
    replace("evaluate", lambda options, progress: found)
    result = invoke("evaluate", "b.qdm", "--out", "r.json")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:2] == ["A: b.qdm, float on openvino", "B: b.qdm, int8 on openvino"]
    assert "image PSNR (dB) 64 34.25 34 to 34.5 28.12" in lines
    assert "Frechet distance, features 1.5 1.75 +0.25 +0.125 to +0.5 0.0625" in lines
    assert "recall 0.5 0.25 -0.25 - -" in lines
    assert lines[-4:] == ["A note.", "The difference is distinguishable.", "result: r.json", "result: r.html"]

    document = one_document(invoke("evaluate", "b.qdm", "--json").stdout)
    assert Evaluation.model_validate(document["evaluation"]) == found
    assert invoke("evaluate", "b.qdm", "-q").stdout == "A note.\nThe difference is distinguishable.\n"


def test_engine_list_and_prune_show_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke, one_document: OneDocument
) -> None:
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path))
    assert invoke("engine", "list").stdout == f"\n0 B of 20.0 GB in {tmp_path / 'engines'}\n"
    assert invoke("engine", "prune", "--all").exit_code == 0

    identity = EngineIdentity(
        graph_sha256="0" * 64,
        data_sha256={},
        backend="tensorrt-rtx",
        library_version="1.7",
        target="SM 8.9",
        profile=BatchProfile(),
        options=EngineOptions(),
    )

    def write(folder: Path) -> float:
        for name in ("engine.plan", "log.txt", "audit.json"):
            (folder / name).write_bytes(b"1" * 5000)
        return 1.0

    EngineCache().entry(identity, Path("fashion.qdm/unet/tensorrt.onnx"), write)
    text = invoke("engine", "list").stdout
    for word in (identity.key[:12], "tensorrt-rtx 1.7", "SM 8.9", "1:4:16", "fashion.qdm/unet/tensorrt.onnx"):
        assert word in text
    document = one_document(invoke("engine", "list", "--json").stdout)
    (entry,) = document["engines"]
    assert (entry["key"], entry["problem"], document["max_bytes"]) == (identity.key, None, 20 * 10**9)
    assert document["disk_bytes"] == entry["disk_bytes"] > 15_000

    both = invoke("engine", "prune", "--all", "--max-size", "1G")
    assert (both.exit_code, "give one of the two" in both.stderr) == (2, True)
    assert invoke("engine", "prune", "--max-size", "1G", "-q").stdout == ""
    assert invoke("engine", "prune", "--max-size", "10k", "-q").stdout == f"{identity.key}\n"
    assert one_document(invoke("engine", "list", "--json").stdout)["engines"] == []
