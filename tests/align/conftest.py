"""A tiny Stable Diffusion model and sixteen pairs for it."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from diffalign.bench.networks import tiny_pipeline
from diffalign.data import PairDataset, open_images, write_pairs
from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def with_curves():
    """For tests that want ``curves.png``."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes a third of a second at the end of each of a hundred small runs."""
    if "with_curves" not in request.fixturenames:
        monkeypatch.setattr("diffalign.trainers.curves.draw_log", lambda folder: None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Latents 4 x 4 x 4, one attention block: a step takes some 20 ms."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = tiny_pipeline()
        pipe.unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()
        pipe.save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


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
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs", [pairs[i] for i in range(len(pairs))])


@pytest.fixture(scope="session")
def singles(pairs_folder):
    """The 32 images of the pairs one by one: the chosen ones good, the rejected ones bad."""
    return open_images(pairs_folder)


@pytest.fixture
def run_of(tmp_path, model_folder, singles, shared_cache):
    """``run_of(config class, trainer class, name, **options)``: on single images and the tiny model."""

    def make(config, trainer, name="run", dataset=None, **options):
        settings = {
            "output_dir": str(tmp_path / name),
            "cache_dir": str(shared_cache),
            "train_batch_size": 8,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "rank": 4,
            "checkpointing_steps": 0,
            "progress": False,
        }
        return trainer(config(**(settings | options)), model=model_folder, dataset=dataset or singles)

    return make


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trainer(tmp_path, model_folder, pairs, shared_cache):
    """``trainer(name, **options)``: Diffusion-DPO on the tiny model, eight pairs per step, no progress."""

    def make(name="run", model=None, dataset=None, **options):
        settings = {
            "output_dir": str(tmp_path / name),
            "cache_dir": str(shared_cache),
            "train_batch_size": 8,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "rank": 4,
            "checkpointing_steps": 0,
            "progress": False,
        }
        config = DiffusionDPOConfig(**(settings | options))
        return DiffusionDPOTrainer(config, model=model or model_folder, dataset=dataset or pairs)

    return make


@pytest.fixture
def log():
    """``log(folder)``: the records of its log.jsonl."""
    return lambda folder: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
