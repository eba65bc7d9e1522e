"""Errors that a user can mend."""

import errno
import os
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers of a disk that takes no more: full, over quota, over the limit of a file's size, read-only."""


class UserError(Exception):
    """What is wrong, where, and which override mends it; shown as one line, without a traceback."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # it may repeat what a user wrote


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def disk_trouble(error: BaseException) -> str | None:
    """What the disk says, where an error or one below it comes from a disk that takes no more.

    safetensors and ``torch.save`` wrap the operating system's error in ones of their own.
    """
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno in FULL:
            return f"{below.filename}: {below.strerror}" if below.filename else str(below.strerror)
        wrapped = re.search(r"(?:os error|code:) (\d+)", str(below))
        if type(below).__name__ == "SafetensorError" and wrapped and int(wrapped[1]) in FULL:
            return os.strerror(int(wrapped[1]))
        below = below.__cause__ or below.__context__
    return None


def one_line(error: BaseException) -> str:
    """What an error of a library says, as one line of at most 300 characters; its type where it says nothing."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str) -> str:
    """A text as one line of at most 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"
