"""The cache of latents and text embeddings: what it holds, and that nothing kills it."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import torch

from diffalign.data import PairDataset, Selection, cache, open_images, open_pairs, write_pairs
from diffalign.data.cache import cached_examples
from diffalign.data.transforms import View, fit
from diffalign.errors import RunFailed, UserError

RESOLUTION = 16


class Encoders:
    """Stand-ins for autoencoder and text encoder. Images of one batch influence one another a little."""

    def __init__(self) -> None:
        self.images = 0
        self.prompts: list[str] = []

    def encode_images(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        assert pixels.dtype == torch.float32
        assert pixels.shape[1:] == (3, RESOLUTION, RESOLUTION)
        assert pixels.abs().max() <= 1
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 4) + pixels.mean() / 100
        return {"mean": mean, "std": mean.abs() / 8 + 0.01}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.prompts += prompts
        numbers = torch.tensor([float(prompt.split()[-1]) for prompt in prompts])
        return {
            "prompt_embeds": numbers[:, None, None].expand(-1, 5, 3),
            "mask": torch.ones(len(prompts), 5).bool(),
        }


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ROWS", 10)


def build(dataset, folder=None, encoders: Encoders | None = None, **options):
    encoders = encoders or Encoders()
    defaults = {"key": {"model": "toy"}, "resolution": RESOLUTION, "batch_size": 4}
    return cached_examples(
        dataset,
        folder,
        encode_images=encoders.encode_images,
        encode_prompts=encoders.encode_prompts,
        **defaults | options,
    )


def assert_same(a, b) -> None:
    assert (a.ids, a.prompts) == (b.ids, b.prompts)
    assert torch.equal(a.latents, b.latents)
    assert torch.equal(a.std, b.std)
    for name in a.cond:
        assert torch.equal(a.cond[name], b.cond[name])


def test_holds_what_the_encoders_gave(make):
    pairs = make.lists(7, size=(24, 16))
    held = build(pairs, dtype=torch.float32, batch_size=1)
    assert len(held) == 7
    assert held.in_memory
    for i in range(7):
        row, pair = held[i], pairs[i]
        for side, image in enumerate((pair.chosen, pair.rejected)):
            expected = Encoders().encode_images(fit(image, RESOLUTION).pixels[None])["mean"][0]
            assert torch.equal(row["latents"][side], expected)
        assert row["latents"].shape == (2, 3, 4, 4)
        assert row["cond"]["prompt_embeds"].shape == (5, 3)
        assert (row["cond"]["prompt_embeds"] == i % 3).all()
        assert row["cond"]["mask"].dtype == torch.bool
        assert row["original_size"].tolist() == [[16, 24]] * 2
        assert row["crop_top_left"].tolist() == [[0, 4]] * 2
    assert held.latents.shape == (7, 2, 3, 4, 4)
    assert torch.equal(held.latents[3], held[3]["latents"])
    assert held.cond["prompt_embeds"].shape == (3, 5, 3)
    assert held.prompt_index.tolist() == [i % 3 for i in range(7)]
    with pytest.raises(IndexError):
        held[7]


def test_prompts_and_repeated_images_are_encoded_once(make):
    image, encoders = make.picture(0), Encoders()
    pairs = PairDataset.from_lists(["p 1"] * 6, [image] * 6, [make.picture(i) for i in range(1, 7)])
    held = build(pairs, encoders=encoders)
    assert encoders.images == 7
    assert encoders.prompts == ["p 1"]
    assert torch.equal(held.latents[0, 0], held.latents[5, 0])


def test_opening_again_encodes_and_decodes_nothing(make, tmp_path, monkeypatch):
    pairs = open_pairs(write_pairs(tmp_path / "set", make.lists(12)))
    first = build(pairs, tmp_path / "cache")
    encoders = Encoders()
    monkeypatch.setattr("diffalign.data.images.decode", lambda _: pytest.fail("decoded"))
    assert_same(build(pairs, tmp_path / "cache", encoders), first)
    assert (encoders.images, encoders.prompts) == (0, [])


def test_another_order_or_more_rows_cost_the_new_rows_only(make, tmp_path):
    pairs = make.lists(12)
    first = build(pairs[:10], tmp_path)
    encoders = Encoders()
    again = build(pairs.select([11, 3, 0]), tmp_path, encoders)
    assert encoders.images == 2
    assert again.ids == ["row-11", "row-3", "row-0"]
    assert torch.equal(again.latents[1:], first.latents[[3, 0]])


@pytest.mark.parametrize(
    ("options", "images", "prompts"),
    [
        ({"key": {"model": "other"}}, 8, 3),
        ({"dtype": torch.bfloat16}, 8, 3),
        ({"center_crop": False}, 8, 0),
        ({"random_flip": True}, 8, 0),  # the mirrored ones are new
        ({"batch_size": 3}, 0, 0),
    ],
)
def test_what_makes_an_entry_another(make, tmp_path, options, images, prompts):
    pairs = make.lists(4, size=(40, 16))
    build(pairs, tmp_path)
    encoders = Encoders()
    build(pairs, tmp_path, encoders, **options)
    assert (encoders.images, len(encoders.prompts)) == (images, prompts)


def test_resolutions_share_a_folder(make, tmp_path):
    pairs = make.lists(3, size=(32, 32))
    build(pairs, tmp_path)
    plain = lambda pixels: pixels[:, :, ::8, ::8]  # noqa: E731
    texts = Encoders()
    other = cached_examples(
        pairs,
        tmp_path,
        encode_images=plain,
        encode_prompts=texts.encode_prompts,
        key={"model": "toy"},
        resolution=(24, 32),
    )
    assert other.latents.shape == (3, 2, 3, 3, 4)
    assert other.std is None
    assert texts.prompts == []


def test_batches_sample_moments_and_flips_from_the_generator(make):
    pairs = make.lists(40)
    held = build(pairs, random_flip=True, dtype=torch.float32)
    index = torch.arange(40)
    plain = held.batch(index)["latents"]
    assert torch.equal(plain, held.latents)
    draws = [held.batch(index, torch.Generator().manual_seed(seed))["latents"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # Which variant was drawn: the nearer one. Noise is 1/8 of the mean, far below the distance of the mirror.
    mirrored = plain.flip(-1)
    nearer = (draws[0] - plain).square().mean((2, 3, 4)) > (draws[0] - mirrored).square().mean((2, 3, 4))
    assert 8 < nearer[:, 0].sum() < 32
    assert torch.equal(nearer[:, 0], nearer[:, 1])
    noise = torch.where(nearer[:, :, None, None, None], draws[0] - mirrored, draws[0] - plain)
    scale = torch.where(nearer[:, :, None, None, None], held.std.flip(-1), held.std)
    assert abs((noise / scale).std() - 1) < 0.05
    apart = build(pairs, random_flip=True, joint=False, dtype=torch.float32)
    drawn = apart.batch(index, torch.Generator().manual_seed(1))["latents"]
    nearer = (drawn - plain).square().mean((2, 3, 4)) > (drawn - mirrored).square().mean((2, 3, 4))
    assert not torch.equal(nearer[:, 0], nearer[:, 1])


def test_random_crops_are_joint_and_fixed(make):
    pairs = make.lists(20, size=(60, 16))
    held = build(pairs, center_crop=False, dtype=torch.float32, batch_size=1)
    corners = held.batch(range(20))["crop_top_left"]
    assert torch.equal(corners[:, 0], corners[:, 1])
    assert len(set(corners[:, 0, 1].tolist())) > 8
    assert torch.equal(build(pairs, center_crop=False).batch(range(20))["crop_top_left"], corners)
    left = int(corners[0, 0, 1])
    view = next(
        v
        for v in (View(0, left / 44), View(0.5, left / 44))
        if fit(pairs[0].chosen, 16, v).crop_top_left[1] == left
    )
    expected = Encoders().encode_images(fit(pairs[0].chosen, 16, view).pixels[None])["mean"][0]
    assert torch.equal(held.latents[0, 0], expected)
    apart = build(pairs, center_crop=False, joint=False).batch(range(20))["crop_top_left"]
    assert not torch.equal(apart[:, 0], apart[:, 1])


def test_preferences_and_stand_ins(make, tmp_path):
    rows = [
        {
            "prompt": f"p {i}",
            "chosen": make.encoded(make.picture(i)),
            "rejected": make.encoded(make.picture(50 + i)),
        }
        for i in range(4)
    ]
    rows[1]["rejected"] = b"broken"
    rows[2]["preference"] = 0.75
    pairs = open_pairs(make.jsonl_folder(tmp_path / "set", rows), max_bad=1)
    for _ in range(2):  # when made, and when read back
        held = build(pairs, tmp_path / "cache")
        assert held.ids == ["line-1", "line-3", "line-3", "line-4"]
        assert held.prompts == ["p 0", "p 2", "p 2", "p 3"]
        assert held.batch([0, 1, 3])["preference"].tolist() == [1.0, 0.75, 1.0]


def test_larger_than_memory_reads_from_disk_the_same(make, tmp_path):
    pairs = make.lists(12)
    held = build(pairs, tmp_path, random_flip=True)
    lazy = build(pairs, tmp_path, random_flip=True, memory_limit=100)
    assert not lazy.in_memory
    index = [11, 0, 5, 5]
    a, b = (c.batch(index, torch.Generator().manual_seed(0)) for c in (held, lazy))
    for name in ("latents", "preference", "original_size", "crop_top_left"):
        assert torch.equal(a[name], b[name])
    assert torch.equal(a["cond"]["prompt_embeds"], b["cond"]["prompt_embeds"])
    with pytest.raises(RuntimeError, match="use batch"):
        _ = lazy.latents


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from test_cache import Encoders, build
from diffalign.data import cache, open_pairs

cache.SHARD_ROWS = 10
class Dying(Encoders):
    def encode_images(self, pixels):
        if self.images >= 26:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels)
build(open_pairs({pairs!r}), {folder!r}, Dying(), progress=False)
"""


