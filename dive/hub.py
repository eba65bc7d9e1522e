"""Uploading an export to the Hugging Face hub, after a look at whether it is whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dive.errors import UserError

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


def upload(
    directory: Path, files: Sequence[Path], repo: str, *, private: bool, revision: str | None, message: str
) -> str:
    """Make the repository if it is not there, and upload the files in one commit.

    Returns:
        Address of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses, nobody is logged in, or the repository is public although
            ``private`` is asked for.
    """
    from huggingface_hub import HfApi, constants
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
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            allow_patterns=[file.name for file in files],
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
    return str(commit.commit_url)
