"""What the loggers wrote, read back."""

from pathlib import Path

import pytest

from dive.logger.build import wandb_logged_in
from tests.workplace import Workplace


def test_tensorboard_has_the_same_scalars(workplace: Workplace) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = workplace.run("board", "logger=tensorboard", f"store={workplace.root / 'board-store'}")
    events = event_accumulator.EventAccumulator(str(workplace.root / "board/tensorboard/retrain"))
    events.Reload()
    assert {"retrain/loss", "retrain/perplexity", "retrain/router_entropy/layer_01"} <= set(events.Tags()["scalars"])
    measured = event_accumulator.EventAccumulator(str(workplace.root / "board/tensorboard/eval"))
    measured.Reload()
    assert [(e.step, e.value) for e in measured.Scalars("eval/dense/mean")] == [
        (0, pytest.approx(results["stages"][0]["perplexity"]["mean"]))
    ]
    (last,) = measured.Scalars("eval/retrain/mean")
    assert last.step == sum(stage["tokens"] for stage in results["stages"])


def test_login_is_found_without_asking_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert not wandb_logged_in()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_logged_in()