def test_resumes_after_a_kill_with_the_numbers_of_an_undisturbed_run(make, tmp_path):
    folder = write_pairs(tmp_path / "set", make.lists(30))
    code = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parent), pairs=str(folder), folder=str(tmp_path / "cache")
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    images = next((tmp_path / "cache").glob("images-*"))
    for name, age in (("0123.1.partial", 7200), ("4567.2.partial", 5)):  # left over; being written by another
        (images / name).write_bytes(b"x")
        os.utime(images / name, (time.time() - age,) * 2)
    encoders = Encoders()
    resumed = build(open_pairs(folder), tmp_path / "cache", encoders)
    assert encoders.images == 60 - 20  # two whole shards were kept
    assert [path.name for path in images.glob("*.partial")] == ["4567.2.partial"]
    assert_same(resumed, build(open_pairs(folder), tmp_path / "undisturbed"))


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "emptied", "no header"])
@pytest.mark.parametrize("kind", ["images", "prompts"])
def test_a_damaged_shard_is_made_again_with_one_line(make, tmp_path, caplog, damage, kind):
    pairs = make.lists(12)
    first = build(pairs, tmp_path)
    shard = sorted(tmp_path.glob(f"{kind}-*/*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if damage == "flipped byte":
        data[-5] ^= 1
    shard.write_bytes(
        {"flipped byte": data, "cut": data[:-20], "emptied": b"", "no header": b"\xff" * 64}[damage]
    )
    encoders = Encoders()
    with caplog.at_level(logging.WARNING):
        again = build(pairs, tmp_path, encoders)
    assert [r.getMessage() for r in caplog.records] == [
        f"cache file {shard} is damaged; what it held is made again"
    ]
    assert 0 < encoders.images + len(encoders.prompts) <= 10
    assert_same(again, first)
    assert_same(build(pairs, tmp_path), first)


def test_values_that_are_not_finite_stop_the_run(make, tmp_path):
    pairs = make.lists(2)
    too_large = lambda pixels: pixels * 1e6  # noqa: E731
    texts = Encoders().encode_prompts
    options = {"encode_prompts": texts, "key": {}, "resolution": 16}
    with pytest.raises(RunFailed, match=r"image encoder gave latents that are not finite in torch.float16"):
        cached_examples(pairs, tmp_path, encode_images=too_large, **options)
    assert not list(tmp_path.glob("*/*.safetensors"))
    assert cached_examples(pairs, encode_images=too_large, dtype=torch.bfloat16, **options).in_memory


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda pixels: pixels[:1], "for 4 inputs"),
        (lambda pixels: {"moments": pixels}, "must give latents, or mean and std"),
        (lambda pixels: pixels[..., : 4 + int(pixels.shape[0])], "rows of one shape"),
    ],
)
def test_encoders_that_break_the_contract(make, encode, message):
    with pytest.raises(ValueError, match=message):
        cached_examples(
            make.lists(6),
            encode_images=encode,
            encode_prompts=Encoders().encode_prompts,
            key={},
            resolution=16,
            batch_size=4,
        )


