"""Peak memory and time of calibration and reconstruction, against copying the bytes of the export.

    python benchmarks/reconstruction.py                        # TinyLlama's shape, 8 experts at 50%, streamed
    python benchmarks/reconstruction.py --check                # and its logits against the in-memory path's (10 GB)
    python benchmarks/reconstruction.py --shape small --load streamed full

Makes a dense model of the shape with seeded random weights (bfloat16) and runs `python -m dive.train` on it, each in a
process of its own, whose peak resident memory the kernel reports. Weights are computed in float32 and exported in
bfloat16. Prints one table.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from dive.errors import UserError
from dive.model.architecture import EMBEDDED
from dive.model.families import count_parameters
from dive.model.load import load_weights, locate_dense
from dive.model.shards import ShardWriter
from dive.moe.assemble import assemble
from dive.moe.layer import ExpertLayer

SHAPES = {
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                  "num_key_value_heads": 4, "vocab_size": 32000},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 32000},
}  # fmt: skip


def make_dense(shape: dict[str, int], directory: Path, *, seed: int) -> None:
    """Write a Llama of random weights and the embedded model's tokenizer, a tensor at a time."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, dtype=torch.bfloat16, shard_bytes=1 << 30)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape)
        writer.add(name, tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.02, generator=generator))
    writer.close()
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(directory)
    config.save_pretrained(directory)


def overrides(settings: argparse.Namespace, load: str, dense: Path) -> list[str]:
    """Of the run to measure."""
    return [
        *("model=local", f"model.path={dense}", f"model.load={load}", "model.dtype=float32", "model.device=cpu"),
        *("budget=toy", "eval=default", "trainer=cpu", "calibration_domains=embedded"),
        *("model.export_dtype=bfloat16", f"calibration_domains.samples={settings.samples}"),
        *(f"calibration_domains.length={settings.length}", "affinity=random", "retrain=none", "logger=csv"),
        *("moe=plain", f"moe.experts={settings.experts}", f"pruning.ratio={settings.ratio}", "pruning.metric=wifv"),
        *(f"moe.distillation.tokens={settings.router_tokens}", f"moe.distillation.steps={settings.router_steps}"),
        *(f"pruning.compensation={settings.compensation}", "eval.windows=1", f"seed={settings.seed}"),
    ]


def measured(command: list[str]) -> tuple[float, float]:
    """(peak resident memory in bytes, seconds) of a command.

    Raises:
        UserError: it fails.
    """
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(f"{' '.join(command)} ended with {child.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.monotonic() - start


def read_logits(directory: Path) -> NDArray[np.float32]:
    """Of the export, as any user loads it."""
    from transformers import MixtralForCausalLM

    model, report = MixtralForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    wrong = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise UserError(f"{directory} does not load whole: {wrong}")
    return logits(model)


def assembled_logits(dense: Path, experts: Path) -> NDArray[np.float32]:
    """Of the model that the in-memory path puts together from the same experts."""
    loaded = load_weights(locate_dense(str(dense)), dtype=torch.bfloat16, device=torch.device("cpu"))
    layers = (ExpertLayer(**load_file(file)) for file in sorted(experts.glob("layer_*.safetensors")))
    return logits(assemble(loaded, layers, top_k=1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> NDArray[np.float32]:
    """Of a few tokens; not as a tensor, whose memory would go with the process that it comes from."""
    found: torch.Tensor = model(input_ids=torch.arange(4)[None] * 997, use_cache=False).logits
    return found.float().numpy()


def check(dense: Path, store: Path, export: Path) -> float:
    """Largest difference between the logits of both paths, each in a process of its own."""
    (experts,) = (store / "experts").glob("[!.]*")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        ours = pool.submit(read_logits, export).result()
        theirs = pool.submit(assembled_logits, dense, experts).result()
    return float(np.abs(ours - theirs).max())


def size(directory: Path) -> int:
    """Bytes of the weights in a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--load", choices=("streamed", "full"), nargs="+", default=["streamed"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of every FFN's channels that goes")
    parser.add_argument("--compensation", choices=("least_squares", "none"), default="least_squares")
    parser.add_argument("--samples", type=int, default=1, help="calibration sequences of each of 16 domains")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--router-tokens", type=int, default=128, help="that each layer's router is fitted on")
    parser.add_argument("--router-steps", type=int, default=20, help="of that fit")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--check", action="store_true", help="compare the logits with the in-memory path's")
    parser.add_argument("--out", type=Path, default=Path("outputs/reconstruction"))
    settings = parser.parse_args()
    shape = SHAPES[settings.shape]
    shape["num_hidden_layers"] = settings.layers or shape["num_hidden_layers"]
    dense = settings.out / f"{settings.shape}-{shape['num_hidden_layers']}-{settings.seed}"
    if not (dense / "config.json").is_file():
        shutil.rmtree(dense, ignore_errors=True)
        make_dense(shape, dense, seed=settings.seed)
    parameters, _ = count_parameters(locate_dense(str(dense)).config)
    rows = []
    for load in settings.load:
        directory, store = settings.out / load, settings.out / f"store-{load}"
        for old in (directory, store):
            shutil.rmtree(old, ignore_errors=True)
        command = [sys.executable, "-m", "dive.train", *overrides(settings, load, dense)]
        peak, seconds = measured([*command, f"store={store}", f"hydra.run.dir={directory}"])
        results = json.loads((directory / "results.json").read_text())
        export = Path(results["export"])
        start = time.monotonic()
        shutil.copytree(export, settings.out / "copy")
        copying = time.monotonic() - start
        shutil.rmtree(settings.out / "copy")
        built = results["timings"].get("reconstructed", float("nan"))
        difference = f"{check(dense, store, export):.1e}" if settings.check else "not checked"
        rows.append(
            f"| {load} | {peak / 1e9:.2f} GB | {seconds:.0f} s | {built:.0f} s | {size(export) / 1e9:.2f} GB | "
            f"{copying:.1f} s | {seconds / copying:.1f} | {difference} |"
        )
    print(f"\n{settings.shape}, {shape['num_hidden_layers']} layers: {parameters / 1e9:.3f} B parameters, ", end="")
    print(f"{size(dense) / 1e9:.2f} GB on disk; {settings.experts} experts at {settings.ratio:.0%}, ", end="")
    print(f"{settings.compensation}, 16 × {settings.samples} × {settings.length} calibration tokens; ", end="")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| model.load | peak resident | run | experts | export | copying it | run / copying | logits differ by |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
