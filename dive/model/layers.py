"""One decoder layer after another over a fixed set of tokens.

Every statistic of an FFN is taken here: the hidden states of all tokens rest between layers, so that one layer's
activations at a time are alive however many tokens and layers there are. With a streamed model
(:mod:`dive.model.streamed`) the same holds of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dive.model.activations import HiddenStates
from dive.model.families import decoder_layers, ffn_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class FFNBatch:
    """What one FFN saw of one batch of tokens; n sequences × T tokens are flattened."""

    index: int
    """Position of the batch in the sequence given to :class:`Track`."""
    inputs: Tensor
    """(n · T, D), after the norm."""
    channels: Tensor
    """(n · T, F), the input of ``down_proj``."""


class _StopForward(Exception):
    """Raised by the hook on the first layer once its arguments are known."""


def _embed(model: "PreTrainedModel", batches: Sequence[Tensor]) -> tuple[HiddenStates, list[dict[str, Any]]]:
    """Hidden states before the first layer, and the other arguments of every layer, batch by batch."""
    tokens = sum(batch.numel() for batch in batches)
    hidden = HiddenStates(model.device, tokens * model.config.hidden_size * model.dtype.itemsize)
    arguments: list[dict[str, Any]] = []

    def keep_arguments(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        arguments.append({name: value for name, value in kwargs.items() if name != "hidden_states"})
        raise _StopForward

    hook = decoder_layers(model)[0].register_forward_pre_hook(keep_arguments, with_kwargs=True)
    try:
        shared: dict[tuple[int, ...], dict[str, Any]] = {}
        for batch in batches:
            try:
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
            except _StopForward:
                # Positions and mask depend on the batch's shape alone: one copy a shape.
                arguments[-1] = shared.setdefault(tuple(batch.shape), arguments[-1])
    finally:
        hook.remove()
    return hidden, arguments


class Track:
    """All tokens on their way through a model, from one layer to the next; one pass over them in all.

    For each layer in turn either :meth:`run`, which is the model's own arithmetic, or :meth:`attend` and then :meth:`add` of
    what the caller makes the FFN return.
    """

    @torch.no_grad()
    def __init__(self, model: "PreTrainedModel", batches: Sequence[Tensor]) -> None:
        """
        Args:
            model: dense model.
            batches: token matrices (n, T), int64; lengths may differ between batches.
        """
        self.model = model
        self.hidden, self.arguments = _embed(model, batches)

    @torch.no_grad()
    def run(self, number: int) -> Iterator[FFNBatch]:
        """Run a layer over all batches; yield what its FFN saw of each. To be exhausted."""
        layer = decoder_layers(self.model)[number]
        for index, arguments in enumerate(self.arguments):
            states = self.hidden[index].to(self.model.device)
            states, inputs, channels = _forward(self.model, number, layer, states, arguments)
            self.hidden[index] = states
            yield FFNBatch(index, inputs.flatten(0, -2), channels.flatten(0, -2))

    @torch.no_grad()
    def attend(self, number: int) -> Iterator[Tensor]:
        """Run everything of a layer but its FFN; yield what the FFN is given, (n · T, D), batch by batch."""
        layer = decoder_layers(self.model)[number]
        mlp, _ = ffn_modules(self.model, number)
        seen: list[Tensor] = []

        def nothing(inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return torch.zeros_like(inputs)

        mlp.forward = nothing
        try:
            for index, arguments in enumerate(self.arguments):
                output = layer(self.hidden[index].to(self.model.device), **arguments)
                self.hidden[index] = output[0] if isinstance(output, tuple) else output
                yield seen.pop().flatten(0, -2)
        finally:
            del mlp.forward  # the class's own again

    @torch.no_grad()
    def add(self, outputs: Tensor) -> None:
        """Add the FFN's outputs, (all tokens, D), on the host."""
        start = 0
        for index, states in enumerate(self.hidden):
            stop = start + states[..., 0].numel()
            self.hidden[index] = states + outputs[start:stop].to(states).view_as(states)
            start = stop

    def states(self) -> Tensor:
        """Hidden states of all tokens, (all tokens, D) float32, on the host."""
        return torch.cat([states.flatten(0, -2).float().cpu() for states in self.hidden])


@torch.no_grad()
def _forward(
    model: "PreTrainedModel", number: int, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    mlp, down = ffn_modules(model, number)
    hooks = [
        mlp.register_forward_pre_hook(record("inputs")),
        down.register_forward_pre_hook(record("channels")),
    ]
    try:
        output = layer(hidden, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return (output[0] if isinstance(output, tuple) else output), seen["inputs"], seen["channels"]
