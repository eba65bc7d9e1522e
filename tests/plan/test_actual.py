"""Planned against actual."""

import resource
from pathlib import Path

from dive.model.architecture import locate_architecture
from dive.plan.actual import Meter, peak_host
from dive.plan.stages import plan
from dive.store import Artifact
from tests.model.test_architecture import typed


def test_artifacts_find_their_stage(tmp_path: Path) -> None:
    config = typed("affinity=mined", "retrain=two_stages")
    meter = Meter(plan(config, locate_architecture(config.model)))
    (tmp_path / "file").write_bytes(bytes(10))
    stages = [
        "evaluation",
        "calibration",
        "mining",
        "mining",
        "pruned",
        "reconstructed",
        "evaluation",
        "router",
        "retrain",
        "nowhere planned",
    ]
    for number, stage in enumerate(stages):
        meter.record(stage, Artifact("key", tmp_path, float(number), reused=stage == "mining"))
    meter.exported(tmp_path, 100.0)
    found = meter.summary()
    assert {stage.name: stage.seconds for stage in found.stages} == {
        "evaluation": 0.0 + 6.0,
        "calibration": 1.0,
        "mining": 2.0 + 3.0,
        "pruned": 4.0,
        "reconstructed": 5.0,
        "router": 7.0,
        "retrain": 8.0,
        "export": 100.0,
    }
    assert [stage.name for stage in found.stages if stage.reused] == ["mining"]
    assert found.disk_bytes == 100
    assert found.seconds == 136.0
    assert "of host memory" in meter.line()


def test_peak_memory_is_in_bytes() -> None:
    status = Path("/proc/self/status")
    if status.is_file():
        high = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
        assert abs(peak_host() - high) < 0.1 * high
    assert peak_host() >= resource.getpagesize()
