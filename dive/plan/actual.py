"""What a run took, beside what was planned."""

import contextlib
import resource
import sys
from pathlib import Path

from dive.plan.stages import Plan
from dive.results import Spent, SpentStage
from dive.store import Artifact, files_below
from dive.units import duration, size


class Meter:
    """Time, peak memory and disk of every planned stage, as its artifacts come out of the store."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._planned = {stage.name for stage in plan.stages}
        self._peak = 0
        self.stages: dict[str, SpentStage] = {}

    def record(self, stage: str, artifact: Artifact) -> None:
        """Add an artifact that a stage has made or found."""
        if stage in self._planned:
            self._add(stage, artifact.seconds, artifact.path, reused=artifact.reused)

    def exported(self, directory: Path, seconds: float) -> None:
        """Take note of the exported model."""
        self._add("export", seconds, directory, reused=False)

    def _add(self, name: str, seconds: float, directory: Path, *, reused: bool) -> None:
        none = SpentStage(name=name, reused=True, seconds=0.0, host_bytes=0, device_bytes=0, disk_bytes=0)
        found = self.stages.setdefault(name, none)
        found.seconds += seconds
        found.reused = found.reused and reused
        found.host_bytes = max(found.host_bytes, self._peak_since_last())
        found.device_bytes = max(found.device_bytes, _peak_device_since_last())
        found.disk_bytes += sum(state.st_size for _, state in files_below(directory))

    def _peak_since_last(self) -> int:
        peak = peak_host()
        self._peak = max(self._peak, peak)
        with contextlib.suppress(OSError):  # Linux alone: elsewhere it is the peak from the process's start on
            Path("/proc/self/clear_refs").write_text("5")
        return peak

    def summary(self) -> Spent:
        """For the results; ``host_bytes`` of a stage is this process's peak within it."""
        stages = list(self.stages.values())
        return Spent(
            host_bytes=max(self._peak, peak_host()),
            device_bytes=max((stage.device_bytes for stage in stages), default=0),
            disk_bytes=sum(stage.disk_bytes for stage in stages),
            seconds=sum(stage.seconds for stage in stages),
            stages=stages,
        )

    def line(self) -> str:
        """Planned and actual in one line."""
        actual = self.summary()
        memory = f"{size(self.plan.host)} and {size(actual.host_bytes)} of host memory"
        if self.plan.job.on_gpu:
            memory += f", {size(self.plan.device)} and {size(actual.device_bytes)} of the device's"
        disk = self.plan.store + self.plan.export
        return (
            f"{memory}; {size(disk)} and {size(actual.disk_bytes)} of disk; {duration(self.plan.seconds)} on "
            f"{self.plan.job.place} and {duration(actual.seconds)} here"
        )


def peak_host() -> int:
    """Peak resident memory of this process since its start or since it was last set back, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_since_last() -> int:
    import torch

    if not torch.cuda.is_initialized():
        return 0
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
