"""The channels of every FFN dealt out to the experts at random (LLaMA-MoE, arXiv 2406.16554).

Shapes: E experts, F FFN channels, W channels of an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dive.config import MoEConfig, PruningConfig
from dive.model.families import FFN
from dive.moe.cut import cut_experts
from dive.moe.layer import ExpertLayer
from dive.moe.walk import Group, StatisticsWalk, together
from dive.ranks import ALONE, Ranks

WALK = StatisticsWalk


def layer(
    weights: FFN,
    groups: Sequence[Group],
    pruning: PruningConfig,
    moe: MoEConfig,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> ExpertLayer:
    """The experts of one layer. A random W of F channels gives W / F of the output on average, and is scaled back."""
    channels = weights.down.shape[1]
    width = pruning.width(channels)
    masks = split_masks(channels, width, moe.experts, seed=seed)
    fitted = [together(groups)] * moe.experts
    return cut_experts(weights, masks, fitted, groups, pruning, moe, seed=seed, scale=channels / width, ranks=ranks)


def split_masks(channels: int, width: int, experts: int, *, seed: int) -> Tensor:
    """Random channels of each expert, (E, F) bool: disjoint while there are enough, and used as evenly as can be.

    Random permutations of the channels, one after another, are cut into pieces of ``width`` (LLaMA-MoE,
    arXiv 2406.16554, independent neurons; with more than F channels in all, each is used again only after all others).
    """
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(experts, channels, dtype=torch.bool)
    waiting: list[int] = []
    for mask in masks:
        chosen: list[int] = []
        while len(chosen) < width:
            if not waiting:
                waiting = torch.randperm(channels, generator=generator).tolist()
            taken = set(chosen)
            # A fresh permutation may start with a channel this expert has: it waits for the next expert.
            position = next(i for i, channel in enumerate(waiting) if channel not in taken)
            chosen.append(waiting.pop(position))
        mask[chosen] = True
    return masks
