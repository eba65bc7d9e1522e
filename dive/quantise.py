"""Store an export in fewer bits, and measure what that costs: ``python -m dive.quantise checkpoint=DIR scheme=fp8``.

llm-compressor makes fp8, int8, w8a16 and w4a16, for vLLM, SGLang and transformers; llama.cpp makes q8_0, q6_k, q5_k_m and q4_k_m,
one GGUF file. Either may live in an environment of its own, which ``python=PYTHON`` names. What is written stands in a directory
of its own beside the checkpoint, with perplexity before and after in its card. w4a16 is calibrated on training texts of the run,
and an expert that too few of these tokens reach is refused.
"""

import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from omegaconf import MISSING

from dive.bounds import bounded, check_bounds
from dive.cli import run
from dive.errors import UserError, require, shortened
from dive.model.architecture import local_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from dive.engines.compare import Asked
    from dive.engines.quantised import Quantised
    from dive.engines.schemes import Scheme
    from dive.engines.texts import Question

log = logging.getLogger(__name__)


class SchemeName(Enum):
    """How weights are stored."""

    fp8 = "fp8"
    int8 = "int8"
    w8a16 = "w8a16"
    w4a16 = "w4a16"
    q8_0 = "q8_0"
    q6_k = "q6_k"
    q5_k_m = "q5_k_m"
    q4_k_m = "q4_k_m"


@dataclass(slots=True, kw_only=True)
class QuantiseConfig:
    """Which export, how, and on what it is calibrated and measured."""

    checkpoint: str = MISSING
    """Directory of an export."""
    scheme: SchemeName = MISSING
    """fp8, int8, w8a16, w4a16 (llm-compressor), q8_0, q6_k, q5_k_m, q4_k_m (llama.cpp)."""
    output: str | None = None
    """Directory that is written; ``CHECKPOINT-SCHEME`` beside the checkpoint if null."""
    python: str | None = None
    """Interpreter of an environment that has llm-compressor or llama-cpp-python, where this one has not."""
    llama_cpp: str | None = None
    """Directory of llama.cpp's sources, whose converter makes the first GGUF file."""
    calibration_tokens: int = bounded(131_072, at_least=1, at_most=10**9)
    """Of training texts of the run beside the checkpoint, or of embedded ones, for w4a16."""
    length: int = bounded(512, at_least=2, at_most=2**20)
    """Tokens of a sequence that is calibrated on."""
    least_tokens: int = bounded(256, at_least=0, at_most=10**9)
    """Of the calibration's tokens, that every expert of every layer must get."""
    every_expert: bool = False
    """Calibrate every expert on every token, not on those that its router sends it."""
    group: int | None = None
    """Columns that share a scale in w4a16; the largest of 128, 64 and 32 that divides all if null."""
    any_shape: bool = False
    """Write shapes as well that no fast kernel takes."""
    tokens: int = bounded(16_384, at_least=2, at_most=10**8)
    """Of test texts that perplexity is measured on, before and after."""
    device: str = "auto"
    """That llm-compressor computes on: cpu, cuda, or auto."""
    minutes: float = bounded(600, above=0, at_most=10**5)
    """The tool may take."""

    def __post_init__(self) -> None:
        check_bounds(self)


