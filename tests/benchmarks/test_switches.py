"""What can be switched: every variant is another graph or session, and differs in what its name says."""

import dataclasses
from typing import Any

import onnx_ir as ir
import pytest
from lib.case import Case
from lib.switches import SWITCHES, Variant

from qdm_calibration.plan import PlanOptions
from qdm_deploy.artifacts.plan import QuantizationPlan


def count(variant: Variant, *kinds: str) -> int:
    return sum(node.op_type in kinds for node in variant.emitted().graph)


def fingerprint(variant: Variant) -> Any:
    graph = variant.emitted().graph
    constants = [value.const_value.numpy().tobytes() for value in graph.initializers.values() if value.const_value]
    nodes = [(node.op_type, [value and value.name for value in node.inputs]) for node in graph]
    return nodes, constants, variant.kind, sorted(variant.session.items()), variant.rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "kept", "rest", "concat", "channel-factors", "part-sizes"])
def test_variants_differ(name: str, labels: Case) -> None:
    for target in SWITCHES[name].targets:
        found = {label: fingerprint(variant) for label, variant in SWITCHES[name].variants(labels, target).items()}
        # The tiny model attends between too few positions for a limit to matter, and ours are all that may be left.
        alike = name in ("attention", "kept", "channel-factors")
        assert len(found) > 1
        assert alike or len({str(each) for each in found.values()}) == len(found), target


@pytest.mark.slow
def test_parts_left_out_are_missing(labels: Case) -> None:
    parts = SWITCHES["parts"].variants(labels, "openvino")
    whole = parts["the whole form"]
    assert count(whole, "GroupNormalization") == 0 < count(parts["without norms"], "GroupNormalization")
    assert count(parts["without upsampling"], "DepthToSpace") == 0 < count(whole, "DepthToSpace")
    assert count(parts["without SiLU"], "Sigmoid") > count(whole, "Sigmoid")
    assert set(SWITCHES["parts"].variants(labels, "tensorrt")) == {
        "the whole form", "without attention heads", "without absorbed factors",
    }  # fmt: skip


class Moving(Case):
    """A model whose ranges move enough for gains: the tiny one's do not by the default's measure."""

    def built(self, **options: Any) -> QuantizationPlan:
        """A plan with a low threshold."""
        return self.plan(PlanOptions(ranges="minmax", gain_ratio=1.02, step_bins=options.get("step_bins", 3)))


def test_gains_and_types_are_what_their_names_say(labels: Case) -> None:
    moving = Moving(**{each.name: getattr(labels, each.name) for each in dataclasses.fields(labels)})
    gains = SWITCHES["gains"].variants(moving, "tensorrt")
    assert any(layer.inverse_r is not None for layer in gains["in 8 bins"].plan.layers)
    assert all(layer.inverse_r is None for layer in gains["no gains, plan of 8 bins"].plan.layers)
    rest = SWITCHES["rest"].variants(labels, "tensorrt")
    assert count(rest["no INT8, fp16"], "QuantizeLinear", "DequantizeLinear") == 0
    assert count(rest["INT8, bf16"], "QuantizeLinear") > 0
    types = {value.dtype for value in rest["INT8, bf16"].emitted().graph.initializers.values()}
    assert ir.DataType.BFLOAT16 in types
    assert ir.DataType.FLOAT16 not in types
