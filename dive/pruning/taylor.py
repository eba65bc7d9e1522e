"""First-order Taylor importance of FFN channels, from gradients of the language-model loss (LLM-Pruner, arXiv 2305.11627).

Shapes: n sequences, T tokens each, L layers, F channels.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dive.model.families import decoder_layers, ffn_projections
from dive.progress import track
from dive.ranks import batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def taylor_scores(model: "PreTrainedModel", tokens: Mapping[str, Tensor], *, batch: int = 16) -> dict[str, Tensor]:
    """{name: (L, F) float64}: how much each channel matters to the loss, to first order, in nats.

    LLM-Pruner's vector-wise estimate (its eq. 3, summed over the coupled structures gate, up and down): a channel's
    score is Σ_m |Σ_w w · ∂loss/∂w| over its weights w in each of the three matrices m. No gradient of a weight is needed for
    it, since Σ_w w · ∂loss/∂w of the row or column is Σ_t z_t · ∂loss/∂z_t of what it computes: of the gate's output, and of
    the channel itself for up and for down alike.

    Absolute values are taken sequence by sequence, so that scores add up over sets of text and do not depend on the batch
    size. The loss is the sum of the tokens' negative log-likelihoods.

    Costs a forward and a backward pass without gradients of weights. The memory is that of one batch's activations through
    all layers; nothing of the size of the weights is kept.

    Args:
        model: dense model, frozen.
        tokens: {name: (n, T) int64}.
        batch: sequences per pass.
    """
    layers, channels = len(decoder_layers(model)), int(model.config.intermediate_size)
    found = {name: torch.zeros(layers, channels, dtype=torch.float64) for name in tokens}
    steps = [(name, rows) for name, matrix in tokens.items() for rows in batches(matrix, batch)]
    for name, rows in track(steps, "Taylor scores"):
        gates, activations, gradients = _backward(model, rows.to(model.device))
        for number in range(layers):
            gate = gates[number] * gradients[number]
            channel = activations[number] * gradients[layers + number]
            by_sequence = gate.float().sum(dim=1).abs() + 2 * channel.float().sum(dim=1).abs()
            found[name][number] += by_sequence.double().sum(dim=0).cpu()
    return found


def _backward(model: "PreTrainedModel", ids: Tensor) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """(outputs of gate_proj, inputs of down_proj, gradients of the loss by those and then by these), each (n, T, F)."""
    gates: list[Tensor] = []
    activations: list[Tensor] = []

    def keep_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        gates.append(output)

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        activations.append(args[0])

    hooks = []
    for number in range(len(decoder_layers(model))):
        gate, _, down = ffn_projections(model, number)
        hooks += [gate.register_forward_hook(keep_output), down.register_forward_pre_hook(keep_input)]
    try:
        with torch.enable_grad():
            embed: Callable[[Tensor], Tensor] = model.get_input_embeddings()
            start = embed(ids).detach().requires_grad_()  # the weights are frozen: something must carry the gradient
            logits = model(inputs_embeds=start, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, [*gates, *activations])
    finally:
        for hook in hooks:
            hook.remove()
    return [g.detach() for g in gates], [a.detach() for a in activations], gradients
