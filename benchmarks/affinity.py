r"""Time of the matrix of cross-domain perplexities, against the bare forward passes that it needs.

    python -m benchmarks.affinity
    python -m benchmarks.affinity --shape tinyllama --device cuda --dtype bfloat16 \
        --domains 24 --samples 8 --length 1024 --batch 8

The bare passes are the dense model's over every domain's batches, once for each domain that it is pruned on, with the loss.
Compared are masked activations (the dense model's arithmetic), FFNs sliced anew in each pass, and what the package takes by
itself. Weights, tokens and masks are random: perplexities say nothing here, times do. Variants take turns over several
rounds; printed are medians over the rounds, ratios within a round. Prints one table.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import SHAPES, add_arguments, describe, random_domains, random_model
from benchmarks.timing import interleaved, machine, median_ratio
from dive.affinity.matrix import cross_domain_perplexity, pruned_in_place, sliced_in_place, slicing_pays
from dive.eval.perplexity import token_nll


def random_masks(settings: argparse.Namespace, domains: list[str], ratio: float) -> dict[str, Tensor]:
    """{domain: (L, F) bool}, each layer without a random share of its channels."""
    shape = SHAPES[settings.shape]
    channels = shape["intermediate_size"]
    kept = round(channels * (1 - ratio))
    generator = torch.Generator().manual_seed(settings.seed)

    def mask() -> Tensor:
        order = torch.rand(shape["num_hidden_layers"], channels, generator=generator).argsort(dim=1)
        return order < kept

    return {domain: mask() for domain in domains}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, domains=3, samples=4, length=128, batch=4, rounds=5)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75], help="shares of the channels pruned")
    settings = parser.parse_args(arguments)
    model, tokens = random_model(settings), random_domains(settings)
    names, batch = list(tokens), settings.batch

    def by(prune: Callable[..., object], masks: dict[str, Tensor], means: dict[str, Tensor]) -> Tensor:
        rows = []
        for pruned_on in names:
            with prune(model, masks[pruned_on], means[pruned_on]):  # type: ignore[attr-defined]
                found = [token_nll(model, tokens[name], batch=batch) for name in names]
            rows.append([math.exp(nll / count) for nll, count in found])
        return torch.tensor(rows, dtype=torch.float64)

    def bare() -> None:
        for _ in names:
            for name in names:
                token_nll(model, tokens[name], batch=batch)

    lines = []
    for ratio in settings.ratios:
        masks = random_masks(settings, names, ratio)
        means = {name: torch.full(mask.shape, 0.01) for name, mask in masks.items()}
        found: dict[str, Tensor] = {}

        def keep(name: str, made: Tensor, found: dict[str, Tensor] = found) -> None:
            found[name] = made

        def whole(masks: dict[str, Tensor] = masks, means: dict[str, Tensor] = means) -> Tensor:
            return cross_domain_perplexity(model, tokens, masks, means=means, batch=batch)

        seconds = interleaved(
            {
                "bare forward passes": bare,
                "masked": lambda keep=keep, m=masks, f=means: keep("masked", by(pruned_in_place, m, f)),
                "sliced": lambda keep=keep, m=masks, f=means: keep("sliced", by(sliced_in_place, m, f)),
                "cross_domain_perplexity": lambda keep=keep, whole=whole: keep("cross_domain_perplexity", whole()),
            },
            rounds=settings.rounds,
            device=settings.device,
        )
        pass_tokens = batch * settings.length
        chosen = "sliced" if slicing_pays(masks[names[0]], pass_tokens) else "masked"
        for name, values in seconds.items():
            title = f"{name} ({chosen})" if name.startswith("cross") else name
            error = f"{float((found[name] / found['masked'] - 1).abs().max()):.0e}" if name in found else ""
            lines.append(
                f"| {ratio:g} | {title} | {statistics.median(values):.2f} | "
                f"{median_ratio(values, seconds['bare forward passes']):.2f} | {error} |"
            )
    print(f"\n{describe(settings)}; {machine(settings.device)}\n")
    print("| pruned | passes | seconds | / bare | perplexities differ from masked by |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
