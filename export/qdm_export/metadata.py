"""Keys of metadata in a graph: what one stage knows and a later one cannot read from the graph itself.

Names of nodes and values are for people. Nothing is parsed from them.
"""

import onnx_ir as ir

__all__ = [
    "CENTRED_KEY",
    "LAYER_KEY",
    "MODULE_KEY",
    "PART_KEY",
    "PASSES_KEY",
    "PHASE_KEY",
    "TIME_TABLE_KEY",
    "module_of",
]

# On a model: the passes that have run, in order.
PASSES_KEY = "qdm.passes"
# On a node: the module it was exported from, such as "net.unet.conv_in".
MODULE_KEY = "qdm.module"
# On a node that a pass inserted for a layer: the layer's name, and what the node does there, such as "quantize".
LAYER_KEY = "qdm.layer"
PART_KEY = "qdm.part"
# On all but the first of the kernels that a layer was taken apart into: which one it is.
PHASE_KEY = "qdm.phase"
# On the Gather that looks the time embedding up.
TIME_TABLE_KEY = "qdm.time_table"
# On a value [B, C]: into how many groups its channels fall that have a mean of 0 each.
CENTRED_KEY = "qdm.centred"

_NETWORK = "net.unet."


def module_of(node: ir.Node) -> str:
    """The module of the U-Net that a node was exported from; "" where it was traced in none."""
    return node.metadata_props.get(MODULE_KEY, "").removeprefix(_NETWORK)
