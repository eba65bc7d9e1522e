"""An export to the Hugging Face hub: ``python -m dive.push checkpoint=DIR repo=user/name``, ``dry_run=true`` to look first."""

import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from dive.cli import run
from dive.config import require


@dataclass(slots=True, kw_only=True)
class PushConfig:
    """What goes where."""

    checkpoint: str = MISSING
    """Directory of an export."""
    repo: str = MISSING
    """``user/name`` on the hub; made if it is not there."""
    private: bool = True
    """Of a repository that is made; with true, a public one that is there already is refused."""
    revision: str | None = None
    """Branch to commit to; the main one if null."""
    message: str | None = None
    """Of the commit; names the model class if null."""
    dry_run: bool = False
    """List what would be uploaded, and upload nothing."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo, flags=re.ASCII) is not None,
            f"repo ({self.repo}) is not of the form user/name",
        )


def push(config: PushConfig) -> None:
    """Check that the directory is whole, list its files, upload them in one commit.

    Raises:
        UserError: the directory is not whole, or the hub refuses.
    """
    from dive.hub import message_for, upload, whole_export
    from dive.progress import quiet_libraries
    from dive.report.text import count, show

    quiet_libraries()
    directory = Path(config.checkpoint).expanduser()
    files, left_out = whole_export(directory)
    message = config.message or message_for(directory)
    for file in files:
        show(f"{count(file.stat().st_size):>8}B  {file.name}")
    if left_out:
        show(f"left out: {', '.join(left_out)}")
    to = f"{config.repo} ({'private' if config.private else 'public'}, {config.revision or 'main'})"
    show(f'{len(files)} files, {count(sum(file.stat().st_size for file in files))}B to {to}: "{message}"')
    if config.dry_run:
        show("dry_run=true: nothing uploaded")
        return
    show(upload(directory, files, config.repo, private=config.private, revision=config.revision, message=message))


if __name__ == "__main__":
    run(push, "push", PushConfig)
