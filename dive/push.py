"""Publish an export on the Hugging Face hub: ``python -m dive.push checkpoint=DIR repo=user/name dry_run=true``."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from dive.cli import run
from dive.errors import UserError, require
from dive.model.architecture import local_model


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
    """Check that the directory is whole, list its files, upload them in one commit.

    Raises:
        UserError: the directory is not whole, or the hub refuses.
    """
    local_model(config.checkpoint, "checkpoint")  # before the heavy imports
    from dive.hub import message_for, upload, whole_export
    from dive.progress import quiet_libraries, show
    from dive.units import size

    quiet_libraries()
    directory = Path(config.checkpoint).expanduser()
    files, left_out = whole_export(directory)
    message = config.message or message_for(directory)
    for file in files:
        show(f"{size(file.stat().st_size):>9}  {file.name}")
    if left_out:
        show(f"left out: {', '.join(left_out)}")
    to = f"{config.repo} ({'private' if config.private else 'public'}, {config.revision or 'main'})"
    show(f'{len(files)} files, {size(sum(file.stat().st_size for file in files))} to {to}: "{message}"')
    if config.dry_run:
        show("dry_run=true: nothing uploaded")
        return
    show(upload(directory, files, config.repo, private=config.private, revision=config.revision, message=message))


def command() -> None:
    """Compose the command line and do it."""
    run(push, "push", PushConfig)


if __name__ == "__main__":
    command()
