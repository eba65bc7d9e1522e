"""Cross-domain perplexity: the dense model pruned on each domain, measured on every domain.

Shapes: n domains, L layers, F channels.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dive.eval.perplexity import token_nll
from dive.model.families import FFN, ffn, ffn_modules
from dive.progress import track
from dive.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICING_PAYS = 256
"""Tokens of a forward pass, times channels removed over channels kept, from which slicing the weights anew in each pass costs
less time than it saves: about 100 on a CPU, 400 on a GPU, whose arithmetic is faster than its memory by more."""


@contextmanager
def pruned_in_place(model: "PreTrainedModel", masks: Tensor, fill: Tensor) -> Iterator[None]:
    """Run the dense model as if its FFNs were pruned, without copying a weight.

    The activation of a removed channel is replaced by a constant before ``down_proj``: with its calibration mean this
    is FLAP's bias compensation exactly, since W (x ⊙ m + X̄ ⊙ (1 − m)) = W (x ⊙ m) + b.

    Args:
        masks: (L, F) bool, true for kept channels.
        fill: (L, F), value of the removed ones; their mean, or zero.
    """
    hooks = []
    for number in range(len(masks)):
        _, down = ffn_modules(model, number)
        mask = masks[number].to(model.device)
        constant = fill[number].to(model.device, model.dtype)

        def replace(
            _: nn.Module, args: tuple[Tensor, ...], mask: Tensor = mask, constant: Tensor = constant
        ) -> tuple[Tensor, ...]:
            return (torch.where(mask, args[0], constant), *args[1:])

        hooks.append(down.register_forward_pre_hook(replace))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
@torch.no_grad()
def sliced_in_place(model: "PreTrainedModel", masks: Tensor, fill: Tensor) -> Iterator[None]:
    """The same as :func:`pruned_in_place` up to rounding, with FFNs as narrow as their masks.

    A layer's kept weights are gathered whenever it runs and dropped after it: one layer's copies at a time are alive.

    Args:
        masks: (L, F) bool, true for kept channels.
        fill: (L, F), value of the removed ones; their mean, or zero.
    """
    modules = [ffn_modules(model, number)[0] for number in range(len(masks))]
    for number, module in enumerate(modules):
        weights, mask = ffn(model, number), masks[number].to(model.device)
        kept = mask.nonzero()[:, 0]
        removed = fill[number].to(model.device, torch.float32) * ~mask
        constant = torch.cat([rows.float() @ removed for rows in weights.down.split(256)]).to(model.dtype)

        def narrow(inputs: Tensor, weights: FFN = weights, kept: Tensor = kept, constant: Tensor = constant) -> Tensor:
            down = weights.down.index_select(1, kept)
            sliced = FFN(weights.gate.index_select(0, kept), weights.up.index_select(0, kept), down, weights.act)
            return functional.linear(sliced.channels(inputs), down) + constant

        module.forward = narrow
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own again


def slicing_pays(mask: Tensor, tokens: int) -> bool:
    """Whether slicing by masks (L, F) is faster than masking activations, in forward passes of so many tokens."""
    kept = int(mask.sum())
    return tokens * (mask.numel() - kept) > SLICING_PAYS * kept


def cross_domain_perplexity(
    model: "PreTrainedModel",
    tokens: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    means: Mapping[str, Tensor] | None = None,
    batch: int = 16,
    ranks: Ranks = ALONE,
) -> Tensor:
    """P[i, j], the perplexity on domain j of the model pruned on domain i, (n, n) float64.

    Args:
        model: dense model.
        tokens: {domain: (N, T) int64}, text to measure on.
        masks: {domain: (L, F) bool}, see :func:`dive.keep_masks`.
        means: {domain: (L, F)} calibration means for FLAP's bias compensation; none for plain removal.
        batch: sequences per forward pass.
        ranks: the processes that compute together; each takes some of the pruned models.
    """
    domains = list(tokens)
    matrix = torch.zeros(len(domains), len(domains), dtype=torch.float64)
    own = [(i, domain) for i, domain in enumerate(domains) if ranks.owns(i)]
    steps = iter(track(range(len(own) * len(domains)), "mining affinity", "pair"))
    for i, pruned_on in own:
        mask = masks[pruned_on]
        fill = torch.zeros(mask.shape) if means is None else means[pruned_on]
        pass_tokens = min(windows[:batch].numel() for windows in tokens.values())
        prune = sliced_in_place if slicing_pays(mask, pass_tokens) else pruned_in_place
        with prune(model, mask, fill):
            for j, measured_on in enumerate(domains):
                next(steps)
                nll, count = token_nll(model, tokens[measured_on], batch=batch)
                matrix[i, j] = torch.tensor(nll / count, dtype=torch.float64).exp()
    next(steps, None)
    return ranks.sum(matrix)
