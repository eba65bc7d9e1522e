"""DIVE: turn a dense Llama-style LLM into a Mixture-of-Experts (ACL 2025, arXiv 2506.09351).

The functions here are the method without configuration files, for notebooks::

    model, tokenizer = dive.load_dense("embedded")
    tokens = dive.load_tokens(tokenizer)  # {domain: (N, L) int64}, of the embedded texts; path=DIR takes yours
    statistics = dive.collect_statistics(model, tokens)
    masks = {d: dive.keep_masks(model, s, ratio=0.5) for d, s in statistics.items()}
    matrix = dive.cross_domain_perplexity(model, tokens, masks)
    groups = dive.group_domains(matrix, list(tokens), experts=4)
    merged = [sum(statistics[d] for d in group) for group in groups]
    moe = dive.reconstruct(model, merged, ratio=0.5, top_k=1)
    dive.save(moe, tokenizer, "moe")

That is the paper's way; ``dive.reconstruct(model, tokens, ratio=0.5, experts=4)`` is the command line's default.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dive.affinity.grouping import group_domains
    from dive.affinity.matrix import cross_domain_perplexity
    from dive.api import load_tokens, reconstruct
    from dive.export import load_with_expert_bias, save
    from dive.model.load import load_dense
    from dive.pruning.calibrate import collect_statistics
    from dive.pruning.metrics import keep_masks
    from dive.pruning.statistics import ChannelStatistics

__all__ = [
    "ChannelStatistics",
    "collect_statistics",
    "cross_domain_perplexity",
    "group_domains",
    "keep_masks",
    "load_dense",
    "load_tokens",
    "load_with_expert_bias",
    "reconstruct",
    "save",
]

_HOME = {
    "ChannelStatistics": "dive.pruning.statistics",
    "collect_statistics": "dive.pruning.calibrate",
    "cross_domain_perplexity": "dive.affinity.matrix",
    "group_domains": "dive.affinity.grouping",
    "keep_masks": "dive.pruning.metrics",
    "load_dense": "dive.model.load",
    "load_tokens": "dive.api",
    "load_with_expert_bias": "dive.export",
    "reconstruct": "dive.api",
    "save": "dive.export",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: `python -m dive.train --help` must not wait for them.
    if name not in _HOME:
        raise AttributeError(f"module 'dive' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
