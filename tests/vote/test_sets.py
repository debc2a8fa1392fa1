"""What is shown: every form of input, and the pairs and sets made of it."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.data import write_pairs
from diffalign.data.pairs import Pair
from diffalign.errors import UserError
from diffalign.vote import sets
from diffalign.vote.sets import ImageSet, arrange, read_sets, shuffled


def found(source) -> dict[str, list[str]]:
    """Prompt -> names of images, and nothing left out."""
    read, left_out = read_sets(source)
    assert not left_out
    return {one.prompts[0]: [image.name for image in one.images] for one in read}


def table(folder: Path, rows: list[dict], name: str = "pairs.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_folder_of_samples_is_grouped_by_prompt(folder):
    expected = {
        "a red star": [f"0000{i}.png" for i in range(3)],
        "two blue rings": ["00003.png", "00004.png"],
    }
    assert found(folder) == found(folder / "metadata.jsonl") == expected
    assert found(str(folder.parent / "." / "images")) == expected


def test_a_folder_for_each_prompt_or_one_such_folder(tmp_path, helpers):
    for number, name in enumerate(["a_red_star/1.png", "a_red_star/2.JPG", "x/1.webp", "x/2.png"]):
        helpers.picture(tmp_path / name, number)
    (tmp_path / "x" / "prompt.txt").write_text("two blue rings?\n")
    (tmp_path / "notes").mkdir()
    assert found(tmp_path) == {"a red star": ["1.png", "2.JPG"], "two blue rings?": ["1.webp", "2.png"]}
    assert found(tmp_path / "x") == {"two blue rings?": ["1.webp", "2.png"]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "0.png", "rejected": "1.png"},
        {"caption": "p", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": None},
        {"prompt": "p", "image_0": "0.png", "image_1": "1.png"},  # nobody has judged it yet
        {"prompt": ["p", "q"], "images": ["0.png", "1.png"]},
        {"prompt": "p", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]},
        {"prompt": "p", "image_path": ["0.png", "1.png"], "rank": [1, 0]},
    ],
    ids=lambda row: "-".join(row),
)
def test_pairs_and_lists_labelled_or_not(tmp_path, helpers, row):
    for number in range(2):
        helpers.picture(tmp_path / f"{number}.png", number)
    assert found(table(tmp_path, [row])) == {"p": ["0.png", "1.png"]}


def test_what_cannot_be_shown_is_left_out_and_counted(tmp_path, helpers):
    helpers.picture(tmp_path / "good.png")
    helpers.picture(tmp_path / "tiny.png", size=(2, 16))
    (tmp_path / "text.png").write_text("<svg onload='alert(1)'/>")
    images = ["good.png", "tiny.png", "text.png", "none.png", "."]
    rows = [
        {"prompt": "p", "images": images},
        {"prompt": " ", "images": images[:2]},
        {"prompt": "q", "images": None},
    ]
    read, left_out = read_sets(table(tmp_path, [*rows, rows[0]]))
    assert read == [ImageSet(("p",), (tmp_path / "good.png",))] * 2
    assert left_out == {"tiny image": 1, "unreadable image": 1, "missing image": 2, "empty caption": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "0.png"}], "no column 'prompt'"),
        ([{"prompt": "p", "picture": "0.png"}], "no column 'image'"),
        ([{"prompt": "p", "image_0": "0.png"}], "no column 'jpg_1'"),
        ([{"prompt": "p", "images": [{"bytes": "x"}]}], "no files.*data convert"),
    ],
)
def test_wrong_columns_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_sets(table(tmp_path, rows))


def test_images_inside_files_cannot_be_named(tmp_path, helpers):
    a, b = (Image.open(helpers.picture(tmp_path / f"{i}.png", i)) for i in (0, 1))
    tar = write_pairs(tmp_path / "tar", [Pair("0", "p", a, b)], format="tar")
    for source in (tar, "hf://owner/name"):
        with pytest.raises(UserError, match=r"no files.*data convert"):
            read_sets(source)
    with pytest.raises(UserError, match="no such file or folder"):
        read_sets(tmp_path / "nothing")


# ------------------------------------------------------------------------------------- pairs and sets of them

names = st.integers(1, 13).map(lambda n: tuple(Path(f"/{i:02d}.png") for i in range(n)))


@given(names, st.integers(0, 3), st.integers(1, 100))
def test_every_pair_comes_up_once_and_no_image_oftener_than_others(images, seed, few):
    options = {"set_size": 9, "seed": seed}
    pairs = arrange([ImageSet(("p",), images)], "pair", per_prompt=None, **options)
    assert {frozenset(pair.images) for pair in pairs} == set(map(frozenset, combinations(images, 2)))
    assert len(pairs) == len(images) * (len(images) - 1) // 2
    some = arrange([ImageSet(("p",), images)], "pair", per_prompt=few, **options)
    assert some == pairs[:few]
    count = Counter(image for pair in some for image in pair.images)
    assert max(count[i] for i in images) - min(count[i] for i in images) <= 2


@given(names, st.integers(2, 9), st.sampled_from(["rank", "rate"]))
def test_sets_are_about_equal_parts(images, most, mode):
    tasks = arrange([ImageSet(("p",), images)], mode, set_size=most, per_prompt=None, seed=0)
    shown = [image for task in tasks for image in task.images]
    alone = mode == "rank" and len(images) == 1  # nothing to compare it with
    assert sorted(set(shown)) == ([] if alone else list(images))
    assert len(shown) - len(set(shown)) <= (most == 2)  # three in sets of two: one is shown twice
    sizes = [len(task.images) for task in tasks] or [0]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


def test_annotators_judge_the_same_in_an_order_of_their_own():
    images = tuple(Path(f"/{i}.png") for i in range(7))
    tasks = arrange([ImageSet(("p",), images)], "pair", set_size=9, per_prompt=14, seed=1)
    anna, bob = (shuffled(tasks, name, 1) for name in ("anna", "bob"))
    assert {t.key for t in anna} == {t.key for t in bob} == {t.key for t in tasks}
    assert [t.key for t in anna] != [t.key for t in bob] != [t.key for t in tasks]
    assert anna == shuffled(tasks, "anna", 1) != shuffled(tasks, "anna", 2)
    many = shuffled([ImageSet((str(i),), images[:2]) for i in range(2000)], "anna", 0)
    assert 900 < sum(task.images == images[:2] for task in many) < 1100  # each side half of the time


def test_more_than_anybody_can_judge_is_refused(monkeypatch):
    monkeypatch.setattr(sets, "MOST_TASKS", 20)
    images = ImageSet(("p",), tuple(Path(f"/{i}.png") for i in range(7)))
    assert len(arrange([images], "pair", set_size=9, per_prompt=20, seed=0)) == 20
    with pytest.raises(UserError, match="--per_prompt"):
        arrange([images], "pair", set_size=9, per_prompt=None, seed=0)
