"""Who is routed where, and how much experts have in common.

Shapes: L layers, E experts, F channels, T tokens, V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dive.model.families import moe_blocks, sparse_layers
from dive.ranks import ALONE, Ranks, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOP_TOKENS = 12
"""Tokens that a summary names of each expert, at most."""
RARE = 4
"""A token that was met no more often names no expert."""


@dataclass(slots=True)
class Routing:
    """Share of each domain's token-to-expert assignments."""

    share: dict[str, Tensor]
    """{domain: (L, E)}, rows sum to one."""
    layers: list[int]
    """Numbers of the L layers that have experts."""
    counts: Tensor | None = None
    """(V, E) int64, how often a token of the vocabulary was sent to an expert, over all layers and domains."""

    @property
    def load(self) -> Tensor:
        """(L, E), share of all tokens, domains weighted alike."""
        return torch.stack(list(self.share.values())).mean(dim=0)

    def summary(self) -> dict[str, Any]:
        """JSON values: shares, and per layer the largest load over the mean and the entropy of the load in nats; the tokens of
        each expert where they were counted."""
        load = self.load
        return {
            "share": {domain: share.mean(dim=0).tolist() for domain, share in self.share.items()},
            "layers": self.layers,
            "share_by_layer": {domain: share.tolist() for domain, share in self.share.items()},
            "load_max_over_mean": (load.max(dim=1).values * load.shape[1]).tolist(),
            "load_entropy": torch.special.entr(load).sum(dim=1).tolist(),
            "tokens": None if self.counts is None else top_tokens(self.counts),
        }


def top_tokens(counts: Tensor, *, limit: int = TOP_TOKENS) -> list[list[dict[str, float]]]:
    """For each expert the tokens that set it apart, the most telling first: {id, share, lift}.

    They are ranked by n · log(p(e | t) / p(e)), n being how often the expert gets the token: the token's part of the
    log-likelihood ratio by which corpus linguistics finds keywords (Dunning 1993, "Accurate methods for the statistics of
    surprise and coincidence"). Tokens that the expert gets no more often than others are left out.

    Args:
        counts: (V, E) int64, see :attr:`Routing.counts`.

    Returns:
        E lists. ``share`` is p(e | t), the part of the token's assignments that the expert gets; ``lift`` is p(e | t) / p(e).
    """
    seen = counts.double()
    expected = seen.sum(dim=0) / seen.sum().clamp_min(1.0)
    share = seen / seen.sum(dim=1, keepdim=True).clamp_min(1.0)
    lift = share / expected.clamp_min(torch.finfo(torch.float64).tiny)
    telling = torch.where(lift > 1.0, seen * lift.clamp_min(1.0).log(), 0.0)
    ranked = telling.topk(min(limit, len(telling)), dim=0)
    return [
        [
            {"id": int(token), "share": float(share[token, expert]), "lift": float(lift[token, expert])}
            for token, value in zip(ranked.indices[:, expert], ranked.values[:, expert], strict=True)
            if value > 0.0
        ]
        for expert in range(counts.shape[1])
    ]


@torch.no_grad()
def routing_share(
    model: "PreTrainedModel", windows: Mapping[str, Tensor], *, batch: int = 16, ranks: Ranks = ALONE
) -> Routing:
    """Count which experts the routers select on each domain's windows (N, T) int64, and for which tokens.

    Args:
        batch: windows per forward pass.
        ranks: the processes that count together, each on its share of the windows.
    """
    layers, experts = sparse_layers(model.config), int(model.config.num_experts)
    if experts == 1:
        return Routing({domain: torch.ones(len(layers), 1) for domain in windows}, layers)
    counts = torch.zeros(len(windows), len(layers), experts)
    of_tokens = torch.zeros(int(model.config.vocab_size), experts, dtype=torch.int64)
    current, ids = 0, torch.empty(0, dtype=torch.int64)

    def count(number: int, chosen: Tensor) -> None:
        counts[current, number] += torch.bincount(chosen.reshape(-1), minlength=experts)
        cells = ids[:, None] * experts + chosen
        of_tokens.view(-1).scatter_add_(0, cells.reshape(-1), torch.ones(cells.numel(), dtype=torch.int64))

    with _chosen(model, count):
        for current, matrix in enumerate(windows.values()):  # noqa: B007  # count reads it
            for rows in batches(ranks.part(matrix), batch):
                ids = rows.reshape(-1)
                model.base_model(input_ids=rows.to(model.device), use_cache=False)
    counts, of_tokens = ranks.sum(counts), ranks.sum(of_tokens)
    of_tokens[of_tokens.sum(dim=1) <= RARE * len(layers) * int(model.config.num_experts_per_tok)] = 0
    share = dict(zip(windows, counts / counts.sum(dim=-1, keepdim=True), strict=True))
    return Routing(share, layers, of_tokens)


@torch.no_grad()
def experts_of_tokens(model: "PreTrainedModel", tokens: Tensor) -> Tensor:
    """The expert that each layer's router likes best for every token of a text.

    Args:
        tokens: (T,) int64, the text.

    Returns:
        (T, L) int64, of the L layers that have experts, see :func:`dive.model.families.sparse_layers`.
    """
    found: list[Tensor] = []
    with _chosen(model, lambda _, chosen: found.append(chosen[:, 0])):
        model.base_model(input_ids=tokens[None].to(model.device), use_cache=False)
    return torch.stack(found, dim=1)


@contextmanager
def _chosen(model: "PreTrainedModel", see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show the experts that routers choose, (tokens, K) int64 with the likeliest first, beside the number of the sparse layer."""
    hooks = []
    for number, block in enumerate(moe_blocks(model)):

        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor], number: int = number) -> None:
            see(number, output[2].cpu())

        hooks.append(block.gate.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def mask_overlap(masks: Tensor) -> Tensor:
    """Jaccard index of the channels of every pair of experts, averaged over layers, (E, E).

    Args:
        masks: (L, E, F) bool.
    """
    kept = masks.double()
    both = kept @ kept.transpose(1, 2)
    sizes = kept.sum(dim=2)
    either = sizes[:, :, None] + sizes[:, None, :] - both
    return (both / either.clamp_min(1.0)).mean(dim=0)
