"""What goes wrong around a run: each ends in one clear line and an exit code that is not zero, or in recovery."""

import json
import multiprocessing
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dive import preemption
from dive.errors import UserError
from dive.model.load import load_tokenizer, locate_dense
from dive.retrain.stage import find_checkpoint
from dive.store import Place, Store
from tests.workplace import Workplace, environment

LONG = ("retrain.stages.retrain.tokens=204800", "retrain.checkpoint_every=97")
"""400 steps, and a checkpoint after 97, 194, 291 and 388 of them."""


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for a run that must end with this code and without a traceback; its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output[-3000:]
    assert "Traceback" not in output
    return output


def refused(process: "subprocess.Popen[str]", message: str) -> None:
    """The run ends with 1, and its last line says why."""
    last = finish(process, 1).strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last


def read_until(process: "subprocess.Popen[str]", said: str) -> str:
    """Output of a run up to the line with these words."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(said, line):
            return "".join(lines)
    raise AssertionError("".join(lines)[-3000:])


def exported(workplace: Workplace, name: str) -> dict[str, torch.Tensor]:
    """Weights that a run exported."""
    return load_file(workplace.root / name / "checkpoint/model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two exports are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def perplexities(workplace: Workplace, name: str) -> list[dict[str, float]]:
    """Of every stage of a run."""
    results = json.loads((workplace.root / name / "results.json").read_text())
    return [stage["perplexity"] for stage in results["stages"]]


# -------------------------------------------------------------------------------------------------------------- the model


def cut_the_shard_short(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def break_the_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 64)


def leave_a_dangling_link(model: Path) -> None:
    (model / "model-00002.safetensors").symlink_to(model / "gone")


def lose_a_shard(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_the_weights(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(settings | changes))

    return change


def cut_the_config_short(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "lla')


def enlarge_the_tokenizer(model: Path) -> None:
    """One token with an id far beyond the embeddings, and a gap before it."""
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["model"]["vocab"]["zebra"] = 5000
    (model / "tokenizer.json").write_text(json.dumps(settings))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (cut_the_shard_short, r"model\.safetensors cannot be read or is truncated"),
    "unreadable header": (break_the_header, r"model\.safetensors cannot be read or is truncated"),
    "dangling link": (leave_a_dangling_link, r"model-00002\.safetensors cannot be read"),
    "missing shard": (lose_a_shard, r"1 shards that .*index\.json lists are missing"),
    "pickled weights alone": (pickle_the_weights, r"only pickled weights \(\.bin\).*python -c .*save_pretrained"),
    "unsupported family": (
        change_config(model_type="gpt2"),
        r"model_type 'gpt2' is not supported; choose one of llama",
    ),
    "unknown family": (
        change_config(model_type="nobodys"),
        r"model_type 'nobodys' is not supported; choose one of llama",
    ),
    "truncated config.json": (cut_the_config_short, r"config\.json cannot be read"),
    "tokenizer beyond the vocabulary": (
        enlarge_the_tokenizer,
        r"token ids up to 5000, its config\.json vocab_size=320",
    ),
    "weights of another shape": (change_config(intermediate_size=64), r"of another shape"),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_broken_model_is_refused(workplace: Workplace, tmp_path: Path, fault: str) -> None:
    breaks, message = MODELS[fault]
    shutil.copytree(workplace.root / "dense", tmp_path / "model")
    breaks(tmp_path / "model")
    overrides = (f"model.path={tmp_path / 'model'}", f"store={tmp_path / 'store'}")
    if fault == "truncated shard":
        refused(workplace.start("broken", *overrides), message)  # as a user sees it
    if fault == "weights of another shape":
        with pytest.raises(UserError, match=message):
            workplace.run("broken", *overrides)
    else:
        with pytest.raises(UserError, match=message):
            load_tokenizer(locate_dense(str(tmp_path / "model")))  # before any text is read or weight loaded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"dense: the perplexity of \w+@32 is nan: .*; set model.dtype=float32"),
        (
            ("model.load=streamed", "affinity=default"),
            r"layer 0: .* not finite; set model.dtype=float32",
        ),
    ],
    ids=["full", "streamed"],
)
def test_weights_that_are_not_finite_are_named(
    untrained: Workplace, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    shutil.copytree(untrained.root / "dense", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        untrained.run(
            "nan", "retrain=none", f"model.path={tmp_path / 'model'}", f"store={tmp_path / 'store'}", *overrides
        )


# -------------------------------------------------------------------------------------------------------------- the texts


TEXTS = {
    "no text": ("train.jsonl", b'{"text": "  "}\n\n', "holds no text"),
    "empty file": ("test.jsonl", b"", "holds no text"),
    "binary file": ("train.txt", b"\x00\x01\x02 cats", "is a binary file"),
    "binary parquet": ("train.parquet", b"PAR1\x00\x01", "not a readable parquet file"),
    "invalid UTF-8": ("train.jsonl", b'{"text": "caf\xe9"}\n', r"is not UTF-8 text \(byte"),
    "half a surrogate": ("train.jsonl", b'{"text": "\\ud800 cats"}\n', "half a surrogate pair"),
    "cut short": ("test.jsonl", b'{"text": "cats"}\n{"text": "ca', r"test\.jsonl:2 is not JSON"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_broken_domain_is_refused(workplace: Workplace, tmp_path: Path, fault: str) -> None:
    name, data, message = TEXTS[fault]
    shutil.copytree(workplace.root / "domains", tmp_path / "domains")
    split = name.partition(".")[0]
    (tmp_path / f"domains/cats/{split}.jsonl").unlink()
    (tmp_path / f"domains/cats/{name}").write_bytes(data)
    overrides = (f"calibration_domains.path={tmp_path / 'domains'}", f"store={tmp_path / 'store'}")
    if fault == "invalid UTF-8":
        refused(workplace.start("texts", *overrides), message)
    with pytest.raises(UserError, match=f"cats/{re.escape(name)}.*{message}" if ":" not in message else message):
        workplace.run("texts", *overrides)


# -------------------------------------------------------------------------------------------------------------- the store


def limit_files(size: int) -> Callable[[], None]:
    """For a child process: writing beyond ``size`` bytes of a file fails, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tokenised", "message"),
    [
        (16_000, False, r"store=.*: writing experts failed"),
        (100_000, False, r"store=.*: writing tokens failed"),
        (40_000, True, r"store=.*: writing retrained failed|checkpoint cannot be written"),
        (100_000, True, r"checkpoint cannot be written"),
    ],
)
def test_a_full_disk_is_named_and_recovered_from(
    workplace: Workplace, tmp_path: Path, size: int, tokenised: bool, message: str
) -> None:
    finish(workplace.start("whole"))
    name, store = f"full-{size}-{tokenised}", f"store={tmp_path}"
    if tokenised:  # another training has left the tokens there
        rates = [f"retrain.stages.{stage}.learning_rate=1e-5" for stage in ("router", "retrain")]
        finish(workplace.start(f"{name}-before", store, *rates))
    command = workplace.command(name, store)
    settings = {"cwd": workplace.root, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    refused(subprocess.Popen(command, text=True, preexec_fn=limit_files(size), **settings), message)  # type: ignore[call-overload]
    assert not list(tmp_path.rglob(".*-*"))
    finish(workplace.start(name, store))
    assert same(exported(workplace, "whole"), exported(workplace, name))


def test_a_damaged_entry_is_computed_again(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = f"store={tmp_path}"
    workplace.run("sound", store)
    for kind in ("experts", "retrained"):
        for file in tmp_path.glob(f"{kind}/*/*.safetensors"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(bytes(data))
    with caplog.at_level("INFO", logger="dive"):
        workplace.run("mended", store)
    assert sum("is damaged and will be computed again" in r.getMessage() for r in caplog.records) == 4
    assert same(exported(workplace, "sound"), exported(workplace, "mended"))
    assert perplexities(workplace, "sound") == perplexities(workplace, "mended")


def compute(root: Path, log: Path, seconds: float) -> None:
    def slowly(place: Place) -> None:
        directory = place.directory
        with log.open("a") as lines:
            lines.write("begun\n")
        (directory / "half").write_text("half")
        time.sleep(seconds)
        (directory / "half").rename(directory / "whole")

    Store(root).get("masks", {}, slowly)


def test_a_job_that_is_killed_lets_the_waiting_one_compute(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    first = context.Process(target=compute, args=(tmp_path / "store", log, 1000.0))
    first.start()
    while not log.is_file():
        time.sleep(0.01)
    second = context.Process(target=compute, args=(tmp_path / "store", log, 0.0))
    second.start()
    time.sleep(0.3)
    assert log.read_text() == "begun\n"  # the second one waits
    first.kill()
    second.join(30)
    assert second.exitcode == 0
    assert log.read_text() == "begun\nbegun\n"
    found = Store(tmp_path / "store").find("masks", {})
    assert found is not None
    assert [file.name for file in found.path.iterdir() if file.name != "manifest.json"] == ["whole"]
    assert not list((tmp_path / "store/masks").glob(".*"))  # what the killed one left is gone


@pytest.mark.slow
def test_four_jobs_on_an_empty_store_compute_each_artifact_once(workplace: Workplace, tmp_path: Path) -> None:
    jobs = [workplace.start(f"job{number}", f"store={tmp_path}") for number in range(4)]
    computed = [line for job in jobs for line in re.findall(r"(\w+ \w{8}): computing", finish(job))]
    assert len(computed) == len(set(computed))
    assert {line.split()[0] for line in computed} >= {"statistics", "matrix", "groups", "experts", "retrained"}
    for number in range(1, 4):
        assert same(exported(workplace, "job0"), exported(workplace, f"job{number}"))


def test_a_checkpoint_that_is_cut_short_is_left_aside(tmp_path: Path) -> None:
    torch.save({"dive": {}}, tmp_path / "step=2.ckpt")
    (tmp_path / "step=4.ckpt").write_bytes((tmp_path / "step=2.ckpt").read_bytes()[:-100])
    assert find_checkpoint("last", tmp_path, "retrain") == tmp_path / "step=2.ckpt"
    (tmp_path / "step=2.ckpt").unlink()
    assert find_checkpoint("last", tmp_path, "retrain") is None


# ------------------------------------------------------------------------------------------------------------ the signals


@pytest.mark.slow
def test_a_signal_outside_training_ends_the_run_at_once(workplace: Workplace, tmp_path: Path) -> None:
    process = workplace.start("early", f"store={tmp_path}", "moe.distillation.steps=200000")
    read_until(process, "experts .*: computing")
    begin = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    read_until(process, r"stopped by SIGUSR1 \(exit code 75\)\. The same command goes on")
    assert time.monotonic() - begin < 10
    finish(process, preemption.EXIT_CODE)
    assert not list(tmp_path.rglob(".*-*"))
    assert list(tmp_path.glob("evaluation/*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "hardware"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGUSR1, ("trainer.accumulation=2",)),
        (signal.SIGTERM, ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")),
        (
            signal.SIGUSR1,
            ("trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"),
        ),
    ],
    ids=["one", "accumulating", "ddp", "fsdp2"],
)
def test_a_signal_in_training_saves_a_checkpoint(
    workplace: Workplace, tmp_path: Path, number: signal.Signals, hardware: tuple[str, ...]
) -> None:
    name = hardware[0].partition("=")[2] if hardware else "one"
    finish(workplace.start(f"{name}-whole", f"store={tmp_path / 'a'}", *LONG, *hardware))
    process = workplace.start(f"{name}-stopped", f"store={tmp_path / 'b'}", *LONG, *hardware)
    read_until(process, "retrain: retrained .*: computing")
    while process.poll() is None and not list((tmp_path / "b").glob("partial/*/step=97.ckpt")):
        time.sleep(0.01)
    process.send_signal(number)
    output = finish(process, preemption.EXIT_CODE)
    assert output.count(f"stopped by {number.name} (exit code 75)") == 1
    (checkpoint,) = (tmp_path / "b").glob("partial/*/*.ckpt")
    assert int(checkpoint.stem.partition("=")[2]) not in (97, 194, 291, 388)  # the signal's own
    assert len(list((tmp_path / "b").glob("retrained/*/manifest.json"))) == 1  # the router stage alone
    output = finish(workplace.start(f"{name}-stopped", f"store={tmp_path / 'b'}", *LONG, *hardware))
    assert f"going on from {checkpoint}" in output
    assert same(exported(workplace, f"{name}-whole"), exported(workplace, f"{name}-stopped"))
    assert perplexities(workplace, f"{name}-whole") == perplexities(workplace, f"{name}-stopped")
    steps = [
        len(load_file(file)["loss"])
        for folder in ("a", "b")
        for file in sorted((tmp_path / folder).glob("retrained/*/curve.safetensors"))
    ]
    assert steps[:2] == steps[2:]


# --------------------------------------------------------------------------------------------------------- the processes


@pytest.mark.slow
def test_processes_wait_for_a_stage_that_another_job_computes(workplace: Workplace, tmp_path: Path) -> None:
    store = f"store={tmp_path}"
    first = workplace.start("other-job", store, *LONG)
    read_until(first, "retrain: retrained .*: computing")
    first.send_signal(signal.SIGSTOP)  # it goes on once the others have found that it computes this
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    hardware = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    command = [*torchrun, *workplace.command("two-processes", store, *LONG, *hardware)[2:]]
    settings = {"cwd": workplace.root, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    second = subprocess.Popen(command, text=True, **settings)  # type: ignore[call-overload]
    try:
        output = read_until(second, "retrained .*: another process computes it, waiting")
    finally:
        first.send_signal(signal.SIGCONT)
    output += finish(second)
    finish(first)
    assert "another process computes it, waiting" in output
    assert not re.search(r"retrained \w+: computing", output)
    assert same(exported(workplace, "other-job"), exported(workplace, "two-processes"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_loss_that_is_not_finite_stops_every_process(workplace: Workplace, tmp_path: Path, devices: int) -> None:
    wild = (
        *("retrain.stages.retrain.learning_rate=10", "trainer.gradient_clip=null", f"store={tmp_path}"),
        *("retrain.stages.retrain.tokens=51200", "retrain.stages.retrain.weight_decay=10"),
    )
    hardware = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    process = workplace.start(f"wild-{devices}", *wild, *(hardware if devices > 1 else ()))
    output = finish(process, 1)
    assert re.search(r"error: retrain\.stages\.retrain: the loss is (nan|inf) at step \d+; lower retrain", output)
    assert not list(tmp_path.rglob(".*-*"))


@pytest.mark.slow
def test_the_processes_of_a_killed_first_one_end(workplace: Workplace, tmp_path: Path) -> None:
    hardware = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    process = workplace.start("orphans", f"store={tmp_path}", *LONG, *hardware)
    read_until(process, "retrain: retrained .*: computing")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    time.sleep(1)
    process.kill()
    output, _ = process.communicate(timeout=60)  # ends when the last process that writes there has ended
    assert "Traceback" not in output
