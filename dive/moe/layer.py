"""One layer's experts and router, between building them and putting them into a model.

Shapes: E experts, D hidden width, F FFN channels of the dense model, W kept channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dive.model.families import FFN


@dataclass(slots=True)
class ExpertLayer:
    """One layer's experts and router."""

    masks: Tensor
    """(E, F) bool, true for the channels an expert kept."""
    gate_up: Tensor
    """(E, 2 W, D)"""
    down: Tensor
    """(E, D, W)"""
    router: Tensor
    """(E, D)"""
    bias: Tensor | None = None
    """(E, D), FLAP's compensation."""

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        named = {"masks": self.masks, "gate_up": self.gate_up, "down": self.down, "router": self.router}
        return named if self.bias is None else named | {"bias": self.bias}


def expert_function(layer: ExpertLayer, expert: int, act: nn.Module) -> Callable[[Tensor], Tensor]:
    """One expert as a function (T, D) to (T, D)."""
    gate, up = layer.gate_up[expert].chunk(2)
    pruned = FFN(gate, up, layer.down[expert], act)

    def run(inputs: Tensor) -> Tensor:
        output = pruned.channels(inputs) @ pruned.down.T
        return output if layer.bias is None else output + layer.bias[expert]

    return run


def convert(layer: ExpertLayer, dtype: torch.dtype, device: torch.device | None = None) -> ExpertLayer:
    """The layer with its weights in another element type, on another device if one is given."""
    return ExpertLayer(
        masks=layer.masks,
        gate_up=layer.gate_up.to(device, dtype),
        down=layer.down.to(device, dtype),
        router=layer.router.to(device, dtype),
        bias=None if layer.bias is None else layer.bias.to(device, dtype),
    )
