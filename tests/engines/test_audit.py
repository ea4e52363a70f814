"""Reading layer lists: lines as TensorRT-RTX 1.7.1 prints them, and synthetic inspector JSON.

No inspector output of a real GPU was at hand; the JSON here follows NVIDIA's published examples for TensorRT 10 and 11.
"""

import json

import pytest

from qdm_deploy.engines.audit import EngineAudit, LayerFailure, PlannedLayer
from qdm_deploy.engines.kernels import KernelKind, TensorFact, kind_of, operations_of
from qdm_deploy.engines.listing import kernels_from_inspector, kernels_from_log
from qdm_deploy.errors import EngineError

FORMAT = "Strides: [8192,1,512,32], StrideOrder: [3,0,2,1], Datatype: {}, Format: (NHWC) Channel major format"


def tensor(dtype: str, shape: str) -> str:
    return f"{{ Name: __mye1, Dimensions: [{shape}], {FORMAT.format(dtype)} }}"


def line(name: str, kind: str, inputs: list[str], constants: list[str], outputs: list[str], nodes: str) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], Constants: [ {', '.join(constants)}], "
        f"Outputs: [ {', '.join(outputs)}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {nodes}"
    )


CONV = line(
    "down/conv, 1_myl0_4",
    "correlation",
    [tensor("Int8", "-1,32,16,16"), tensor("Half", "-1,32,16,16")],
    [tensor("Int8", "32,32,3,3"), tensor("Float", "1,32,1,1")],
    [tensor("Float", "-1,32,16,16")],
    "[ONNX Layer: down/conv, 1]\x1e[ONNX Layer: a[0].dq]\x1e[ONNX Layer: w.dq]",
)
PARSED = """VERBOSE Parsing node: w.dq [DequantizeLinear]
VERBOSE w.dq [DequantizeLinear] inputs: [down.weight -> (32, 32, 3, 3)[INT8]], [s -> (32)[HALF]],
VERBOSE w.dq [DequantizeLinear] outputs: [wd -> (32, 32, 3, 3)[HALF]],
VERBOSE a[0].dq [DequantizeLinear] inputs: [q -> (-1, 32, 16, 16)[INT8]], [as -> ()[HALF]],
VERBOSE a[0].dq [DequantizeLinear] outputs: [xd -> (-1, 32, 16, 16)[HALF]],
VERBOSE down/conv, 1 [Conv] inputs: [xd -> (-1, 32, 16, 16)[HALF]], [wd -> (32, 32, 3, 3)[HALF]],
VERBOSE down/conv, 1 [Conv] outputs: [c -> (-1, 32, 16, 16)[HALF]],
"""


def log(*lines: str) -> str:
    return PARSED + "VERBOSE Layers:\n" + "\n".join(lines) + "\n\nI/O Tensors:\n Name: x, IOMode: Input\n"


def test_line_of_the_builder_log_is_read() -> None:
    (kernel,) = kernels_from_log(log(CONV))
    assert kernel.name == "down/conv, 1_myl0_4"
    assert kernel.kind == "convolution"
    assert kernel.inputs[0] == TensorFact(dtype="Int8", shape=(-1, 32, 16, 16))
    assert kernel.weight == TensorFact(dtype="Int8", shape=(32, 32, 3, 3))
    assert kernel.outputs[0].dtype == "Float"
    assert kernel.onnx_nodes == ("down/conv, 1", "a[0].dq", "w.dq")
    assert kernel.is_int8


def test_nodes_are_found_with_their_weights() -> None:
    audit = EngineAudit.from_build(log(CONV))
    (node,) = audit.nodes
    assert (node.name, node.operator, node.weight, node.weight_shape, node.quantized) == (
        "down/conv, 1",
        "Conv",
        "down.weight",
        (32, 32, 3, 3),
        True,
    )
    assert audit.failures([PlannedLayer("down.weight"), PlannedLayer("down/conv, 1")]) == ()
    assert EngineAudit.from_json(audit.to_json()) == audit


def test_what_is_no_kernel_is_not_counted_as_one() -> None:
    extra = [line(name, kind, [], [], [], "") for name, kind in (("__mye1", "signal"), ("__mye2", "wait"))]
    summary = EngineAudit.from_build(log(CONV, *extra, line("__mye3", "shape_call", [], [], [], ""))).summary()
    assert (summary["kernels"], summary["synchronizations"], summary["others"]) == (1, 2, 1)


