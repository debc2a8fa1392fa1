"""Opening pairs from all sources; what happens to bad rows and wrong columns."""

import json
import logging
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.data import BadRow, Pair, PairDataset, images, open_pairs, tables, write_pairs
from diffalign.errors import UserError


def pixels(image) -> list:
    return np.asarray(image).tolist()


@pytest.fixture
def pick(make) -> datasets.Dataset:
    """Four rows as Pick-a-Pic has them: image 0 wins, image 1 wins, a tie, nobody voted."""
    return datasets.Dataset.from_dict(
        {
            "caption": ["a", "b", "c", "d"],
            "jpg_0": [make.encoded(make.picture(i)) for i in range(4)],
            "jpg_1": [make.encoded(make.picture(10 + i)) for i in range(4)],
            "label_0": [1.0, 0.0, 0.5, 1.0],
            "label_1": [0.0, 1.0, 0.5, 0.0],
            "has_label": [True, True, True, False],
            "ranking_id": [7, 8, 9, 10],
        }
    )


def check_pick(make, dataset: PairDataset) -> None:
    assert [(p.id, p.prompt, p.preference) for p in dataset] == [("7", "a", 1.0), ("8", "b", 1.0)]
    assert pixels(dataset[0].chosen) == pixels(make.picture(0))
    assert pixels(dataset[0].rejected) == pixels(make.picture(10))
    assert pixels(dataset[1].chosen) == pixels(make.picture(11))
    assert dataset.skipped == [BadRow(2, "9", "tie"), BadRow(3, "10", "no label")]


def test_pick_a_pic_columns(make, pick):
    check_pick(make, open_pairs(pick))


