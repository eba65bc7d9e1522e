"""What pruning alone costs: a model pruned in several ways, on text that it wrote itself, without retraining.

    python benchmarks/one_shot.py                                  # the embedded model
    python benchmarks/one_shot.py --model DIR --ratio 0.5

The model's own samples are its training distribution, so its perplexity on them is as low as it gets and every loss is the
pruning's. Prints one table; everything else goes to ``--out``, and the same command again computes nothing.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from dive.cli import composed
from dive.config import Config
from dive.errors import UserError
from dive.model.load import document_tokens, load_dense
from dive.pipeline import train

OFF = ["moe=plain"]
SEQUENTIAL = ["moe.refined.rounds=0", "moe.refined.steps=0"]
METHODS = {
    "scores (WIFV), nothing made up for": ("1", ["pruning.metric=wifv", "pruning.compensation=none", *OFF]),
    "FLAP: scores and a bias": ("1", ["pruning.metric=wifv", "pruning.compensation=bias", *OFF]),
    "scores, least squares": ("1", ["pruning.metric=wifv", *OFF]),
    "scores, layer after layer": ("1", ["pruning.metric=wifv", *SEQUENTIAL]),
    "elimination (OBS), least squares": ("1", OFF),
    "elimination, layer after layer": ("1", SEQUENTIAL),
    "the same, ridge chosen": ("1", [*SEQUENTIAL, "pruning.ridge=null"]),
    "the same, local gradient steps": ("1", []),
    "8 token-refined experts, no gradient steps": ("8", ["moe.refined.rounds=4", "moe.refined.steps=0"]),
    "8 token-refined experts, local gradient steps": ("8", []),
}


def configured(name: str, common: list[str]) -> Config:
    """The configuration of one row."""
    experts, overrides = METHODS[name]
    return composed([*common, f"moe.experts={experts}", *overrides])


def sample(model_path: str, out: Path, *, tokens: dict[str, int], length: int, seed: int) -> None:
    """Write ``<out>/sampled/{train,test}.jsonl``: documents sampled at temperature 1 from the boundary token on."""
    model, tokenizer = load_dense(model_path)
    start = torch.tensor(document_tokens(tokenizer, "")[:1], dtype=torch.int64)
    ends = [t for t in {tokenizer.eos_token_id, tokenizer.bos_token_id} if t is not None]
    torch.manual_seed(seed)
    folder = out / "sampled"
    folder.mkdir(parents=True, exist_ok=True)
    for split, wanted in tokens.items():
        rows: list[str] = []
        while len(rows) * length < wanted:
            prompts = start.repeat(256, 1)
            found = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.eos_token_id or 0,
            )
            rows += [text for text in tokenizer.batch_decode(found, skip_special_tokens=True) if text.strip()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="directory or hub id of a dense model")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of every FFN's channels that goes")
    parser.add_argument("--width-multiple", type=int, default=8, help="kept widths are rounded to this")
    parser.add_argument("--samples", type=int, default=512, help="calibration sequences of 256 tokens")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("outputs/one_shot"))
    settings = parser.parse_args()
    text = settings.out / f"text-{settings.seed}"
    if not (text / "sampled" / "test.jsonl").is_file():
        sample(settings.model, text, tokens={"train": 2 * settings.samples * 256, "test": 16384}, length=255,
               seed=settings.seed)  # fmt: skip
    common = [
        *("model=local", f"model.path={settings.model}", "budget=toy", "eval=default", "model.dtype=float32"),
        *("retrain=none", "logger=csv", "eval.windows=null"),
        *("calibration_domains=local", f"calibration_domains.path={text}"),
        *(f"calibration_domains.samples={settings.samples}", f"pruning.ratio={settings.ratio}"),
        *(f"pruning.width_multiple={settings.width_multiple}", f"seed={settings.seed}"),
        f"store={settings.out / 'store'}",
    ]
    configurations = {name: configured(name, common) for name in METHODS}
    rows: list[tuple[str, float]] = []
    for name, config in configurations.items():
        results = train(config, settings.out / f"{len(rows):02d}", [])
        stages = {stage.name: stage.mean for stage in results.stages}
        if not rows:
            rows.append(("dense", stages["dense"]))
        rows.append((name, stages["reconstructed"]))
    print(f"\n| {settings.ratio:.0%} of every FFN pruned, nothing retrained | perplexity |\n| --- | --- |")
    for name, value in rows:
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
