"""Whether this machine has room for a run."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dive.config import Freezing
from dive.errors import UserError
from dive.plan.stages import Plan, Stage
from dive.store import files_below
from dive.units import size


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room, in bytes; unknown where none."""

    host: float | None = None
    """Memory that processes can still take."""
    device: float | None = None
    """Memory of one device."""
    store: float | None = None
    """Free on the store's disk."""
    outputs: float | None = None
    """Free on the disk of the run's outputs; none if that is the store's."""
    stored: Mapping[str, float] = field(default_factory=dict)
    """{kind of artifact: bytes of it in the store}, which a run may find again."""


def here(store: Path, outputs: Path, *, device: float | None) -> Capacity:
    """Room on this machine.

    Args:
        store: directory of the store, whether it is there yet or not.
        outputs: directory of the run, likewise.
        device: memory of one device, if the run has one.
    """
    return Capacity(
        host=_host(),
        device=device,
        store=shutil.disk_usage(_existing(store)).free,
        outputs=None if _same_disk(store, outputs) else shutil.disk_usage(_existing(outputs)).free,
        stored=_stored(store),
    )


def _stored(store: Path) -> dict[str, float]:
    """Bytes by kind; the first layers of unfinished experts count as experts, checkpoints as ``partial``, and the tokens of the
    retraining text as what is trained on them."""
    found: dict[str, float] = {}
    for folder in (f for f in store.iterdir() if f.is_dir()) if store.is_dir() else ():
        for file, state in files_below(folder):
            unfinished = folder.name == "partial" and file.relative_to(folder).parts[0].startswith("experts-")
            kind = "experts" if unfinished else "retrained" if folder.name == "tokens" else folder.name
            found[kind] = found.get(kind, 0.0) + state.st_size
    return found


def _host() -> float:
    free = float(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, float(Path(limit).read_text()) - float(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or no limit
    return free


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _same_disk(one: Path, other: Path) -> bool:
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def shortages(plan: Plan, capacity: Capacity) -> list[str]:
    """One line for each thing there is too little of, which names the override that mends it.

    Of the disk what already lies in the store counts as found again, kind by kind: the same command must be able to go on
    where the first one filled the disk.
    """
    found = []
    config = plan.job.config
    for place, room in (("host", capacity.host), ("device", capacity.device)):
        worst = max(plan.stages, key=lambda stage: _peak(stage, place))
        needed = _peak(worst, place)
        if room is not None and needed > room:
            items = _items(worst, place)
            largest = max(items, key=lambda name: items[name])
            found.append(
                f"{worst.name} needs {size(needed)} of {place} memory ({largest}: {size(items[largest])}), "
                f"there is {size(room)}; {_remedy(plan, worst, place, largest, needed - room)}"
            )
    kept: dict[str, float] = {}
    for stage in plan.stages:
        kept[stage.kind] = kept.get(stage.kind, 0.0) + stage.written
    export = kept.pop("export")
    missing = sum(max(taken - capacity.stored.get(kind, 0.0), 0.0) for kind, taken in kept.items())
    needed = missing + max(plan.checkpoints - capacity.stored.get("partial", 0.0), 0.0)
    if capacity.outputs is None:
        needed += export
    elif export > capacity.outputs:
        found.append(
            f"the export takes {size(export)} of disk, {size(capacity.outputs)} are free; set hydra.run.dir=DIR on "
            "a larger disk"
        )
    if capacity.store is not None and needed > capacity.store:
        found.append(
            f"store={config.store}: the run writes {size(needed)}, {size(capacity.store)} are free; set store=DIR "
            "on a larger disk, raise pruning.ratio or lower moe.experts"
        )
    return found


def _peak(stage: Stage, place: str) -> float:
    return stage.memory.host_peak if place == "host" else stage.memory.device_peak


def _items(stage: Stage, place: str) -> Mapping[str, float]:
    return stage.memory.host if place == "host" else stage.memory.device


def _remedy(plan: Plan, stage: Stage, place: str, largest: str, short: float) -> str:
    config = plan.job.config
    of_a_pass = sum(taken for name, taken in _items(stage, place).items() if name.startswith(("activations", "logits")))
    too_long = largest.startswith(("activations", "logits"))
    if stage.kind == "retrained" and (too_long or of_a_pass > short):
        ways = []
        if plan.job.micro_batch(config.retrain.stages[stage.name]) > 1:
            cut = config.retrain.stages[stage.name].accumulation or config.trainer.accumulation
            ways.append("lower trainer.pass_tokens" if cut is None else "raise trainer.accumulation")
        if not config.trainer.gradient_checkpointing:
            ways.append("set trainer.gradient_checkpointing=true")
        if ways:
            return ", or ".join(ways)
        if too_long:
            return "lower retrain.length"
    if too_long:
        batch = "eval.batch" if stage.kind == "evaluation" else "calibration_domains.batch"
        return f"lower {batch}"
    of_tokens = place == "host" and largest.startswith("refinement")
    if largest.startswith("hidden states") or of_tokens:
        limited = stage.kind == "experts" and config.calibration_domains.group_samples is not None
        lower = f"lower calibration_domains.{'group_samples' if limited else 'samples'}"
        return f"{lower}, or set moe=plain" if of_tokens else lower
    if largest.startswith("second moments"):
        return "lower moe.experts, or set pruning.compensation=none"
    if largest.startswith(("Adam", "gradients")) and any(
        part.train.experts is Freezing.full for part in config.retrain.stages.values()
    ):
        return "set retrain=lora"
    if plan.job.weight == 4:
        return "set model.dtype=bfloat16, raise pruning.ratio or lower moe.experts"
    return f"raise pruning.ratio ({config.pruning.ratio}) or lower moe.experts ({config.moe.experts})"


def refuse(plan: Plan, capacity: Capacity) -> None:
    """Stop a run that has no room, unless ``plan.enforce=false``.

    Raises:
        UserError: says what there is too little of, and which override mends it.
    """
    found = shortages(plan, capacity)
    if found and plan.job.config.plan.enforce:
        raise UserError(f"{found[0]} (plan.enforce=false runs it all the same)")