def test_parquet_file_and_folder_with_splits(make, pick, tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    pick.select([0, 1]).to_parquet(tmp_path / "set/data/train-00000-of-00002.parquet")
    pick.select([2, 3]).to_parquet(tmp_path / "set/data/train-00001-of-00002.parquet")
    pick.select([0]).to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    check_pick(make, open_pairs(tmp_path / "set"))
    assert len(open_pairs(tmp_path / "set", split="test")) == 1
    assert len(open_pairs(str(tmp_path / "set/data/train-00000-of-00002.parquet"))) == 2
    with pytest.raises(UserError, match=r"no split 'tset'; did you mean 'test'\? \(found: test, train\)"):
        open_pairs(tmp_path / "set", split="tset")


def test_saved_to_disk_and_dataset_dict(make, pick, tmp_path):
    pick.save_to_disk(tmp_path / "one")
    check_pick(make, open_pairs(tmp_path / "one"))
    both = datasets.DatasetDict({"train": pick, "test": pick.select([0])})
    both.save_to_disk(tmp_path / "two")
    check_pick(make, open_pairs(tmp_path / "two"))
    assert len(open_pairs(both, split="test")) == 1
    with pytest.raises(UserError, match="has no split 'x'; choose one of train, test"):
        open_pairs(both, split="x")
    with pytest.raises(UserError, match="has several splits; choose one of a, b"):
        open_pairs(datasets.DatasetDict({"a": pick, "b": pick}))
    with pytest.raises(UserError, match="without splits"):
        open_pairs(pick, split="train")
    with pytest.raises(UserError, match="streaming"):
        open_pairs(pick.to_iterable_dataset())


def test_image_features_stay_encoded_until_asked_for(make, monkeypatch):
    features = datasets.Features(
        {"caption": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    rows = {"caption": ["a", "b"], "chosen": [make.picture(0)] * 2, "rejected": [make.picture(1)] * 2}
    dataset = datasets.Dataset.from_dict(rows, features=features).with_format("numpy")

    def refuse(*_):
        raise AssertionError("an image was touched")

    with monkeypatch.context() as patch:
        patch.setattr(tables.HFTable, "cell", refuse)
        patch.setattr(images, "decode", refuse)
        patch.setattr("PIL.Image.open", refuse)
        pairs = open_pairs(dataset, scan=0)
        assert pairs.prompts == ["a", "b"]
        assert pairs.preferences == [1.0, 1.0]
        assert pairs.ids == ["row-0", "row-1"]
        assert len(pairs[1:]) == 1
    assert pixels(pairs[0].chosen) == pixels(make.picture(0))


def test_opening_pairs_loads_neither_torch_nor_datasets(make, tmp_path):
    folder = write_pairs(tmp_path / "set", make.lists(1))
    code = f"""if True:
        import sys
        from diffalign.data import open_pairs
        assert open_pairs({str(folder)!r})[0].prompt
        assert not {{"torch", "datasets", "pyarrow"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_rows_of_a_filtered_and_shuffled_dataset(make, pick):
    shuffled = pick.select([1, 0])
    assert [p.id for p in open_pairs(shuffled)] == ["8", "7"]


def test_jsonl_paths_are_relative_to_its_folder(make, tmp_path):
    row = {"prompt": "a", "chosen": make.encoded(make.picture(0)), "rejected": make.encoded(make.picture(1))}
    folder = make.jsonl_folder(tmp_path / "set", [row, "", row | {"prompt": "b", "preference": 0.8}])
    for source in (folder, str(folder), folder / "pairs.jsonl"):
        first, second = open_pairs(source)
        assert (first.id, first.preference, second.id, second.preference) == ("line-1", 1.0, "line-3", 0.8)
        assert pixels(first.chosen) == pixels(make.picture(0))
    (folder / "pairs.jsonl").rename(folder / "metadata.jsonl")
    assert open_pairs(folder).prompts == ["a", "b"]


def test_split_folders_of_jsonl(make, tmp_path):
    row = {"prompt": "a", "chosen": make.encoded(make.picture(0)), "rejected": make.encoded(make.picture(1))}
    make.jsonl_folder(tmp_path / "set/train", [row])
    assert len(open_pairs(tmp_path / "set", split="train")) == 1
    make.jsonl_folder(tmp_path / "set", [row])
    with pytest.raises(UserError, match="has no split 'valid'"):
        open_pairs(tmp_path / "set", split="valid")


def test_a_preference_below_one_half_swaps_the_pair(make, tmp_path):
    row = {"prompt": "a", "chosen": make.encoded(make.picture(0)), "rejected": make.encoded(make.picture(1))}
    pair = open_pairs(make.jsonl_folder(tmp_path, [row | {"preference": 0.25}]))[0]
    assert pair.preference == 0.75
    assert pixels(pair.chosen) == pixels(make.picture(1))


def test_hub_names_go_to_load_dataset(make, pick, monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split: asked.append((name, split)) or datasets.DatasetDict(train=pick),
    )
    check_pick(make, open_pairs("hf://datasets/owner/name"))
    assert asked == [("owner/name", None)]

    def offline(name, split):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"can't load owner/name from the Hub: no route$"):
        open_pairs("hf://owner/name")


def test_missing_column_is_named_with_the_nearest_found():
    rows = {"prompt": ["a"], "choosen": ["x"], "rejected": ["y"]}
    with pytest.raises(UserError, match=r"no column 'chosen'; did you mean 'choosen'\? \(found: prompt, cho"):
        open_pairs(datasets.Dataset.from_dict(rows))
    rows = {"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"y"], "label": [1.0]}
    with pytest.raises(UserError, match=r"no column 'label_0'; did you mean 'label'\?"):
        open_pairs(datasets.Dataset.from_dict(rows))
    with pytest.raises(UserError, match=r"no column 'prompt' \(found: text, win, lose\)"):
        open_pairs(datasets.Dataset.from_dict({"text": ["a"], "win": [b"x"], "lose": [b"y"]}))


def test_other_column_names(make):
    rows = {"text": ["a"], "win": [make.encoded(make.picture(0))], "lose": [make.encoded(make.picture(1))]}
    dataset = datasets.Dataset.from_dict(rows)
    names = {"prompt": "text", "chosen": "win", "rejected": "lose"}
    assert open_pairs(dataset, columns=names)[0].prompt == "a"
    with pytest.raises(UserError, match=r"no column 'wins', wanted as chosen; did you mean 'win'\?"):
        open_pairs(dataset, columns=names | {"chosen": "wins"})
    with pytest.raises(UserError, match=r"unknown column role 'winner'"):
        open_pairs(dataset, columns=names | {"winner": "win"})


def test_sources_that_are_none(tmp_path):
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UserError, match=r"no such file or folder; did you mean 'pairs'\?"):
        open_pairs(tmp_path / "pears")
    with pytest.raises(UserError, match="holds no pairs"):
        open_pairs(tmp_path / "pairs")
    (tmp_path / "pairs.csv").write_text("a")
    with pytest.raises(UserError, match=r"neither \.jsonl nor \.parquet nor \.tar nor \.json"):
        open_pairs(tmp_path / "pairs.csv")
    (tmp_path / "pairs.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="can't read the parquet"):
        open_pairs(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="has no splits"):
        open_pairs(tmp_path / "pairs.parquet", split="train")
    with pytest.raises(UserError, match="from a list"):
        open_pairs([1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ties": "maybe"}, "ties must be"), ({"limit": 0}, "limit"), ({"max_bad": 2}, "max_bad is a share")],
)
def test_options_are_checked(pick, options, message):
    with pytest.raises(UserError, match=message):
        open_pairs(pick, **options)


def test_ties(pick):
    assert open_pairs(pick, ties="soft").preferences == [1.0, 1.0, 0.5]
    with pytest.raises(UserError, match=r"ties in the data set: 1 \(first: 9\)"):
        open_pairs(pick, ties="error")
    with pytest.raises(UserError, match="no usable pair in the data set: 1 tie, 1 no label"):
        open_pairs(pick.select([2, 3]))


def test_limit_counts_usable_rows(make, pick):
    both = datasets.concatenate_datasets([pick.select([2]), pick])
    assert open_pairs(both, limit=1).ids == ["7"]
    assert open_pairs(both, limit=99).ids == ["7", "8"]


DAMAGE = {
    "empty caption": {"prompt": "  "},
    "caption is not text": {"prompt": 5},
    "no label": {"label_0": None},
    "tie": {"label_0": 0.5},
    "label outside 0..1": {"label_0": 3},
    "missing image": {"jpg_1": "gone.png"},
    "unreadable image": {"jpg_0": b"\x89PNG half of it"},
    "identical images": {},
    "unreadable line": {},
}
FROM_PIXELS = ("missing image", "unreadable image", "identical images")


@settings(max_examples=40, deadline=None)
@given(kinds=st.lists(st.sampled_from(["good", *DAMAGE]), min_size=1, max_size=10))
def test_any_mixture_of_bad_rows_is_counted_and_replaced(make, kinds):
    rows: list = []
    for i, kind in enumerate(kinds):
        row = {"caption": f"row {i}", "label_0": 1}
        row |= {f"jpg_{side}": make.encoded(make.picture(2 * i + side)) for side in (0, 1)}
        damage = {("caption" if k == "prompt" else k): v for k, v in DAMAGE.get(kind, {}).items()}
        row |= damage
        if kind == "identical images":
            row["jpg_1"] = row["jpg_0"]
        rows.append("{broken" if kind == "unreadable line" else row)
    with tempfile.TemporaryDirectory() as folder:
        make.jsonl_folder(Path(folder), rows)
        kept = [i for i, kind in enumerate(kinds) if kind == "good" or kind in FROM_PIXELS]
        if not kept:
            with pytest.raises(UserError):
                open_pairs(folder, max_bad=1)
            return
        pairs = open_pairs(folder, max_bad=1, scan=0)
        assert pairs.prompts == [f"row {i}" for i in kept]
        for position, i in enumerate(kept):  # the bytes of a broken image are there, and hashed
            digests = pairs.digests(position)
            assert (digests is None) == (kinds[i] in ("missing image", "identical images"))
            assert digests is None or kinds[i] != "good" or digests == pairs[position].digests
        good = [i for i in kept if kinds[i] == "good"]
        if not good:
            with pytest.raises(UserError, match="no usable pair in "):
                pairs[0]
            return
        for position in range(len(kept)):
            stand_in = next(j for j in kept[position:] + kept if j in good)
            assert pairs[position].prompt == f"row {stand_in}"
            assert pixels(pairs[position].rejected) == pixels(make.picture(2 * stand_in + 1))
        expected = Counter(kind for kind in kinds if kind != "good")
        assert Counter(bad.reason for bad in pairs.skipped) == expected
        assert [bad.row for bad in pairs.skipped] == [i for i, kind in enumerate(kinds) if kind != "good"]


def test_too_many_bad_rows_are_refused_and_can_be_allowed(make, tmp_path):
    row = {"prompt": "a", "chosen": make.encoded(make.picture(0)), "rejected": make.encoded(make.picture(1))}
    rows = [row] * 99 + [row | {"chosen": b"broken"}]
    assert len(open_pairs(make.jsonl_folder(tmp_path / "one", rows))) == 100  # 1 % is allowed
    rows = [row] * 98 + [row | {"chosen": b"broken"}, row | {"prompt": ""}]
    folder = make.jsonl_folder(tmp_path / "two", rows)
    with pytest.raises(
        UserError, match=r"2\.0% .* are bad \(1 unreadable image, 1 empty caption; first: line-99"
    ):
        open_pairs(folder)
    assert len(open_pairs(folder, max_bad=0.02)) == 99


def test_a_sample_is_enough_to_refuse(make, monkeypatch):
    read = Counter()
    original = PairDataset.read
    monkeypatch.setattr(PairDataset, "read", lambda self, i: read.update([i]) or original(self, i))
    make.lists(64)
    assert len(read) == 64
    read.clear()
    rows = {"prompt": ["a"] * 1000, "chosen": [make.picture(0)] * 1000, "rejected": [b"x"] * 1000}
    with pytest.raises(UserError, match=r"100\.0%"):
        PairDataset.from_lists(*rows.values())
    assert len(read) == 256
    assert max(read) > 990


def test_replacement_is_told_once(make, tmp_path, caplog):
    row = {"prompt": "a", "chosen": make.encoded(make.picture(0)), "rejected": make.encoded(make.picture(1))}
    pairs = open_pairs(make.jsonl_folder(tmp_path, [row | {"chosen": b"x"}, row]), max_bad=1)
    with caplog.at_level(logging.WARNING):
        assert pairs[0].id == pairs[0].id == "line-2"
    assert pairs.summary() == "1 pairs, 1 prompts (left out: 1 unreadable image)"
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}/pairs.jsonl: line-1 (unreadable image) is replaced by line-2"
    ]


def test_sequence_behaviour(make):
    pairs = make.lists(5)
    assert len(pairs) == 5
    assert pairs[-1].id == "row-4"
    assert [p.id for p in pairs[1:3]] == ["row-1", "row-2"]
    assert [p.id for p in pairs.select([4, 0])] == ["row-4", "row-0"]
    with pytest.raises(IndexError):
        pairs[5]
    assert pairs.summary() == "5 pairs, 3 prompts"


def test_split_by_prompt_shares_none_and_is_stable(make):
    pairs = make.lists(120, prompts=60)
    rest, held = pairs.split_by_prompt(0.3)
    assert len(rest) + len(held) == 120
    assert not set(rest.prompts) & set(held.prompts)
    assert 0.1 < len(set(held.prompts)) / 60 < 0.5
    assert set(make.lists(80, prompts=40).split_by_prompt(0.3)[1].prompts) <= set(held.prompts)
    assert set(pairs.split_by_prompt(0.3, seed=1)[1].prompts) != set(held.prompts)


def test_lists_must_match(make):
    with pytest.raises(UserError, match="2 prompt, 1 chosen, 1 rejected"):
        PairDataset.from_lists(["a", "b"], [make.picture(0)], [make.picture(1)])
    pair = PairDataset.from_lists(
        ["a"], [make.picture(0)], [make.picture(1)], preferences=np.float32([0.25]), ids=[5]
    )[0]
    assert (pair.id, pair.preference) == ("5", 0.75)
    with pytest.raises(UserError, match="it is empty"):
        PairDataset.from_lists([], [], [])


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(texts, texts, st.floats(0.5, 1), st.integers(0, 99)), min_size=1, max_size=4),
)
def test_written_pairs_read_back_the_same(make, rows):
    written = [
        Pair(name, prompt, make.picture(seed, (9, 14)), make.picture(seed + 100, (12, 8)), preference)
        for name, prompt, preference, seed in rows
    ]
    with tempfile.TemporaryDirectory() as parent:
        folder = write_pairs(Path(parent) / "set", iter(written))
        read = list(open_pairs(folder, ties="soft"))
        assert sorted(p.name for p in Path(parent).iterdir()) == ["set"]
    assert [(p.id, p.prompt, p.preference) for p in read] == [(p.id, p.prompt, p.preference) for p in written]
    for a, b in zip(read, written, strict=True):
        assert pixels(a.chosen) == pixels(b.chosen)
        assert pixels(a.rejected) == pixels(b.rejected)


def test_writing_is_all_or_nothing(make, tmp_path):
    pairs = make.lists(2)
    folder = write_pairs(tmp_path / "set", pairs)
    before = (folder / "pairs.jsonl").read_text()

    def interrupted():
        yield pairs[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(folder, interrupted(), overwrite=True)
    assert (folder / "pairs.jsonl").read_text() == before
    with pytest.raises(UserError, match="is not empty"):
        write_pairs(folder, pairs)
    write_pairs(folder, pairs[:1], overwrite=True)
    assert len(open_pairs(folder)) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_writing_spares_what_are_no_pairs(make, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="holds no pairs, so it is not overwritten"):
        write_pairs(tmp_path, make.lists(1), overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        write_pairs(tmp_path / "thesis.txt", make.lists(1))
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_lines_of_json_that_hold_no_object(make, tmp_path):
    row = {"prompt": "a", "chosen": make.encoded(make.picture(0)), "rejected": make.encoded(make.picture(1))}
    pairs = open_pairs(make.jsonl_folder(tmp_path, ["[1]", "3", json.dumps(None), row]), max_bad=1)
    assert pairs.ids == ["line-4"]
    assert {bad.reason for bad in pairs.skipped} == {"unreadable line"}
