"""What the loggers wrote, read back."""

from pathlib import Path

import pytest

from dive.config import LoggerConfig, MLflowConfig, WandbConfig
from dive.logger.wandb_run import wandb_logged_in
from dive.train import name_job
from tests.workplace import Workplace


def test_tensorboard_has_the_same_scalars(workplace: Workplace) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = workplace.run("board", "logger=tensorboard", f"store={workplace.root / 'board-store'}")
    events = event_accumulator.EventAccumulator(str(workplace.root / "board/tensorboard/retrain"))
    events.Reload()
    assert {"retrain/loss", "retrain/perplexity", "retrain/router_entropy/layer_01"} <= set(events.Tags()["scalars"])
    measured = event_accumulator.EventAccumulator(str(workplace.root / "board/tensorboard/results"))
    measured.Reload()
    assert [(e.step, e.value) for e in measured.Scalars("dense/eval_perplexity/mean")] == [
        (0, pytest.approx(results["stages"][0]["perplexity"]["mean"]))
    ]
    (last,) = measured.Scalars("retrain/eval_perplexity/mean")
    assert last.step == sum(stage["tokens"] for stage in results["stages"])
    (final,) = measured.Scalars("final/perplexity")
    assert final.value == pytest.approx(last.value)
    (picture,) = measured.Images("figures/affinity")
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    (text,) = measured.Tensors("results/stages/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith("| stage | perplexity |")
    assert f"| retrain | {results['stages'][-1]['perplexity']['mean']:.4g} |" in said
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData()
    hparams.ParseFromString(measured.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    settings = hparams.session_start_info.hparams
    assert settings["moe.experts"].number_value == 2


def test_a_sweep_is_one_group_and_one_experiment_and_its_jobs_have_names() -> None:
    loggers = LoggerConfig(wandb=WandbConfig(), mlflow=MLflowConfig())
    name_job(loggers, "sweep there", "moe.experts=4")
    assert loggers.wandb is not None
    assert loggers.mlflow is not None
    assert (loggers.wandb.group, loggers.wandb.name) == ("sweep there", "moe.experts=4")
    assert (loggers.mlflow.experiment, loggers.mlflow.name) == ("sweep there", "moe.experts=4")
    mine = LoggerConfig(mlflow=MLflowConfig(experiment="mine", name="this"))
    name_job(mine, "sweep there", "moe.experts=4")
    assert mine.mlflow == MLflowConfig(experiment="mine", name="this")


def test_login_is_found_without_asking_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert not wandb_logged_in()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_logged_in()
