"""Steps that all processes of a run compute together, and how they agree on when."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate

import torch
from torch import distributed

from dive.errors import UserError
from dive.ranks import ALONE, Ranks, meeting_place
from dive.store import Artifact, P, Place, R, Step

FOUND, COMPUTE = range(2)
"""What the first process tells the others: the artifact is in the store, compute it with me."""


def ranks() -> Ranks:
    """This process among those of its run; alone before they are connected."""
    if not distributed.is_available() or not distributed.is_initialized():
        return ALONE
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def from_first(value: int) -> int:
    """The first process's ``value``, in every process; waits for it.

    Waiting happens in Python, not inside the collective call, so that a signal still ends this process.

    Raises:
        UserError: the first process has ended.
    """
    if ranks().count == 1:
        return value
    message = torch.tensor([value], device=meeting_place(torch.device("cpu")))
    try:
        work = distributed.broadcast(message, src=0, async_op=True)
        while not work.is_completed():
            time.sleep(0.02)
        work.wait()
    except RuntimeError as error:
        raise UserError("the first process of this run has ended; what it said tells why") from error
    return int(message)


class SharedStep(Step[R, P]):
    """A step that all processes of the run compute together; see :func:`shared_step`."""

    def __call__(self, run: R, *how: P.args, **inputs: P.kwargs) -> Artifact:
        """The artifact of these inputs, computed by all if it is not in the run's store.

        The first process alone looks into the store and writes: another run may be computing the same, and it waits for that.

        Raises:
            UserError: another process has ended.
        """
        place = ranks()
        if place.count == 1:
            return super().__call__(run, *how, **inputs)
        if place.rank == 0:

            def compute(where: Place) -> float | None:
                from_first(COMPUTE)
                return self.compute(where, run, *how, **inputs)

            artifact = run.store.get(self.kind, self.depends(**inputs), compute, what=self.what)
            from_first(FOUND)
            return artifact
        computed = from_first(FOUND) == COMPUTE
        if computed:
            with tempfile.TemporaryDirectory() as nowhere:
                where = Place(Path(nowhere), self.partial(run, **inputs), writes=False)
                self.compute(where, run, *how, **inputs)
            from_first(FOUND)
        return self._written(run, inputs, computed=computed)

    def _written(self, run: R, inputs: dict[str, Any], *, computed: bool) -> Artifact:
        """The artifact that the first process wrote."""
        found = self.find(run, **inputs)
        if found is None:
            raise UserError(
                f"store={run.store.root}: what the first process wrote is not there; the store must be one directory that all "
                "processes of the run see"
            )
        found = replace(found, reused=not computed)
        if run.store.finished is not None:
            run.store.finished(self.kind, found)
        return found


def shared_step(
    kind: str, what: str, *, version: int = 1
) -> Callable[[Callable[Concatenate[Place, R, P], float | None]], SharedStep[R, P]]:
    """:func:`dive.store.step` of a function that all processes of a run compute together.

    Each of them calls it; ``place.writes`` is true in the one whose files count.
    """

    def wrap(compute: Callable[Concatenate[Place, R, P], float | None]) -> SharedStep[R, P]:
        return SharedStep(compute, kind, what, version)

    return wrap
