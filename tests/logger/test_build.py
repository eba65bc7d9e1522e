"""What the loggers wrote, read back."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dive.logger.build import wandb_logged_in
from tests.workplace import Workplace


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    position, pending = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left  # padding at the end of a block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)  # after the checksum
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield pending
            pending = b""


def test_wandb_offline_run_holds_configuration_metrics_and_summary(workplace: Workplace) -> None:
    from wandb.proto import wandb_internal_pb2

    workplace.run("logged", "logger=[csv,wandb]")
    (file,) = (workplace.root / "logged").glob("wandb/offline-run-*/*.wandb")
    history, summary, settings = set(), set(), set()
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        history |= {".".join(item.nested_key) or item.key for item in record.history.item}
        summary |= {".".join(item.nested_key) or item.key for item in record.summary.update}
        settings |= {item.key for item in (*record.config.update, *record.run.config.update)}
    assert {"experts/loss", "experts/perplexity", "experts/tokens_per_second", "experts/learning_rate"} <= history
    assert {"experts/router_entropy/layer_01", "experts/expert_load/layer_00/expert_1"} <= history
    assert {"eval/dense/mean", "eval/experts/cats@32"} <= summary
    assert {"moe", "pruning", "retrain"} <= settings


def test_tensorboard_has_the_same_scalars(workplace: Workplace) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    workplace.run("board", "logger=tensorboard", f"store={workplace.root / 'board-store'}")
    events = event_accumulator.EventAccumulator(str(workplace.root / "board/tensorboard/experts"))
    events.Reload()
    assert {"experts/loss", "experts/perplexity", "experts/router_entropy/layer_01"} <= set(events.Tags()["scalars"])


def test_login_is_found_without_asking_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert not wandb_logged_in()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_logged_in()
