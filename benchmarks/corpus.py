r"""Time to go on in the middle of a retraining corpus, against tokenising it from its beginning.

    python -m benchmarks.corpus --blocks 1e4
    python -m benchmarks.corpus --blocks 1e6 --model DIR

Tokenises the embedded domains, round after round, up to a block and a little further, as a run does; then opens them anew at that
block in a fresh process, as a resumed run does, and reads a step's blocks. Prints one table. The store is a temporary directory
below `--folder`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.timing import machine
from dive.calibration_domains.texts import load_domains
from dive.cli import composed
from dive.config import StageText
from dive.model.load import load_tokenizer, tokens_of_documents
from dive.model.recipe import Dense
from dive.retrain.blocks import BlockRange, prepare_blocks
from dive.retrain.corpus import open_corpora
from dive.retrain.parts import BYTES
from dive.store import Store, WithStore
from dive.units import count, size

STEP = 64
"""Blocks of the step that is read."""


def opened(options: argparse.Namespace, first: int, stop: int, store: Path) -> tuple[float, float, list[int]]:
    """(seconds until the blocks are there, seconds until a step's are read, the tokens of its first block)."""
    model = ["model=tiny"] if options.model is None else ["model=local", f'model.path="{options.model}"']
    config = composed(
        [*model, "budget=toy", "calibration_domains=embedded", f"retrain.length={options.length}"]
    ).settled(gpu=False)
    dense = Dense.locate(config.model)
    tokenizer = load_tokenizer(dense.source)
    texts = {domain.name: domain.train for domain in load_domains(config.calibration_domains, seed=config.seed)}
    corpora = open_corpora(config.retrain, texts, [], partial(tokens_of_documents, tokenizer), seed=config.seed)
    start = time.monotonic()
    blocks = prepare_blocks(WithStore(Store(store)), corpora[StageText.corpus], model=dense, wanted=range(first, stop))
    ready = time.monotonic() - start
    read = [item["input_ids"] for item in BlockRange(blocks, first, min(first + STEP, stop))]
    return ready, time.monotonic() - start, read[0].tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=lambda text: int(float(text)), default=10_000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--model", help="directory or file whose tokenizer it is; the embedded model's if none")
    parser.add_argument("--folder", help="where the temporary store lies")
    parser.add_argument("--resume", nargs=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stop = options.blocks + STEP
    if options.resume:
        print(json.dumps(opened(options, options.blocks, stop, Path(options.resume[0]))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        whole, _, _ = opened(options, 0, stop, Path(folder))
        written = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.corpus", *(arguments or sys.argv[1:]), "--resume", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    ready, seconds, first = json.loads(done.stdout.splitlines()[-1])
    tokens = written // BYTES
    print(f"{machine()}; block {options.blocks} of {options.length} tokens\n")
    print("| from the beginning | tokens/s | on the disk | going on there | a step read | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(
        f"| {whole:.1f} s | {count(tokens / whole)} | {size(written)} | {ready:.2f} s | {seconds:.2f} s "
        f"| {whole / seconds:.0f} |"
    )
    assert len(first) == options.length


if __name__ == "__main__":
    main()
