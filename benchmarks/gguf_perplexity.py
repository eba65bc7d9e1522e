"""Turn an export into GGUF files and compare their perplexity with that of transformers on the same tokens.

    python -m benchmarks.gguf_perplexity --llama-cpp DIR                    # a tiny export of the embedded model, made here
    python -m benchmarks.gguf_perplexity --llama-cpp DIR --checkpoint DIR   # yours

Needs ``pip install llama-cpp-python sentencepiece`` and a directory of llama.cpp's sources for its converter: a clone, or
``vendor/llama.cpp`` of llama-cpp-python's source distribution. The files stay in ``--output``. Exits with 1 if the
unquantised file differs from transformers by more than 1%, or if llama.cpp cuts a document into other tokens.
"""

import argparse
import importlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import dive
from dive.calibration_domains.embedded import embedded_texts
from dive.calibration_domains.sampling import evaluation_windows
from dive.engines.gguf import CONVERTER, convert, pre_tokenizer
from dive.engines.quantiser import quantise_gguf
from dive.eval.perplexity import perplexity
from dive.model.load import document_tokens
from dive.progress import show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERANCE = 0.01
"""Largest relative difference of the unquantised file's perplexity."""
DOMAINS = ("python_code", "language_reference", "c_headers", "arithmetic")


def tiny_export(directory: Path) -> Path:
    """Four experts of 256 channels (of 768) from the embedded model, one for each of four embedded domains."""
    model, tokenizer = dive.load_dense("embedded", device="cpu")
    tokens = {
        name: evaluation_windows(train, partial(document_tokens, tokenizer), length=128, windows=16, name=name)
        for name, (train, _) in embedded_texts(DOMAINS).items()
    }
    statistics = dive.collect_statistics(model, tokens)
    moe = dive.reconstruct(model, list(statistics.values()), ratio=2 / 3, top_k=2, width_multiple=256)
    return dive.save(moe, tokenizer, directory, card="# Embedded model, four experts\n")


def measure(
    file: Path, windows: Tensor, documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[float, int]:
    """(perplexity over windows (N, T), documents that llama.cpp cuts into other tokens than ``tokenizer``)."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=windows.shape[1], n_gpu_layers=0, logits_all=True, verbose=False)
    total = 0.0
    for row in windows:
        model.reset()
        model.eval(row.tolist())
        logits = torch.from_numpy(model.scores[: len(row) - 1])
        total += float(functional.cross_entropy(logits, row[1:], reduction="sum"))
    differ = 0
    for document in documents:
        expected = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        differ += model.tokenize(document.encode(), add_bos=False, special=True) != expected
    return math.exp(total / windows[:, 1:].numel()), differ


def tensor_types(file: Path) -> str:
    """How many tensors are stored in which type, such as ``F32 11, Q4_K 5``."""
    gguf: Any = importlib.import_module("gguf")
    return ", ".join(
        f"{n} {t}" for t, n in sorted(Counter(x.tensor_type.name for x in gguf.GGUFReader(file).tensors).items())
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, quantise, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's sources")
    parser.add_argument("--checkpoint", type=Path, help="export to convert; a tiny one is made if left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/gguf"), help="directory of the GGUF files")
    parser.add_argument("--base", default="f16", choices=("f32", "f16", "bf16"), help="type of the unquantised file")
    parser.add_argument("--quantise", nargs="*", default=["q8_0", "q4_k_m"], help="types of the quantised files")
    parser.add_argument("--pre", help="llama.cpp's pre-tokenizer for a tokenizer its converter does not know")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--windows", type=int, default=4, help="windows of each embedded domain's test text")
    options = parser.parse_args(arguments)
    if not (options.llama_cpp / CONVERTER).is_file():
        parser.error(f"--llama-cpp {options.llama_cpp}: no {CONVERTER} in this directory")

    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoint or tiny_export(options.output / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenize, texts = partial(document_tokens, tokenizer), embedded_texts(DOMAINS)
    documents = [text for _, test in texts.values() for text in test]
    windows = torch.cat(
        [
            evaluation_windows(test, tokenize, length=options.length, windows=options.windows, name=name)
            for name, (_, test) in texts.items()
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    reference = perplexity(model, windows, batch=4)

    table = Table(title=f"{model.config.architectures[0]}, {windows.numel():,} tokens")
    for name in ("file", "MB", "perplexity", "difference", "documents tokenised otherwise", "tensors"):
        table.add_column(name, justify="left" if name in ("file", "tensors") else "right")
    table.add_row("transformers, float32", "", f"{reference:.4f}", "", "", "")
    base = options.output / f"model-{options.base}.gguf"
    convert(options.llama_cpp, checkpoint, base, pre=options.pre or pre_tokenizer(checkpoint))
    good = True
    for kind in (options.base, *options.quantise):
        file = options.output / f"model-{kind}.gguf"
        if file != base:
            quantise_gguf(str(base), str(file), kind)
        found, differ = measure(file, windows, documents, tokenizer)
        difference = found / reference - 1
        good &= differ == 0 and (file != base or abs(difference) <= TOLERANCE)
        size = file.stat().st_size / 1e6
        row = (f"{size:.1f}", f"{found:.4f}", f"{difference:+.3%}", f"{differ} of {len(documents)}", tensor_types(file))
        table.add_row(file.name, *row)
    show(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