def test_kernels_are_counted_by_block() -> None:
    def kernel(*nodes: str) -> str:
        return line("k", "kgen", [], [], [], "".join(f"[ONNX Layer: {node}]" for node in nodes))

    block, attention = "down_blocks.0.resnets.1", "mid_block.attentions.0"
    audit = EngineAudit.from_build(
        log(
            kernel("node_silu", f"{block}.conv1/quantize"),
            kernel(f"{block}.conv1"),
            kernel(f"{block}.conv2/add_offset_map", f"{attention}.to_q/quantize"),
            kernel(f"{attention}.to_out.0"),
            kernel("conv_out"),
        )
    )
    assert audit.kernels_per_block() == {block: 3, attention: 1}


def test_float_operands_are_not_int8() -> None:
    floating = CONV.replace("Datatype: Int8", "Datatype: Half", 1)
    assert EngineAudit.from_build(log(floating)).failures([PlannedLayer("down.weight")]) == (
        LayerFailure(
            "down.weight", "kernel down/conv, 1_myl0_4 (correlation) multiplies Half activations with Int8 weights"
        ),
    )


def test_layer_inside_another_kernel_is_a_failure() -> None:
    fused = line("__myl_Mul_myl0_1", "kgen", [tensor("Half", "1")], [], [], "[ONNX Layer: down/conv, 1]")
    (failure,) = EngineAudit.from_build(log(fused)).failures([PlannedLayer("down.weight")])
    assert failure.reason == "it has no convolution or GEMM kernel of its own; it runs in __myl_Mul_myl0_1"


def test_engine_without_node_names_is_judged_by_counts() -> None:
    nameless = CONV.split("[ONNX Layer")[0]
    audit = EngineAudit.from_build(log(nameless))
    assert audit.failures([PlannedLayer("a")]) == ()
    failures = audit.failures([PlannedLayer("a"), PlannedLayer("b"), PlannedLayer("c", "gemm")])
    assert [failure.name for failure in failures] == ["one of 2 convolution layers", "one of 1 gemm layers"]
    assert "1 INT8 kernels for 2 planned layers" in failures[0].reason


def test_log_without_a_list_is_refused() -> None:
    with pytest.raises(EngineError, match="holds no list of compiled layers"):
        kernels_from_log("VERBOSE nothing of the kind")


def test_empty_list_is_refused() -> None:
    with pytest.raises(EngineError, match="the builder's log lists no layer at all"):
        kernels_from_log("VERBOSE Layers:\n\n")


def test_line_of_another_form_is_refused() -> None:
    with pytest.raises(EngineError, match="cannot read: 'Layer: conv"):
        kernels_from_log("VERBOSE Layers:\nLayer: conv, in another form\n")


def test_audit_that_is_none_is_refused() -> None:
    with pytest.raises(EngineError, match="not an engine audit: Field required"):
        EngineAudit.from_json('{"kernels": []}')


@pytest.mark.parametrize(
    ("name", "layer_type", "inputs", "expected"),
    [
        ("__myl_SiluAddMulMinMaxRounCastGnor_myl0_3", "kgen", ["Half"], "generated"),
        ("__myl_MulMinMaxRounCast_myl0_1", "kgen", ["Half"], "quantize"),
        ("__myl_MinMaxRounCast_myl0_2", "kgen", ["Half"], "quantize"),
        ("__myl_TranReshMoveAddMulMinMaxRounCast_myl0_2", "kgen", ["Half"], "quantized_transpose"),
        ("__myl_CastMulMinMaxRounCast_myl0_2", "kgen", ["Int8"], "requantize"),
        ("__mye216855_myl0_23", "signal", [], "sync"),
        ("__mye216857_myl0_31", "wait", [], "sync"),
        ("__myl_MulMinMaxRounCastReplConc_myl0_1", "kgen", ["Half"], "quantize"),
        ("__myl_MulCastAddReluMulMinMaxRounCast_myl0_3", "kgen", ["Float"], "generated"),
        ("__myl_CastMulCast_myl0_1", "kgen", [], "dequantize"),
        ("__myl_MulMinMaxRounCastCastMul_myl0_2", "kgen", ["Half"], "fake_quantize"),
        ("__myl_Move_myl0_2", "kgen", [], "move"),
        ("__myl_Move_myl0_4", "kgen", ["Half"], "reformat"),
        ("__myl_Tran_myl0_4", "kgen", ["Half"], "reformat"),
        ("__myl_Conc_myl0_115", "runtime_function", ["Half", "Half"], "generated"),
        ("__myl_Cast_myl0_1", "kgen", ["Float"], "cast"),
        ("__myl_Cast_myl0_7", "kgen", ["Half"], "reformat"),
        ("__myl_FcAddSilu_myl0_2", "runtime_fusion", ["Half"], "gemm"),
        ("_gemm_mha_v2_myl0_2", "kgen", ["Half"] * 3, "attention"),
        ("mid.attention.to_q_myl0_2", "gemm", ["Half"], "gemm"),
        ("__mye108_0_myl0_0", "shape_call", [], "shape"),
        ("y_myl0_3", "deconv", ["Half", "Half"], "convolution"),
        ("something", "NewLayerType", ["Half"], "other"),
    ],
)
def test_kinds_of_kernels(name: str, layer_type: str, inputs: list[str], expected: KernelKind) -> None:
    facts = tuple(TensorFact(dtype=dtype, shape=(1, 8)) for dtype in inputs)
    assert kind_of(name, layer_type, "", facts, (TensorFact(dtype="Half", shape=(1, 8)),)) == expected


