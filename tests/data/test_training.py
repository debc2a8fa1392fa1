"""What the data layer says of a pair reaches the training step."""

from pathlib import Path

import datasets
import pytest
import torch

from diffalign.bench.networks import tiny_pipeline
from diffalign.data import Selection
from diffalign.errors import UserError
from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer


def trainer(make, folder: Path, columns: dict, **options) -> DiffusionDPOTrainer:
    rows = {
        "prompt": [f"p{i}" for i in range(4)],
        "chosen": [make.encoded(make.picture(i)) for i in range(4)],
        "rejected": [make.encoded(make.picture(50 + i)) for i in range(4)],
    }
    datasets.Dataset.from_dict(rows | columns).to_parquet(folder / "pairs.parquet")
    config = DiffusionDPOConfig(
        dataset_name=str(folder / "pairs.parquet"),
        output_dir=str(folder / "out"),
        train_batch_size=4,
        max_train_steps=1,
        progress=False,
        **options,
    )
    made = DiffusionDPOTrainer(config, model=tiny_pipeline())
    made.train()
    return made


def test_each_image_is_told_its_own_caption_and_both_lose_it_together(make, tmp_path):
    own = {"caption_chosen": ["a"] * 4, "caption_rejected": ["b c d"] * 4}
    made = trainer(make, tmp_path, own, proportion_empty_prompts=0.5)
    batches = [made.batch(step, range(4)) for step in range(4)]
    assert 0 < sum(batch.empty for batch in batches) < 16
    for batch in batches:
        for chosen, rejected in zip(*batch.cond["prompt_embeds"].chunk(2), strict=True):
            nothing = made.no_caption["prompt_embeds"][0].to(chosen)
            assert torch.equal(chosen, nothing) == torch.equal(rejected, nothing)
            assert torch.equal(chosen, rejected) == torch.equal(chosen, nothing)


def test_weights_of_prompts_reach_the_loss(make, tmp_path):
    made = trainer(make, tmp_path, {"prompt": ["a", "a", "a", "b"]}, selection={"prompt_weights": True})
    losses, _ = made.losses(0, range(4))
    weight = made.batch(0, range(4)).weight
    assert sorted(weight.tolist()) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    made.data = made.data.__class__(**{**vars(made.data), "weight": torch.ones(4)})
    torch.testing.assert_close(losses, made.losses(0, range(4))[0] * weight)


def test_an_unknown_selection_is_refused(make):
    with pytest.raises(UserError, match=r"unknown selection 'vote'; did you mean 'votes'\?"):
        Selection.of({"vote": "share"})
    assert Selection.of({"votes": "share", "min_side": 8}) == Selection(votes="share", min_side=8)
