"""The two errors a user is meant to read, and the sentences for those that the machine raises.

Each message is one sentence that names the thing and the way out.
"""

from __future__ import annotations

import errno


class UserError(ValueError):
    """Bad input: an option, a path, a data set. The command line exits with code 2."""

    exit_code = 2


class RunFailed(RuntimeError):
    """A run that started and could not go on, such as a non-finite loss. The command line exits with 3."""

    exit_code = 3


def suggestion(name: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of `known`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


_DISK_FULL = ("No space left on device", "os error 28", "file write failed")


def describe(error: BaseException) -> tuple[str, int]:
    """What to tell a user about any exception: (one sentence, exit code 2, 3 or 130)."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | RunFailed):
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {text or 'what was saved before is kept'}", 130
    code, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    where = repr(str(file)) if file else "the output folder"
    # safetensors and torch wrap a full disk in errors of their own, so the words are looked at as well.
    if code in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in _DISK_FULL):
        return f"no space left for {where}; free some or choose another --output_dir (the rest is kept)", 3
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for {where}; choose a folder that you may read and write", 2
    if isinstance(error, FileNotFoundError) and file:
        return f"no such file or folder: {where}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; use a smaller batch size or resolution, or a smaller model dtype", 3
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is missing here; install it with pip", 3
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)", 3
