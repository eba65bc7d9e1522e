"""Uploading an export to the Hugging Face hub, after a look at whether it is whole; and the cards of models there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dive.errors import UserError, one_line
from dive.model.architecture import local_model

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

SUFFIXES = (".safetensors", ".json", ".md", ".model", ".txt", ".jinja")
"""Of the files of an export; whatever else lies in the directory stays here."""


def whole_export(directory: Path) -> tuple[list[Path], list[str]]:
    """(files to upload, names of what is left out) of an export that any engine can load.

    Every safetensors file is opened, which compares its size with its header; no weight is read.

    Raises:
        UserError: the configuration, weights, tokenizer or model card is missing or damaged.
    """
    where = f"checkpoint={directory}"
    if not directory.is_dir():
        raise UserError(f"{where}: no such directory")
    config = _read_json(directory / "config.json", where)
    if not config.get("architectures"):
        raise UserError(f"{where}: config.json names no class, so no engine loads it; choose another directory")
    _check_weights(directory, where)
    _read_json(directory / "tokenizer_config.json", where)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{where}: no tokenizer.json; save the tokenizer into it with tokenizer.save_pretrained")
    card = directory / "README.md"
    if not card.is_file() or not card.read_text(encoding="utf-8").startswith("---\n"):
        raise UserError(f"{where}: README.md is not a model card that begins with metadata between --- lines")
    entries = sorted(directory.iterdir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix in SUFFIXES and entry.name[0] != "."]
    return files, [entry.name for entry in entries if entry not in files]


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{where}: no {file.name} in this directory") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file.name} cannot be read") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: {file.name} cannot be read: it is no JSON object")
    return found


def _check_weights(directory: Path, where: str) -> None:
    """Every tensor of the index is in its file, and every file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    places: dict[str, set[str]] = {"model.safetensors": set()}
    if index.is_file():
        places = {}
        try:
            for name, file in _read_json(index, where)["weight_map"].items():
                places.setdefault(file, set()).add(name)
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where}: {index.name} names no files of tensors; export again") from error
    for file, expected in places.items():
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                absent = expected - set(tensors.keys())
        except FileNotFoundError as error:
            raise UserError(f"{where}: no {file} in this directory") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where}: {file} is damaged ({error}); export again") from error
        if absent:
            raise UserError(f"{where}: {file} lacks {len(absent)} tensors of the index (first: {min(absent)})")


def message_for(directory: Path) -> str:
    """Commit message: ``Upload MixtralForCausalLM``."""
    return f"Upload {_read_json(directory / 'config.json', str(directory))['architectures'][0]}"


def read_card(directory: Path) -> "ModelCard":
    """README.md of an export.

    Raises:
        UserError: its header is no metadata.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard((directory / "README.md").read_text(encoding="utf-8"))
    except (YAMLError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"checkpoint={directory}: the header of README.md is no metadata ({one_line(error)}); mend it, or export again"
        ) from error


def card_data(path: str, revision: str | None = None) -> "ModelCardData | None":
    """The metadata of a model's own card, as far as it lies on this machine; none where there is no card, or no sense in it.

    Args:
        path: directory, hub id, GGUF file, or ``embedded``.
        revision: commit, branch or tag on the hub.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache

    try:
        directory = local_model(path)
        file = try_to_load_from_cache(path, "README.md", revision=revision) if directory is None else None
        card = Path(file) if isinstance(file, str) else None if directory is None else directory / "README.md"
        if card is None or not card.is_file():
            return None
        return cast("ModelCardData", ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data)
    except Exception:  # anybody's card: YAML and the hub's checks raise types of many kinds
        return None


def hub_card_data(repo: str) -> "ModelCardData | None":
    """The same of a model on the hub, asked for there; none where it cannot be had."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(repo).card_data
    except Exception:  # a licence that cannot be looked up keeps nothing from being published
        return None


def upload(files: Sequence[Path], card: str, repo: str, *, private: bool, revision: str | None, message: str) -> str:
    """Make the repository if it is not there, and upload the files in one commit.

    Args:
        card: what README.md becomes.

    Returns:
        Address of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses, nobody is logged in, the repository is public although
            ``private`` is asked for, or the hub finds fault with the card.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from dive.connection import hub_answers

    if not hub_answers():
        raise UserError(f"repo={repo}: {constants.ENDPOINT} does not answer; dry_run=true lists what would be uploaded")
    api = HfApi()
    # OSError, and HTTPError of the client that this release of huggingface_hub uses (httpx or httpx2)
    no_connection = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(
                f"repo={repo} is there and public; set private=false to upload to it, or choose another name"
            )
        contents: dict[str, Path | bytes] = {file.name: file for file in files} | {"README.md": card.encode()}
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
            revision=revision,
            commit_message=message,
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"repo={repo}: nobody is logged in; run `hf auth login` or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = (error.server_message or str(error)).strip().splitlines()[0]
        hint = " `hf auth login` with a token that may write there." if status in (401, 403) else ""
        raise UserError(f"repo={repo}: the hub refuses ({status}: {reason}).{hint}") from error
    except no_connection as error:
        raise UserError(f"repo={repo}: the upload failed ({type(error).__name__}: {error})") from error
    except ValueError as error:  # of the hub's check of the card, which comes before the files
        raise UserError(f"repo={repo}: {one_line(error)}; mend README.md of the checkpoint") from error
    return str(commit.commit_url)