def test_a_key_must_be_json(make):
    with pytest.raises(UserError, match="must be JSON values"):
        build(make.lists(1), key={"model": object()})


def test_a_changed_encoder_under_an_old_key_is_noticed(make, tmp_path):
    build(make.lists(2), tmp_path)
    with pytest.raises(ValueError, match="encoders that changed need another key"):
        cached_examples(
            make.lists(4),
            tmp_path,
            encode_images=lambda pixels: pixels,
            encode_prompts=Encoders().encode_prompts,
            key={"model": "toy"},
            resolution=16,
        )


def with_captions(make, count: int, **columns) -> PairDataset:
    rows = {
        "prompt": [f"p {i}" for i in range(count)],
        "chosen": [make.encoded(make.picture(i)) for i in range(count)],
        "rejected": [make.encoded(make.picture(50 + i)) for i in range(count)],
    }
    return open_pairs(datasets.Dataset.from_dict(rows | columns))


def test_each_image_has_the_embedding_of_its_own_caption(make, tmp_path):
    own = {"caption_chosen": ["c 10", "", "c 12"], "caption_rejected": ["c 20", "c 21", ""]}
    pairs = with_captions(make, 3, **own)
    for _ in range(2):  # when made, and when read back
        held = build(pairs, tmp_path)
        batch = held.batch([0, 1, 2])
        assert held.own_captions
        assert batch["cond"]["prompt_embeds"][:, 0, 0].tolist() == [10, 1, 12]
        assert batch["cond_rejected"]["prompt_embeds"][:, 0, 0].tolist() == [20, 21, 2]
        assert held[1]["cond_rejected"]["prompt_embeds"].shape == (5, 3)
    assert "cond_rejected" not in build(make.lists(3)).batch([0])


