"""Shared by all tests."""

from __future__ import annotations

import gc
import threading

import pytest
from tqdm import tqdm

# tqdm's own lock is shared by forked processes: one that is killed while it prints would keep it for ever.
tqdm.set_lock(threading.RLock())


def pytest_collection_finish(session):
    """Take what the libraries made at import out of garbage collection: the end of every run of a trainer
    collects, and would look at a million objects that stay for good."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a Stable Diffusion that draws 32 px images in milliseconds; no test writes to it."""
    import torch

    from diffalign.bench.networks import tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():  # making it seeds the generator
        tiny_pipeline().save_pretrained(folder)
    return str(folder)