def quantise(config: QuantiseConfig) -> None:
    """Quantise, read what was written, measure, and write the card.

    Raises:
        UserError: the checkpoint cannot be read, the tool is not there, the shape has no kernel, an expert got too few tokens, or
            what was written cannot be read.
    """
    directory = local_model(config.checkpoint, "checkpoint")  # before the heavy imports
    if config.checkpoint == "embedded" or directory is None or not directory.is_dir():
        raise UserError(f"checkpoint={config.checkpoint}: no directory of an export; set checkpoint=DIR")
    directory = directory.resolve()
    name = config.scheme.name
    output = (
        Path(config.output).expanduser().resolve() if config.output else directory.with_name(f"{directory.name}-{name}")
    )
    require(not output.exists(), f"{output} is there already; set output=DIR, or remove it")
    require(output.parent.is_dir(), f"output={config.output}: {output.parent} is no directory")
    print(f"loading {config.checkpoint}", file=sys.stderr, flush=True)
    from dive.engines.compare import Asked, ask, perplexity
    from dive.engines.quantised import FILE, Quantised, bytes_of
    from dive.engines.quantising import Tools, check_tool, with_llama_cpp, with_llm_compressor
    from dive.engines.schemes import SCHEMES, group_size, unsuited
    from dive.engines.texts import Sizes, calibration, question
    from dive.hub import read_card, whole_export
    from dive.model.load import load_tokenizer, locate_dense
    from dive.progress import quiet_libraries, show
    from dive.report.card import quantised_card
    from dive.results import to_json
    from dive.store import write_json

    quiet_libraries()
    scheme = SCHEMES[name]
    whole_export(directory)
    card = read_card(directory)
    source = locate_dense(str(directory), None, dtype="float32", where="checkpoint", any_family=True)
    check_model(config, source.config, scheme)
    for trouble in unsuited(scheme, source.config):
        require(config.any_shape or scheme.is_gguf, f"{trouble}, or write it all the same with any_shape=true")
        log.warning("%s", trouble)
    tools = Tools(
        python=config.python,
        llama_cpp=None if config.llama_cpp is None else Path(config.llama_cpp).expanduser().resolve(),
        device=config.device,
        seconds=60 * config.minutes,
    )
    check_tool(tools, scheme)
    group = group_size(scheme, source.config, config.group)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
    positions = int(source.config.max_position_embeddings)
    require(config.length <= positions, f"length ({config.length}) exceeds the model's {positions} positions; lower it")
    test = question(
        directory, [], tokenizer, Sizes(budget=config.tokens, continuations=1, tokens=1, positions=positions)
    )
    sequences = (
        calibration(directory, tokenizer, tokens=config.calibration_tokens, length=config.length)
        if scheme.calibrated
        else []
    )
    asked = Asked(
        checkpoint=directory,
        pythons={},
        llama_cpp=tools.llama_cpp,
        seconds=tools.seconds,
    )
    before, _ = ask(asked, "transformers", test)
    require(
        "refused" not in before,
        f"checkpoint={directory}: transformers does not load it ({before.get('refused')}); export again",
    )
    made = Quantised(
        checkpoint=str(directory),
        model=source.config.architectures[0],
        scheme=name,
        stored=scheme.stored,
        tool=scheme.tool,
        version="",
        group=group,
        bytes_before=bytes_of(directory),
        texts=test.source,
        predicted=test.predicted,
        perplexity_before=perplexity(before["logprobs"]),
        calibration_tokens=sum(map(len, sequences)),
        every_expert=config.every_expert and bool(sequences),
        date=datetime.now(UTC).date().isoformat(),
    )
    with TemporaryDirectory(prefix=".quantise-", dir=output.parent) as temporary:
        folder, place = Path(temporary), Path(temporary) / output.name
        place.mkdir()
        if scheme.is_gguf:
            weights = with_llama_cpp(tools, made, source.config, folder, place)
        else:
            weights = with_llm_compressor(tools, made, sequences, source.config, folder, place)
        check_reached(config, made)
        measure(config, made, asked, test, weights)
        made.bytes_after = bytes_of(weights)
        write_json(place / FILE, to_json(made))
        (place / "README.md").write_text(str(quantised_card(card, made)), encoding="utf-8")
        place.rename(output)
    show(*described(made), f"written  {output}")


def check_model(config: QuantiseConfig, model: "PretrainedConfig", scheme: "Scheme") -> None:
    """Refuse what is no export of this package, or what llama.cpp answers wrongly.

    Raises:
        UserError: names the override.
    """
    from dive.model.families import TWINS, unserved

    where = f"checkpoint={config.checkpoint}"
    known = [twin.name for twin in TWINS]
    require(
        model.model_type in known,
        f"{where}: model_type {model.model_type!r} in config.json is no Mixture-of-Experts that is exported here "
        f"({', '.join(known)}); set checkpoint=DIR to an export",
    )
    if scheme.is_gguf:
        for each in unserved(model):
            require(
                "llama.cpp" not in each.engines,
                f"scheme={scheme.name}: {each.said} Choose another scheme, or another model.twin",
            )


def check_reached(config: QuantiseConfig, made: "Quantised") -> None:
    """Refuse an expert that was calibrated on too few tokens: its weights would be rounded by chance.

    Raises:
        UserError: says which, and what mends it.
    """
    if config.every_expert:
        return
    for layer, counts in made.reached.items():
        least = min(counts)
        if least < config.least_tokens:
            more = config.calibration_tokens * -(-config.least_tokens // max(least, 1))
            way = f"calibration_tokens={more}, every_expert=true" if least else "every_expert=true"
            raise UserError(
                f"{least} calibration tokens reached expert {counts.index(least)} of {layer}, and least_tokens is "
                f"{config.least_tokens}; set {way}, or a lower least_tokens"
            )


def measure(config: QuantiseConfig, made: "Quantised", asked: "Asked", test: "Question", weights: Path) -> None:
    """Read what was written and measure it on the same texts.

    Raises:
        UserError: it cannot be read.
    """
    from dataclasses import replace

    from dive.engines.compare import ask, perplexity

    engine = "llama_cpp" if made.is_gguf else "transformers"
    pythons = {} if config.python is None else {engine: config.python}
    answer, _ = ask(replace(asked, checkpoint=weights, pythons=pythons), engine, test)
    require(
        "refused" not in answer,
        f"scheme={made.scheme}: {engine} does not read what was written ({answer.get('refused')})",
    )
    made.perplexity_after = perplexity(answer["logprobs"])
    made.measured_in = f"{engine.replace('_', '.')} {answer['version']}"
    trouble = answer.get("trouble")
    made.trouble = None if trouble is None else shortened(trouble)


def described(made: "Quantised") -> list[str]:
    """What the command prints."""
    from dive.units import size

    measured = f"{made.measured_in}; {made.predicted:,} tokens of {made.texts}"
    lines = [
        f"{made.scheme}: {made.how}",
        f"weights     {size(made.bytes_before)} -> {size(made.bytes_after)}",
        f"perplexity  {made.perplexity_before:.4f} -> {made.perplexity_after:.4f} ({measured})",
    ]
    if made.calibrated:
        lines.append(made.calibrated)
    if made.trouble:
        lines.append(f"transformers does not load it as it is: {made.trouble}")
    return lines


def command() -> None:
    """Compose the command line and do it."""
    run(quantise, "quantise", QuantiseConfig)


if __name__ == "__main__":
    command()
