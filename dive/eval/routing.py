"""Who is routed where, and how much experts have in common.

Shapes: L layers, E experts, F channels, T tokens.
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


@dataclass(slots=True)
class Routing:
    """Share of each domain's token-to-expert assignments."""

    share: dict[str, Tensor]
    """{domain: (L, E)}, rows sum to one."""
    layers: list[int]
    """Numbers of the L layers that have experts."""

    @property
    def load(self) -> Tensor:
        """(L, E), share of all tokens, domains weighted alike."""
        return torch.stack(list(self.share.values())).mean(dim=0)

    def summary(self) -> dict[str, Any]:
        """JSON values: shares, and per layer the largest load over the mean and the entropy of the load in nats."""
        load = self.load
        return {
            "share": {domain: share.mean(dim=0).tolist() for domain, share in self.share.items()},
            "layers": self.layers,
            "share_by_layer": {domain: share.tolist() for domain, share in self.share.items()},
            "load_max_over_mean": (load.max(dim=1).values * load.shape[1]).tolist(),
            "load_entropy": torch.special.entr(load).sum(dim=1).tolist(),
        }


@torch.no_grad()
def routing_share(
    model: "PreTrainedModel", windows: Mapping[str, Tensor], *, batch: int = 16, ranks: Ranks = ALONE
) -> Routing:
    """Count which experts the routers select on each domain's windows (N, T) int64.

    Args:
        batch: windows per forward pass.
        ranks: the processes that count together, each on its share of the windows.
    """
    layers, experts = sparse_layers(model.config), int(model.config.num_experts)
    if experts == 1:
        return Routing({domain: torch.ones(len(layers), 1) for domain in windows}, layers)
    counts = torch.zeros(len(windows), len(layers), experts)
    current = 0

    def count(number: int, chosen: Tensor) -> None:
        counts[current, number] += torch.bincount(chosen.reshape(-1), minlength=experts)

    with _chosen(model, count):
        for current, matrix in enumerate(windows.values()):  # noqa: B007  # count reads it
            for rows in batches(ranks.part(matrix), batch):
                model.base_model(input_ids=rows.to(model.device), use_cache=False)
    counts = ranks.sum(counts)
    return Routing(dict(zip(windows, counts / counts.sum(dim=-1, keepdim=True), strict=True)), layers)


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
