"""What a Mixture-of-Experts gains over its dense model when it is served: reading a prompt, writing 1, 8 and 32 sequences.

    python -m benchmarks.serving                                                       # transformers, SmolLM2's shape
    python -m benchmarks.serving --engines transformers vllm llama_cpp --vllm PYTHON --llama-cpp-python PYTHON --llama-cpp DIR

A dense Llama of random weights and the Mixtral that this package would export of it (top-1 of 8 experts, each a quarter of the
FFN wide) are saved in ``--output`` and timed in each engine: transformers and vLLM in float32 on a CPU and in the type on disk on
a GPU, llama.cpp in each of ``--types``. The two take turns in every round; vLLM alone holds one in a process. Printed are the
medians of the rounds in tokens a second, their ratio, and the ideal: how many times fewer weights a token is multiplied by. More
sequences at once reach more experts, so that writing them cannot stay at that ideal where reading weights is what takes the time.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks import serving_worker
from benchmarks.shapes import SHAPES, llama_config
from benchmarks.timing import machine
from dive.engines import quantiser
from dive.engines.compare import convert, environment
from dive.model.architecture import EMBEDDED
from dive.progress import show

EXPERTS, SHARE = 8, 4
"""Experts of a layer; the dense FFN is so many times as wide as one of them."""


def mixtral_config(shape: str) -> MixtralConfig:
    """Of the Mixture-of-Experts of a dense shape."""
    dense = llama_config(shape).to_dict()
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    return MixtralConfig(
        **{name: dense[name] for name in names},
        intermediate_size=dense["intermediate_size"] // SHARE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        max_position_embeddings=dense["max_position_embeddings"],
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def multiplied(shape: str, *, sparse: bool, head: bool = True) -> int:
    """Weights that one token is multiplied by: all but the embedding, of the FFN those of one expert and the router.

    Args:
        head: with the head's, which the last token of a prompt alone is multiplied by.
    """
    s = SHAPES[shape]
    hidden, channels, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    keys = 2 * hidden * s["num_key_value_heads"] * hidden // s["num_attention_heads"]
    ffn = 3 * hidden * channels // SHARE + EXPERTS * hidden if sparse else 3 * hidden * channels
    return int(layers * (2 * hidden**2 + keys + ffn) + (hidden * s["vocab_size"] if head else 0))


def ideal(shape: str, *, head: bool = True) -> float:
    """How many times fewer weights a token is multiplied by in the Mixture-of-Experts."""
    return multiplied(shape, sparse=False, head=head) / multiplied(shape, sparse=True, head=head)


def save_models(shape: str, directory: Path, dtype: torch.dtype, seed: int) -> dict[str, Path]:
    """{"dense", "moe": directory} of random weights, with the embedded tokenizer; what is there already is kept."""
    torch.manual_seed(seed)
    found = {}
    for name, kind, config in (
        ("dense", LlamaForCausalLM, llama_config(shape)),
        ("moe", MixtralForCausalLM, mixtral_config(shape)),
    ):
        found[name] = directory / f"{shape}-{name}"
        if not (found[name] / "tokenizer.json").is_file():
            config.bos_token_id, config.eos_token_id = 0, 1
            kind(config).to(dtype).save_pretrained(found[name])
            AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(found[name])
    return found


def gguf_files(models: dict[str, Path], kind: str, options: argparse.Namespace) -> dict[str, Path]:
    """The same as GGUF files of an element type, ``f16`` or one that llama.cpp quantises to."""
    found = {}
    for name, directory in models.items():
        first, file = directory / "model-f16.gguf", directory / f"model-{kind}.gguf"
        if not first.is_file():
            trouble = convert(options.llama_cpp.resolve(), directory, first, 3600)
            if trouble is not None:
                raise SystemExit(f"error: {trouble}")
        if not file.is_file():
            request = {"source": str(first), "output": str(file), "scheme": kind}
            call(options.llama_cpp_python, quantiser.__file__, "llama_cpp", request, directory)
        found[name] = file
    return found


def call(python: str, script: str, name: str, request: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The answer of a script run by another interpreter."""
    asking, answering = directory / "request.json", directory / "answer.json"
    asking.write_text(json.dumps(request), encoding="utf-8")
    command = [python, script, name, str(asking), str(answering)]
    done = subprocess.run(command, env=environment(python), capture_output=True, text=True, check=False)
    if done.returncode or not answering.is_file():
        raise SystemExit(f"error: {name} ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(answering.read_text(encoding="utf-8"))
    answering.unlink()
    return found


def timed(engine: str, kind: str, models: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Version and seconds of both models in an engine."""
    sizes: dict[str, Any] = {
        name: getattr(options, name) for name in ("prompt", "batches", "context", "steps", "rounds", "threads")
    }
    sizes |= {"vocabulary": SHAPES[options.shape]["vocab_size"], "kind": kind}
    python = {"vllm": options.vllm, "llama_cpp": options.llama_cpp_python}.get(engine, sys.executable)
    groups = [{name: place} for name, place in models.items()] if engine == "vllm" else [models]
    found: dict[str, Any] = {"seconds": {}}
    for group in groups:
        places = {name: str(place) for name, place in group.items()}
        answer = call(python, serving_worker.__file__, engine, sizes | {"checkpoints": places}, options.output)
        found = {"version": answer["version"], "seconds": found["seconds"] | answer["seconds"]}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Save, time, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--engines", nargs="+", choices=serving_worker.ENGINES, default=["transformers"])
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"], help="element types in llama.cpp")
    parser.add_argument(
        "--experts", nargs="+", default=[""], help="experts implementations in transformers; its own choice if none"
    )
    parser.add_argument("--vllm", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--llama-cpp-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's sources")
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are read at once")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences that are written at once")
    parser.add_argument("--context", type=int, default=32, help="tokens that each of them has before")
    parser.add_argument("--steps", type=int, default=16, help="tokens that each of them gets")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="of the weights on disk"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/serving"))
    options = parser.parse_args(arguments)
    if "llama_cpp" in options.engines and options.llama_cpp is None:
        parser.error("llama_cpp needs --llama-cpp DIR, its sources")
    options.output.mkdir(parents=True, exist_ok=True)
    models = save_models(options.shape, options.output, options.dtype, options.seed)
    titles = {"prefill": f"reads {options.prompt} tokens"} | {
        f"decode {n}": f"writes {n} at once" for n in options.batches
    }
    tokens = {"prefill": options.prompt} | {f"decode {n}": n * options.steps for n in options.batches}
    device = torch.device("cuda") if torch.cuda.is_available() else None
    torch.set_num_threads(options.threads)
    ideals = f"ideal {ideal(options.shape, head=False):.2f} for reading, {ideal(options.shape):.2f} for writing"
    table = Table(title=f"{options.shape}, tokens a second, dense → top-1 of {EXPERTS}; {ideals}; {machine(device)}")
    table.add_column("engine")
    for title in titles.values():
        table.add_column(title, justify="right")
    for engine in options.engines:
        for kind in {"llama_cpp": options.types, "transformers": options.experts}.get(engine, [""]):
            served = gguf_files(models, kind, options) if engine == "llama_cpp" else models
            found = timed(engine, kind, served, options)
            rates = {
                name: {what: tokens[what] / statistics.median(values) for what, values in each.items()}
                for name, each in found["seconds"].items()
            }
            cells = [
                f"{rates['dense'][what]:.0f} → {rates['moe'][what]:.0f} ({rates['moe'][what] / rates['dense'][what]:.2f} ×)"
                for what in titles
            ]
            table.add_row(f"{engine} {found['version']} {kind}".strip(), *cells)
            print(f"{engine} {kind}: {', '.join(cells)}", file=sys.stderr, flush=True)
    show(table)


if __name__ == "__main__":
    main()
