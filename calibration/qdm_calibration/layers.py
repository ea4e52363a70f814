"""The layers of a network by name, and copies of a network with other modules in their place.

A network takes (sample, timestep, **conditioning) and holds the U-Net as ``unet``; layer names are paths in that U-Net.
"""

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["layer_of", "put_layer", "sharing_copy", "unet_of"]

_Module = TypeVar("_Module", bound=nn.Module)


def unet_of(network: nn.Module) -> nn.Module:
    """The module that layer names are relative to."""
    return network.get_submodule("unet")


def layer_of(network: nn.Module, name: str) -> nn.Module:
    """The layer, or the block of layers, of that name."""
    return unet_of(network).get_submodule(name)


def put_layer(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the layer of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(layer_of(network, parent), leaf, module)


def sharing_copy(module: _Module) -> _Module:
    """A copy that shares every parameter with the original."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, memo)
