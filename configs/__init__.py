"""Ready-made configurations; the first line of each file is the command that runs it."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def resolve(args: list[str]) -> list[str]:
    """Let ``--config configs/train/x.yaml`` work from anywhere: a path that does not exist here is looked up
    among the files that come with the package."""

    def found(path: str) -> str:
        shipped = _FOLDER.joinpath(*Path(path).parts[1:]) if Path(path).parts[:1] == ("configs",) else None
        return str(shipped) if shipped and not Path(path).exists() and shipped.is_file() else path

    out = list(args)
    for i, arg in enumerate(out):
        if arg.startswith("--config="):
            out[i] = "--config=" + found(arg.removeprefix("--config="))
        elif arg == "--config" and i + 1 < len(out):
            out[i + 1] = found(out[i + 1])
    return out
