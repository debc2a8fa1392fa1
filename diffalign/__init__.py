"""diffalign: make diffusion models better (preference alignment) and faster (few-step sampling).

Nothing heavy is imported here: ``import diffalign`` takes milliseconds, and each name below loads its module
on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffalign.bench.samplers import compare_samplers
    from diffalign.pipelines.load import load_pipeline
    from diffalign.solvers import SOLVERS
    from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer

__all__ = [
    "SOLVERS",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "__version__",
    "compare_samplers",
    "load_pipeline",
]
__version__ = "0.1.0"

# A copy of the tree that lost its links (zip download, Windows checkout) still finds the mapped folders,
# which then lie beside this package.
_root = Path(__file__).resolve().parent
__path__ = [str(_root), *([] if (_root / "solvers").is_dir() else [str(_root.parent)])]

_LAZY: dict[str, str] = {
    "SOLVERS": "diffalign.solvers",
    "DiffusionDPOConfig": "diffalign.trainers",
    "DiffusionDPOTrainer": "diffalign.trainers",
    "compare_samplers": "diffalign.bench.samplers",
    "load_pipeline": "diffalign.pipelines.load",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
