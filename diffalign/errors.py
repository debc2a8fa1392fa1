"""The two errors a user is meant to read. Each is one sentence that names the thing and the way out."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: an option, a path, a data set. The command line exits with code 2."""

    exit_code = 2


class RunFailed(RuntimeError):
    """A run that started and could not go on, such as a non-finite loss. The command line exits with code 3."""

    exit_code = 3


def suggestion(name: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of `known`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
