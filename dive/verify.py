"""Ask engines whether they give what transformers gives: ``python -m dive.verify checkpoint=DIR engines=[transformers,vllm]``.

Each engine that is installed gives the log-probability of every token of the same texts, and goes on from their beginnings by
the likeliest token, in float32. Exits with 1 where one differs. Of SGLang only the loader runs, since it computes nothing without
a GPU: every parameter is marked before, and what is never written, or cut, is reported.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from dive.bounds import bounded, check_bounds
from dive.cli import run
from dive.errors import UserError, require
from dive.model.architecture import local_model


class Engine(Enum):
    """What loads an export."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama_cpp"
    sglang = "sglang"


@dataclass(slots=True, kw_only=True)
class PythonsConfig:
    """Interpreters that have an engine, where this one has not."""

    transformers: str | None = None
    """Of an environment that has transformers with what a quantised export needs (compressed-tensors)."""
    vllm: str | None = None
    """Of an environment that has vLLM."""
    llama_cpp: str | None = None
    """Of one that has llama-cpp-python."""
    sglang: str | None = None
    """Of one that has SGLang."""


@dataclass(slots=True, kw_only=True)
class VerifyConfig:
    """Which export, in which engines, on what."""

    checkpoint: str = MISSING
    """Directory of an export, or of what :mod:`dive.quantise` made of one. ``verify.json`` is written beside it, or into it."""
    engines: list[Engine] = field(default_factory=lambda: list(Engine))
    """What is compared with transformers: transformers, vllm, llama_cpp, sglang. One that is not installed is said to be so."""
    pythons: PythonsConfig = field(default_factory=PythonsConfig)
    llama_cpp: str | None = None
    """Directory of llama.cpp's sources: their converter makes the GGUF file, in float32, which is removed afterwards."""
    prompts: list[str] = field(default_factory=list)
    """Texts to compare on; test texts of the run beside the checkpoint if empty, or embedded ones where there is no run."""
    tokens: int = bounded(4096, at_least=2, at_most=10**7)
    """Of all texts together, at most."""
    continuations: int = bounded(8, at_least=1, at_most=10_000)
    """Beginnings that are gone on from, at most."""
    max_new_tokens: int = bounded(16, at_least=1, at_most=10**5)
    """Of each continuation."""
    tolerance: float = bounded(1e-3, above=0, at_most=10)
    """Largest difference of a token's log-probability that counts as none, in nats."""
    minutes: float = bounded(60, above=0, at_most=10**5)
    """An engine may take."""

    def __post_init__(self) -> None:
        check_bounds(self)
        require(bool(self.engines), f"engines is empty; set engines=[{','.join(each.name for each in Engine)}]")


def verify(config: VerifyConfig) -> None:
    """Ask every engine, write ``verify.json``, print one table.

    Raises:
        UserError: the checkpoint cannot be read, a directory or interpreter is not there, or an engine differs.
    """
    directory = local_model(config.checkpoint, "checkpoint")  # before the heavy imports
    if config.checkpoint == "embedded" or directory is None or not directory.is_dir():
        raise UserError(f"checkpoint={config.checkpoint}: no directory of an export; set checkpoint=DIR")
    check_places(config, directory)
    print(f"loading {config.checkpoint}", file=sys.stderr, flush=True)
    import torch

    from dive.engines.compare import Asked, compare
    from dive.engines.quantised import read_beside
    from dive.engines.table import lines, table
    from dive.engines.texts import Sizes, question
    from dive.engines.verified import DIFFERS, FILE, Verified
    from dive.export import BIASED_MODEL_TYPE
    from dive.model.architecture import read_settings
    from dive.model.load import load_tokenizer, locate_dense, locate_quantised
    from dive.progress import quiet_libraries, show
    from dive.results import to_json
    from dive.store import write_json

    quiet_libraries()
    named = f"checkpoint={config.checkpoint}"
    quantised = read_beside(directory)
    if quantised is None:
        require(
            read_settings(directory, named).get("model_type") != BIASED_MODEL_TYPE,
            f"{named} has expert biases and serves nowhere; export with pruning.compensation=least_squares",
        )
        source = locate_dense(str(directory), None, dtype="float32", where="checkpoint", any_family=True)
    else:
        require(
            not quantised.is_gguf,
            f"{named} is a GGUF file, which llama.cpp alone reads; quantised.json has its figures",
        )
        source = locate_quantised(directory)
    tokenizer = load_tokenizer(source)
    sizes = Sizes(
        budget=config.tokens,
        continuations=config.continuations,
        tokens=config.max_new_tokens,
        positions=int(source.config.max_position_embeddings),
    )
    origin = directory if quantised is None else Path(quantised.checkpoint)
    chosen = question(origin, config.prompts, tokenizer, sizes)
    if quantised is not None:
        chosen.measured = None  # of other weights
    asked = Asked(
        checkpoint=directory,
        pythons={name: path for name, path in asdict(config.pythons).items() if path is not None},
        llama_cpp=None if config.llama_cpp is None else Path(config.llama_cpp).expanduser().resolve(),
        seconds=60 * config.minutes,
    )
    engines = [engine.name for engine in config.engines]
    found = compare(
        asked, engines, chosen, tolerance=config.tolerance, rounded=source.config.dtype is not torch.float32
    )
    verified = Verified(
        checkpoint=str(directory),
        model=source.config.architectures[0],
        texts=chosen.source,
        predicted=chosen.predicted,
        continuations=len(chosen.prompts),
        tokens=chosen.tokens,
        tolerance=config.tolerance,
        date=datetime.now(UTC).date().isoformat(),
        engines=found,
    )
    file = (directory.resolve().parent if quantised is None else directory) / FILE
    write_json(file, to_json(verified))
    show(table(verified), *lines(verified), f"written  {file}")
    different = verified.of(DIFFERS)
    require(not different, "; ".join(f"{each.engine} {each.version} differs: {each.reason}" for each in different))


def check_places(config: VerifyConfig, directory: Path) -> None:
    """Refuse interpreters and sources that are not there, and a place where nothing can be written.

    Raises:
        UserError: names the override.
    """
    from dive.engines.gguf import CONVERTER

    for engine, path in asdict(config.pythons).items():
        if path is not None:
            there = Path(path).is_file() and os.access(path, os.X_OK)
            require(there, f"pythons.{engine}={path}: no such interpreter; name bin/python of an environment")
    if config.llama_cpp is not None:
        there = (Path(config.llama_cpp).expanduser() / CONVERTER).is_file()
        require(there, f"llama_cpp={config.llama_cpp}: no {CONVERTER} in this directory; name llama.cpp's sources")
    parent = directory.resolve().parent
    require(os.access(parent, os.W_OK), f"checkpoint={config.checkpoint}: {parent}, beside it, cannot be written")


def command() -> None:
    """Compose the command line and do it."""
    run(verify, "verify", VerifyConfig)


if __name__ == "__main__":
    command()
