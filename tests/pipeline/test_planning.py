"""What a recipe says is what a plan does, layer by layer."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_calibration.budget import check_rules
from qdm_calibration.channel_factors import search_channel_factors
from qdm_calibration.plan import plan_scales
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.artifacts.recipe import LayerRule
from qdm_deploy.building.planning import make_plan
from qdm_deploy.errors import InputError
from qdm_export.targets import emit
from tests.recipes import recipe_of

# As little as still decides something.
QUICK: dict[str, Any] = {
    "ranges": "minmax", "step_bins": 1, "channel_factors": "none", "keep_fp": "none", "sensitivity": False,
    "output_correction": False,
}  # fmt: skip
CONV, QUERY = "down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.to_q"


def nobody_asks() -> Any:
    raise AssertionError("one step bin needs no step importance")


def planned(tiny: Any, **choices: Any) -> QuantizationPlan:
    """The plan of the model "labels"."""
    return make_plan(
        recipe_of(**{**QUICK, **choices}), tiny.checkpoint("labels"), tiny.topology("labels"),
        tiny.calibration("labels"), tiny.statistics("labels"), targets=TARGETS, min_sqnr_db=25.0, seed=0,
        folder=Path("unused"), importance=nobody_asks, stage=lambda name: nullcontext(),
    ).plan  # fmt: skip


def rules(*given: dict[str, Any]) -> tuple[LayerRule, ...]:
    return tuple(LayerRule(**each) for each in given)


def test_a_plan_is_that_of_its_parts(tiny: Any) -> None:
    recipe = recipe_of(**{**QUICK, "channel_factors": "free"})
    plan = planned(tiny, channel_factors="free")
    network, topology, statistics = tiny.checkpoint("labels").unet, tiny.topology("labels"), tiny.statistics("labels")
    factors = search_channel_factors(network, topology, statistics, tiny.calibration("labels"), recipe, channels=())
    # With two classes of inputs, those that are free and those that are not, both kinds of decision are in it.
    assert {item.inverse_k is None for item in plan.quantized} == {True, False}
    assert set(factors) == set(topology.groups())
    assert plan.options == recipe.document()
    assert plan.provenance["weights_sha256"] == tiny.checkpoint("labels").weights_sha256
    plain = planned(tiny)
    for item in plan_scales(network, topology, statistics, recipe_of(**QUICK)).quantized:
        np.testing.assert_array_equal(plain.layer(item.name).codes, item.codes)


def test_free_factors_leave_no_multiply_where_it_would_cost_a_kernel(tiny: Any) -> None:
    topology = tiny.topology("labels")
    counts = {}
    for mode in ("free", "auto"):
        plan = planned(tiny, channel_factors=mode)
        for target in TARGETS:
            graph = emit(tiny.float_graph("labels"), plan, target)
            left = [str(node.name).rpartition("/")[0] for node in graph.graph
                    if str(node.name).endswith("/scale_channels")]  # fmt: skip
            counts[mode, target] = [name for name in left if topology.layer(name).normalized]
        assert any(item.inverse_k is not None for item in plan.quantized)
    assert {target: counts["free", target] for target in TARGETS} == {"onnxruntime": [], "openvino": [], "tensorrt": []}
    assert counts["auto", "tensorrt"]


def test_a_rule_changes_its_layers_and_no_other(tiny: Any) -> None:
    plain = planned(tiny)
    ruled = planned(tiny, layers=rules({"match": CONV, "bits": 4, "zero_offset": False}))
    assert (ruled.layer(CONV).weight_bits, ruled.layer(CONV).zero_offset) == (4, 0)
    assert int(np.abs(ruled.layer(CONV).codes).max()) == 7
    assert plain.layer(CONV).zero_offset != 0
    for before, after in zip(plain.layers, ruled.layers, strict=True):
        if before.name != CONV:
            assert before.notes == after.notes
            if before.precision == "int8":
                np.testing.assert_array_equal(before.codes, after.codes)
    assert ruled.options["layers"] == [{"match": CONV, "bits": 4, "zero_offset": False}]


def test_of_two_rules_the_later_one_wins_key_by_key(tiny: Any) -> None:
    ruled = planned(
        tiny, layers=rules({"match": "down_blocks.*", "bits": 4, "ranges": "mse"}, {"match": CONV, "bits": 8})
    )
    assert {item.weight_bits for item in ruled.quantized if item.name.startswith("down_blocks.")} == {4, 8}
    assert ruled.layer(CONV).weight_bits == 8
    assert ruled.layer(CONV).notes["s"].startswith("mse range")
    assert {item.weight_bits for item in ruled.quantized if not item.name.startswith("down_blocks.")} == {8}


def test_a_rule_puts_layers_in_float_and_another_keeps_them_in_int8(tiny: Any) -> None:
    ruled = planned(tiny, layers=rules({"match": "*.to_[qkv]", "precision": "float"}))
    kept = [item for item in ruled.layers if item.reason == "kept in float: by a layer rule of the recipe"]
    assert len(kept) >= 3
    assert all(item.name.endswith(("to_q", "to_k", "to_v")) for item in kept)
    pinned = planned(tiny, keep_fp="down_blocks.*", layers=rules({"match": CONV, "precision": "int8"}))
    names = {item.name for item in pinned.quantized if item.name.startswith("down_blocks.")}
    assert names == {CONV}
    assert planned(tiny, keep_fp="100%", layers=rules({"match": CONV, "precision": "int8"})).quantized[0].name == CONV


def test_a_rule_offers_factors_where_the_recipe_does_not(tiny: Any) -> None:
    topology = tiny.topology("labels")
    ruled = planned(tiny, layers=rules({"match": CONV, "channel_factors": "auto"}))
    assert "alpha" in ruled.layer(CONV).notes["k"]
    others = [item for item in ruled.quantized if item.layer.input_group != topology.layer(CONV).input_group]
    assert not any("alpha" in item.notes.get("k", "") for item in others)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"match": "down_block.*", "bits": 4},
            r"layers\[0\]\.match = 'down_block\.\*' fits no layer .*close to it: down",
        ),
        ({"match": "conv_in", "precision": "int8"}, r"layers\[0\]\.match = 'conv_in' fits no layer that may be INT8"),
        ({"match": QUERY, "ranges": "mse"}, rf"{QUERY}, .*to_k, .*to_v read one tensor, so it has one grid"),
    ],
)
def test_rules_that_mean_nothing_are_refused(tiny: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_rules(recipe_of(layers=rules(given)), tiny.topology("labels"))
    fine = rules({"match": "*.to_[qkv]", "ranges": "mse"}, {"match": QUERY, "bits": 4})
    check_rules(recipe_of(layers=fine), tiny.topology("labels"))