def test_one_of_several_prompts_is_drawn_in_training_and_the_first_otherwise(make):
    pairs = with_captions(make, 2, prompt=[["p 1", "p 2", "p 3"], ["p 7"]])
    held = build(pairs)
    assert held.draws
    assert not held.own_captions
    rows = [0, 1] * 60
    assert held.batch(rows)["cond"]["prompt_embeds"][:, 0, 0].tolist() == [1, 7] * 60
    drawn = [
        held.batch(rows, torch.Generator().manual_seed(s))["cond"]["prompt_embeds"][:, 0, 0]
        for s in (0, 0, 1)
    ]
    assert set(drawn[0][::2].tolist()) == {1, 2, 3}
    assert set(drawn[0][1::2].tolist()) == {7}
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_weights_come_with_the_batch(make):
    table = datasets.Dataset.from_dict(
        {
            "prompt": ["p 1", "p 1", "p 2"],
            "chosen": [make.encoded(make.picture(i)) for i in range(3)],
            "rejected": [make.encoded(make.picture(9 + i)) for i in range(3)],
        }
    )
    held = build(open_pairs(table, selection=Selection(prompt_weights=True)))
    assert held.batch([2, 0])["weight"].tolist() == [1.5, 0.75]


def test_the_mean_alone_is_another_entry_of_half_the_size(make, tmp_path):
    pairs = make.lists(4)
    both, mean = build(pairs, tmp_path), build(pairs, tmp_path, posterior="mean")
    assert mean.std is None
    assert torch.equal(mean.latents, both.latents)
    assert torch.equal(mean.batch([0], torch.Generator())["latents"], mean.batch([0])["latents"])
    assert len(list(tmp_path.glob("images-*"))) == 2
    with pytest.raises(UserError, match="posterior must be one of sample, mean"):
        build(pairs, posterior="mode")