def test_operations_are_read_from_generated_names_only() -> None:
    assert operations_of("__myl_MulCastAdd_myl0_5") == ("Mul", "Cast", "Add")
    assert operations_of("MulCastAdd") == ()


# ----------------------------------------------------------------------------------- the inspector, synthetic documents


def layer(name: str, layer_type: str, read: str, written: str, *, split: bool, **more: object) -> dict[str, object]:
    def described(dtype: str) -> dict[str, object]:
        words = {
            "Int8": "Thirty-two wide channel vectorized row major Int8 format",
            "Half": "Row major linear FP16 format",
        }
        kind = {"Format": words[dtype], "Datatype": dtype} if split else {"Format/Datatype": words[dtype]}
        return {"Name": "t", "Dimensions": [-1, 32, 16, 16], **kind}

    return {"Name": name, "LayerType": layer_type, "Inputs": [described(read)], "Outputs": [described(written)], **more}


@pytest.mark.parametrize("split", [False, True], ids=["TensorRT 10", "TensorRT 11"])
def test_inspector_json(split: bool) -> None:
    document = {
        "Layers": [
            layer("q", "Reformat", "Half", "Int8", split=split),
            layer("copy", "Reformat", "Half", "Half", split=split),
            layer(
                "c",
                "CaskConvolution",
                "Int8",
                "Half",
                split=split,
                Weights={"Type": "Int8", "Count": 9216},
                TacticName="sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32",
                Metadata="[ONNX Layer: down/conv, 1]\x1e[ONNX Layer: w.dq]",
            ),
            layer("d", "CaskConvolution", "Half", "Half", split=split, Weights={"Type": "Half", "Count": 9216}),
            layer("dq", "Reformat", "Int8", "Half", split=split),
        ],
        "Bindings": ["x", "y"],
    }
    audit = EngineAudit.from_build(PARSED, json.dumps(document))
    assert [kernel.kind for kernel in audit.kernels] == [
        "quantize",
        "reformat",
        "convolution",
        "convolution",
        "dequantize",
    ]
    assert [kernel.is_int8 for kernel in audit.kernels] == [False, False, True, False, False]
    assert audit.failures(audit.quantized_layers()) == ()
    assert audit.summary()["planned"] == 1


@pytest.mark.parametrize(
    ("weights", "tactic", "expected"),
    [
        ("Int8", "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32", True),
        ("Int8", "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc", False),
        ("Half", "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32", False),
        ("N/A due to dynamic shapes", "sm90_xmma_fprop_implicit_gemm_i8i8_i8i32_f32", True),
    ],
)
def test_a_type_that_is_not_told_is_read_from_the_tactic(weights: str, tactic: str, expected: bool) -> None:
    untold = {"Name": "t", "Dimensions": [-1, 32, 16, 16], "Format/Datatype": "N/A due to dynamic shapes"}
    convolution = {
        "Name": "c", "LayerType": "CaskConvolution", "Inputs": [untold], "Outputs": [untold],
        "Weights": {"Type": weights, "Count": 9216}, "TacticName": tactic,
    }  # fmt: skip
    (kernel,) = kernels_from_inspector(json.dumps({"Layers": [convolution]}))
    assert kernel.is_int8 == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "the engine inspector's answer is not JSON"),
        ('{"Bindings": []}', "no list 'Layers'; it begins with '{\"Bindings\""),
        ('{"Layers": ["conv + relu"]}', "knows only the names of the layers"),
        ('{"Layers": []}', "the engine inspector's answer lists no layer at all"),
    ],
)
def test_other_inspector_answers_are_refused(text: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        kernels_from_inspector(text)
