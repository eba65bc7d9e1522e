"""Names that options had once, and what they are now."""

import re
from collections.abc import Iterable

from dive.errors import UserError

RENAMED = {
    "moe.construction": "the construction is chosen by its group: moe=default, plain, random_split, coactivation or upcycle",
    "moe.refinement.start": "set moe.refined.start=kmeans or random, or affinity=mined to begin with groups of domains",
    "moe.refinement": "write moe.refined",
    "moe.router_init": "write moe.plain.router_init, or that of moe.random_split or moe.coactivation",
    "moe.shared": "write moe.plain.shared or moe.coactivation.shared",
    "moe.active_channels": "write moe.coactivation.active_channels",
    "moe.noise": "write retrain.noise",
    "retrain.stages.experts": "write retrain.stages.retrain",
    "moe.storage": "write retrain.storage, and what was shared is indexed",
}
"""{old name: what to do}; a name stands for what is below it as well, and the first that fits counts."""


def refuse_old_names(overrides: Iterable[str]) -> None:
    """
    Raises:
        UserError: an override has a name that is another by now.
    """
    for override in overrides:
        key = re.split("[=@]", override.lstrip("+~"), maxsplit=1)[0]
        for old, now in RENAMED.items():
            if key == old or key.startswith(f"{old}."):
                raise UserError(f"{key} is no more: {now}{key.removeprefix(old)}")
