"""Errors that a user can mend."""


class UserError(Exception):
    """What is wrong, where, and which override mends it; shown as one line, without a traceback."""
