"""Whether a group of domains has the calibration sequences that the configuration asks of it."""

from collections.abc import Sequence

from dive.config import Compensation, Config, Grouping
from dive.errors import require

HELD_OUT = 4
"""Fewest sequences of a group where one in so many chooses the ridge."""


def check_amounts(config: Config, names: Sequence[str]) -> None:
    """Refuse to build experts from fewer sequences than are asked for, or from too few to choose a ridge.

    Args:
        names: of the calibration domains.

    Raises:
        UserError: names the override to change.
    """
    domains, experts = config.calibration_domains, config.moe.experts
    sizes = group_sizes(config, names)
    per_group = domains.group_samples
    if per_group is not None:
        together = config.grouping is None
        for size in sizes:
            wanted = per_group * (experts if together else 1)
            share = -(-wanted // size)
            most = domains.samples * size // (experts if together else 1)
            whose = f"{experts} experts share" if together and experts > 1 else "an expert has"
            require(
                share <= domains.samples,
                f"calibration_domains.group_samples ({per_group}) takes {share} sequences of each domain where {whose} {size}, "
                f"and calibration_domains.samples is {domains.samples}; raise calibration_domains.samples to {share}"
                + (f", or lower calibration_domains.group_samples to {most}" if most else ""),
            )
    if config.pruning.ridge is None and config.pruning.compensation is Compensation.least_squares:
        # The pruned baseline is one expert from all domains.
        built = [len(names)] if config.moe.refined is not None else [len(names), *sizes]
        fewest = min(domains.samples * size for size in built) if per_group is None else per_group
        name = "samples" if per_group is None else "group_samples"
        require(
            fewest >= HELD_OUT,
            f"pruning.ridge=null chooses the ridge on every fourth calibration sequence, and an expert may have {fewest} only; "
            f"raise calibration_domains.{name}, or set pruning.ridge to a number",
        )


def group_sizes(config: Config, names: Sequence[str]) -> list[int]:
    """Domains of each group that experts are built from; groups yet to be mined may be of one domain each.

    Groups without a domain that is here are left out.
    """
    experts = config.moe.experts
    if config.grouping is None:
        return [len(names)]
    if config.affinity.grouping is Grouping.mined:
        return [1]
    if config.affinity.grouping is Grouping.random:
        return [len(names[number::experts]) for number in range(min(experts, len(names)))]
    sizes = [len(set(members) & set(names)) for members in config.affinity.groups or []]
    return [size for size in sizes if size]
