r"""Tokens/s of the one-pass calibration of all domains, against the dense model's bare forward pass on the same tokens.

    python -m benchmarks.calibration
    python -m benchmarks.calibration --shape tinyllama --device cuda --dtype bfloat16 \
        --domains 16 --samples 32 --length 1024 --batch 16

Weights and tokens are random. Bare forward passes are of the decoder alone (calibration needs no head), and with the head.
``moments`` is what ``pruning.metric`` needs and the pipeline's calibration collects; second moments, F² numbers of every layer
and domain, are what least squares needs (9/8 F² operations a token and layer), and FFN inputs are for routers.

Variants take turns over several rounds; printed are medians over the rounds, the ratio within a round. Prints one table.
"""

import argparse
import statistics

import torch
from torch import Tensor

from benchmarks.shapes import add_arguments, describe, random_domains, random_model
from benchmarks.timing import interleaved, machine, median_ratio
from dive.pruning.calibrate import Calibration


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, domains=8, samples=4, length=128, batch=4, rounds=5)
    settings = parser.parse_args(arguments)
    model, tokens = random_model(settings), random_domains(settings)
    batches = [rows.to(settings.device) for matrix in tokens.values() for rows in matrix.split(settings.batch)]

    @torch.no_grad()
    def bare(*, head: bool) -> list[Tensor]:
        run = model if head else model.model
        return [run(input_ids=rows, use_cache=False)[0][:, -1] for rows in batches]

    def calibrate(*, second_moments: bool = False, inputs: int = 0) -> int:
        found = Calibration(model, tokens, batch=settings.batch, second_moments=second_moments, inputs=inputs)
        return sum(s.count for number in range(model.config.num_hidden_layers) for s in found.layer(number))

    assert calibrate() == sum(m.numel() for m in tokens.values()) * model.config.num_hidden_layers
    seconds = interleaved(
        {
            "bare forward, decoder": lambda: bare(head=False),
            "bare forward, decoder and head": lambda: bare(head=True),
            "calibration: moments": calibrate,
            "calibration: moments, FFN inputs": lambda: calibrate(inputs=2048),
            "calibration: moments, FFN inputs, second moments": lambda: calibrate(second_moments=True, inputs=2048),
        },
        rounds=settings.rounds,
        device=settings.device,
    )
    decoder, whole = list(seconds.values())[:2]
    count = sum(matrix.numel() for matrix in tokens.values())
    print(f"\n{describe(settings)}; {machine(settings.device)}\n")
    print("| pass | seconds | tokens/s | of the decoder's tokens/s | of the whole model's |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in seconds.items():
        median = statistics.median(found)
        shares = f"{median_ratio(decoder, found):.2f} | {median_ratio(whole, found):.2f}"
        print(f"| {name} | {median:.2f} | {count / median:.0f} | {shares} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