def test_processes_share_the_work_and_see_the_same(make, tmp_path):
    pairs = make.lists(23, prompts=5)
    meeting = threading.Barrier(3, timeout=60)
    encoders = [Encoders() for _ in range(3)]

    def one(rank: int):
        options = {"process": (rank, 3), "barrier": meeting.wait, "batch_size": 1, "progress": False}
        return build(pairs, tmp_path / "shared", encoders[rank], **options)

    with ThreadPoolExecutor(3) as pool:
        held = list(pool.map(one, range(3)))
    assert sorted(e.images for e in encoders) == [14, 16, 16]
    alone = build(pairs, tmp_path / "alone", batch_size=1)
    for one_of_them in held:
        assert_same(one_of_them, alone)
    with pytest.raises(ValueError, match="need a folder and a barrier"):
        build(pairs, tmp_path, process=(0, 2))


# -------------------------------------------------------------------- single images


@pytest.fixture
def singles(make, tmp_path):
    """Six labelled images as a JSONL set."""
    rows = [
        {"image": make.encoded(make.picture(i)), "prompt": f"prompt {i % 3}", "label": i % 2 == 0}
        for i in range(6)
    ]
    return open_images(make.jsonl_folder(tmp_path / "singles", rows))


def test_single_images_come_as_rows_of_one(singles, tmp_path):
    encoders = Encoders()
    cached = build(singles, tmp_path / "cache", encoders)
    assert (cached.sides, len(cached), encoders.images) == (1, 6, 6)
    assert cached.preference.tolist() == [1, 0, 1, 0, 1, 0]
    batch = cached.batch([4, 1])
    assert batch["latents"].shape == (2, 1, 3, RESOLUTION // 4, RESOLUTION // 4)
    assert batch["original_size"].shape == (2, 1, 2)
    assert batch["cond"]["prompt_embeds"][:, 0, 0].tolist() == [1.0, 1.0]
    assert "cond_rejected" not in batch
    torch.testing.assert_close(batch["latents"][0], cached.latents[4].float())
    again = Encoders()
    assert_same(build(singles, tmp_path / "cache", again), cached)
    assert again.images == 0


def test_images_of_pairs_serve_single_images_from_the_same_store(make, tmp_path):
    pairs = make.lists(4)
    build(pairs, tmp_path, random_flip=True)
    again = Encoders()
    folder = write_pairs(tmp_path / "pairs", [pairs[i] for i in range(4)])
    stored = build(open_pairs(folder), tmp_path / "cache", random_flip=True)
    apart = build(open_images(folder), tmp_path / "cache", again, random_flip=True)
    assert again.images == 0
    assert torch.equal(apart.latents[:, 0], stored.latents.flatten(0, 1))
    assert apart.preference.tolist() == [1, 0] * 4
    drawn = apart.batch([0] * 64, torch.Generator().manual_seed(0))["latents"]
    assert len(drawn.unique(dim=0)) > 2  # both variants, and the posterior is sampled
