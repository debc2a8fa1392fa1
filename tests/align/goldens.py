"""Reading tests/goldens/losses_offline, and its tolerances."""

from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parent.parent / "goldens" / "losses_offline"
DTYPES = ("float64", "float32")
VALUE_TOLERANCE = {"float64": {"rtol": 1e-9, "atol": 1e-12}, "float32": {"rtol": 2e-4, "atol": 2e-6}}
GRADIENT_TOLERANCE = {"float64": 1e-7, "float32": 5e-4}


def load(file: str, case: str) -> dict[str, torch.Tensor]:
    """The arrays of one case as tensors, by ``in/x``, ``out/x``, ``grad/x``."""
    with np.load(GOLDENS / f"{file}.npz") as arrays:
        found = {
            k.removeprefix(f"{case}/"): torch.tensor(arrays[k])
            for k in arrays.files
            if k.startswith(f"{case}/")
        }
    assert found, case
    return found


def assert_golden(actual, wanted, dtype, msg=""):
    torch.testing.assert_close(actual, wanted, **VALUE_TOLERANCE[dtype], msg=lambda m: f"{msg}: {m}")


def assert_golden_gradient(actual, wanted, dtype):
    assert (actual - wanted).abs().max() <= GRADIENT_TOLERANCE[dtype] * wanted.abs().max()


ONLINE = GOLDENS.parent / "losses_online"


def load_online(file: str, case: str, *, short: bool = False) -> dict[str, torch.Tensor]:
    """The arrays of one case of tests/goldens/losses_online as tensors, by ``input/x`` and ``output/x``, or
    by ``x`` alone."""
    start = case.replace("/", "__") + "__"
    with np.load(ONLINE / f"{file}.npz") as arrays:
        names = [name for name in arrays.files if name.startswith(start)]
        assert names, case
        found = {name.removeprefix(start): torch.tensor(arrays[name]) for name in names}
    return {k.split("__")[-1] if short else k.replace("__", "/"): v for k, v in found.items()}
