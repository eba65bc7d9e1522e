"""Publish an export on the Hugging Face hub: ``python -m dive.push checkpoint=DIR repo=user/name dry_run=true``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from dive.cli import run
from dive.errors import UserError, require
from dive.model.architecture import local_model

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


@dataclass(slots=True, kw_only=True)
class PushConfig:
    """What goes where."""

    checkpoint: str = MISSING
    """Directory of an export."""
    repo: str = MISSING
    """``user/name`` on the hub; created if it is not there."""
    private: bool = True
    """Whether a repository that is created is private; with true, one that is public already is refused."""
    revision: str | None = None
    """Branch to commit to; the main one if null."""
    message: str | None = None
    """Commit message; names the model class if null."""
    quantised: bool = False
    """Also upload what :mod:`dive.quantise` made of this export, each to ``repo-SCHEME``."""
    dry_run: bool = False
    """List what would be uploaded, and upload nothing."""

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        require(self.repo.count("/") == 1, f"repo ({self.repo}) is not of the form user/name")
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise UserError(f"repo ({self.repo}): {' '.join(str(error).split())}; set repo=USER/NAME") from error


def push(config: PushConfig) -> None:
    """Check that every directory is whole, list its files, upload them in one commit each.

    README.md goes up with what only a published model has: how to serve it under its name, what engines made of it where
    :mod:`dive.verify` asked them, and its base model's licence. The one in the directory stays as it is.

    Raises:
        UserError: a directory is not whole, there is nothing quantised although it is asked for, or the hub refuses.
    """
    local_model(config.checkpoint, "checkpoint")  # before the heavy imports
    from dive.hub import message_for, upload, whole_export
    from dive.progress import quiet_libraries, show
    from dive.units import size

    quiet_libraries()
    directory = Path(config.checkpoint).expanduser()
    whole = {config.repo: (directory, *whole_export(directory), published_card(directory, config.repo))}
    if config.quantised:
        whole |= quantised_variants(directory, config.repo)
    ready = []
    for repo, (place, files, left_out, card) in whole.items():
        message = config.message or message_for(directory)
        for file in files:
            show(f"{size(file.stat().st_size):>9}  {file.name}")
        if left_out:
            show(f"left out: {', '.join(left_out)}")
        show(f"README.md: {', '.join(str(name) for name in card.data.to_dict())}")
        to = f"{repo} ({'private' if config.private else 'public'}, {config.revision or 'main'})"
        if place != directory:
            message = f"{message}, {place.name}"
        show(f'{len(files)} files, {size(sum(file.stat().st_size for file in files))} to {to}: "{message}"')
        ready.append((files, str(card), repo, message))
    if config.dry_run:
        show("dry_run=true: nothing uploaded")
        return
    for files, text, repo, message in ready:
        show(upload(files, text, repo, private=config.private, revision=config.revision, message=message))


def quantised_variants(directory: Path, repo: str) -> "dict[str, tuple[Path, list[Path], list[str], ModelCard]]":
    """{repository: (directory, files to upload, names of what is left out, card)} of what was quantised from an export.

    Raises:
        UserError: there is none, or one is not whole.
    """
    from dive.engines.quantised import FILE, read_quantised
    from dive.hub import read_card, whole_export
    from dive.report.card import published_variant

    found = {}
    for file in sorted(directory.resolve().parent.glob(f"*/{FILE}")):
        made, place = read_quantised(file), file.parent
        if Path(made.checkpoint) != directory.resolve():
            continue
        if made.is_gguf:
            files = [entry for entry in sorted(place.iterdir()) if entry.suffix in (".gguf", ".json", ".md")]
            left_out = [entry.name for entry in sorted(place.iterdir()) if entry not in files]
            require(any(entry.suffix == ".gguf" for entry in files), f"{place} has no GGUF file; quantise again")
        else:
            files, left_out = whole_export(place)
        name = f"{repo}-{made.scheme}"
        require(name not in found, f"{place} and another directory are {made.scheme} of {directory}; remove one")
        found[name] = (place, files, left_out, published_variant(read_card(place), made, name, base=repo))
    require(bool(found), f"quantised=true: nothing was quantised from {directory}; run python -m dive.quantise first")
    return found


def published_card(directory: Path, repo: str) -> "ModelCard":
    """README.md of an export as it is published.

    Raises:
        UserError: the header of README.md is no metadata, or config.json is of no class that an export has.
    """
    from transformers import AutoConfig

    from dive.connection import hub_answers
    from dive.engines.verified import read_verified
    from dive.hub import hub_card_data, read_card
    from dive.model.architecture import read_settings
    from dive.model.families import TWINS, unserved
    from dive.report.card import INHERITED, publish

    family = read_settings(directory, f"checkpoint={directory}").get("model_type")
    require(
        family in [twin.name for twin in TWINS],
        f"checkpoint={directory}: model_type {family!r} in config.json is no Mixture-of-Experts that is exported here; set "
        "checkpoint=DIR to an export",
    )
    card = read_card(directory)
    base = card.data.get("base_model")
    if card.data.get("license") is None and isinstance(base, str) and hub_answers():
        found = hub_card_data(base)
        for name in INHERITED:
            if found is not None and found.get(name) is not None and card.data.get(name) is None:
                card.data[name] = found.get(name)
    verified = read_verified(directory.resolve().parent)
    if verified is not None and Path(verified.checkpoint).name != directory.resolve().name:
        verified = None  # of another export beside this one
    left_out = {engine for each in unserved(AutoConfig.from_pretrained(directory)) for engine in each.engines}
    card.text = publish(card.text, repo, unserved=left_out, verified=verified)
    return card


def command() -> None:
    """Compose the command line and do it."""
    run(push, "push", PushConfig)


if __name__ == "__main__":
    command()
