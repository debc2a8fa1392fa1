"""A tiny Stable Diffusion model and sixteen pairs for it."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.bench.networks import tiny_pipeline
from diffalign.data import PairDataset, write_pairs
from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_pipeline().save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def pairs():
    count = 16
    return PairDataset.from_lists(
        [f"picture {i % 8}" for i in range(count)],
        [picture(i) for i in range(count)],
        [picture(1000 + i) for i in range(count)],
    )


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, [pairs[i] for i in range(len(pairs))], overwrite=True)
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trainer(tmp_path, model_folder, pairs, shared_cache):
    """``trainer(**options)``: a Diffusion-DPO trainer on the tiny model, eight pairs per step, no progress."""

    def make(name="run", model=None, dataset=None, **options):
        settings = {
            "output_dir": str(tmp_path / name),
            "cache_dir": str(shared_cache),
            "train_batch_size": 8,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "rank": 4,
            "progress": False,
        }
        config = DiffusionDPOConfig(**(settings | options))
        return DiffusionDPOTrainer(config, model=model or model_folder, dataset=dataset or pairs)

    return make
