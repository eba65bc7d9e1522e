"""SIGKILL at random moments, then the same command again: does the run end with the results of an undisturbed one?

    python benchmarks/kills.py                          # 30 kills on a tiny random Llama
    python benchmarks/kills.py --kills 5 model=tiny     # any overrides

Each kill begins with an empty store, at a moment drawn evenly from the length of an undisturbed run. Compared are the
exported weights bit for bit, every perplexity of every stage, and the logged losses. Prints a line a kill and one table;
exits with 1 if any result differs. Runs are forked from this process, which has imported everything: a moment in the
imports would prove nothing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import dive.pipeline
from dive.store import MANIFEST
from dive.train import main as train

SETTINGS = [
    "calibration_domains.domains=[arithmetic,calendar,unicode_names]",
    "calibration_domains.samples=6",
    "calibration_domains.length=64",
    "affinity.samples=2",
    "moe=plain",
    "moe.experts=2",
    "moe.distillation.steps=40",
    "pruning.ratio=0.5",
    "eval.lengths=[64]",
    "eval.windows=6",
    "retrain=two_stages",
    "retrain.length=32",
    "retrain.checkpoint_every=2",
    "retrain.log_every=2",
    "retrain.stages.router.tokens=10240",
    "retrain.stages.retrain.tokens=30720",
    "logger=csv",
]


def tiny(directory: Path) -> None:
    """A dense Llama of two layers with seeded random weights and the embedded model's tokenizer."""
    from dive.model.architecture import EMBEDDED

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, directory / name)


def start(out: Path, overrides: list[str]) -> int:
    """Fork a run; its process id."""
    from dive.cli import run
    from dive.config import Config

    child = os.fork()
    if child:
        return child
    os.setsid()
    with (out / "log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.argv = ["dive.train", *overrides]
    code = 1
    try:
        run(train, "config", Config)
        code = 0
    except SystemExit as end:
        print(end)
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Exit code of a run, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(out: Path) -> dict[str, object]:
    """What must not depend on interruptions."""
    results = json.loads((out / "run/results.json").read_text())
    curves = [load_file(f) for f in sorted((out / "store").glob("retrained/*/curve.safetensors"))]
    return {
        "groups": results["groups"],
        "perplexity": [(stage["name"], stage["perplexity"]) for stage in results["stages"]],
        "curves": [{k: v.tolist() for k, v in curve.items() if k != "seconds"} for curve in curves],
        "weights": {
            name: (tuple(t.shape), str(t.dtype), t.contiguous().view(torch.uint8).numpy().tobytes())
            for name, t in load_file(out / "run/checkpoint/model.safetensors").items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny(root / "dense")
        model = ["model=local", f"model.path={root / 'dense'}", "budget=toy", "eval=default"]
        model += ["calibration_domains=embedded", "trainer=cpu"]

        def command(name: str) -> tuple[Path, list[str]]:
            out = root / name
            out.mkdir()
            return out, [
                *model,
                *SETTINGS,
                *options.overrides,
                f"store={out / 'store'}",
                f"hydra.run.dir={out / 'run'}",
            ]

        out, overrides = command("undisturbed")
        begin = time.monotonic()
        if finish(start(out, overrides)) != 0:
            sys.exit((out / "log").read_text()[-2000:])
        length = time.monotonic() - begin
        expected = outcome(out)
        print(f"undisturbed: {length:.1f} s", flush=True)
        killed, different, resumed = 0, 0, 0
        while killed < options.kills:
            out, overrides = command(f"kill-{killed}")
            moment = draw.uniform(0, length)
            child = start(out, overrides)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            if finish(child) != -signal.SIGKILL:  # it was faster than the first run
                shutil.rmtree(out)
                continue
            killed += 1
            there = len(list((out / "store").glob(f"*/*/{MANIFEST}")))
            code = finish(start(out, overrides))
            log = (out / "log").read_text()
            found = outcome(out) if code == 0 else {}
            wrong = [name for name, value in expected.items() if found.get(name) != value]
            left = [str(p.relative_to(out)) for p in out.rglob(".*-*")] + [p.name for p in out.glob("store/partial/*")]
            different += bool(wrong or left)
            resumed += "going on from" in log
            print(
                f"kill {killed:2d} after {moment:5.1f} s, {there:2d} artifacts there, "
                f"{'from a checkpoint' if 'going on from' in log else ''}: "
                + (
                    f"exit {code}, DIFFERENT {wrong}, left over {left}\n{log[-1500:]}" if wrong or left else "identical"
                ),
                flush=True,
            )
            shutil.rmtree(out)
        print(
            f"{killed} kills, {resumed} went on from a checkpoint, {killed - different} identical, {different} different"
        )
        sys.exit(different > 0)


if __name__ == "__main__":
    assert dive.pipeline
    main()
