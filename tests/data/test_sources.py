"""Tar shards, lists, HPDv2, single images; captions, scores and models of each image; votes and filters."""

import io
import json
import tarfile
from itertools import combinations

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.data import Selection, images, open_images, open_pairs, write_pairs
from diffalign.data.rows import CHOICES, image_rows
from diffalign.data.tables import ListTable
from diffalign.errors import UserError


def pixels(image) -> list:
    return np.asarray(image).tolist()


def tar_of(path, files: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(make, count: int, **columns) -> datasets.Dataset:
    """`count` rows of Pick-a-Pic in which image 0 (picture i) beats image 1 (picture 100 + i)."""
    rows = {
        "caption": [f"p{i}" for i in range(count)],
        "jpg_0": [make.encoded(make.picture(i)) for i in range(count)],
        "jpg_1": [make.encoded(make.picture(100 + i)) for i in range(count)],
        "label_0": [1.0] * count,
    }
    return datasets.Dataset.from_dict(rows | columns)


# ------------------------------------------------------------------------------------------------ tar


def test_tar_rows_by_key_in_any_order_of_reading(make, tmp_path):
    files = {}
    for i in range(3):
        files[f"a/{i:03d}.json"] = json.dumps({"prompt": f"p{i}", "preference": 0.75}).encode()
        files[f"a/{i:03d}.chosen.png"] = make.encoded(make.picture(i))
        files[f"a/{i:03d}.rejected.jpg"] = make.encoded(make.picture(50 + i), "JPEG")
    pairs = open_pairs(tar_of(tmp_path / "x.tar", files))
    assert pairs.ids == ["a/000", "a/001", "a/002"]
    assert pixels(pairs[2].chosen) == pixels(make.picture(2))
    assert pixels(pairs[0].chosen) == pixels(make.picture(0))
    assert (pairs[1].prompt, pairs[1].preference) == ("p1", 0.75)


def test_tar_of_text_files_and_pick_a_pic_endings(make, tmp_path):
    files = {
        "7.txt": b" a cat ",
        "7.jpg_0": make.encoded(make.picture(0)),
        "7.jpg_1": make.encoded(make.picture(1)),
        "7.json": b'{"label_0": 0}',
    }
    pair = open_pairs(tar_of(tmp_path / "x.tar", files))[0]
    assert (pair.id, pair.prompt) == ("7", "a cat")
    assert pixels(pair.chosen) == pixels(make.picture(1))


def test_tar_shards_of_a_folder_and_splits(make, tmp_path):
    for split, shard in (("train", 0), ("train", 1), ("test", 0)):
        folder = write_pairs(tmp_path / f"{split}{shard}", make.lists(2 + shard), format="tar")
        (folder / "train-00000.tar").rename(tmp_path / f"{split}-{shard:05d}.tar")
    assert len(open_pairs(tmp_path)) == 5
    assert len(open_pairs(tmp_path, split="test")) == 2


def test_tar_with_a_list_of_numbered_images(make, tmp_path):
    files = {f"1.{i}.png": make.encoded(make.picture(i)) for i in range(3)}
    files["1.json"] = json.dumps({"prompt": "a", "scores": [2, 9, 1]}).encode()
    pair = open_pairs(tar_of(tmp_path / "x.tar", files))[0]
    assert pixels(pair.chosen) == pixels(make.picture(1))
    assert pixels(pair.rejected) == pixels(make.picture(2))


def test_tar_json_that_is_none_is_one_bad_row(make, tmp_path):
    good = {"prompt": "a"}
    files = {}
    for i, text in enumerate([b"{broken", json.dumps(good).encode(), b"[1]"]):
        files[f"{i}.json"] = text
        files[f"{i}.chosen.png"] = make.encoded(make.picture(i))
        files[f"{i}.rejected.png"] = make.encoded(make.picture(9 + i))
    pairs = open_pairs(tar_of(tmp_path / "x.tar", files), max_bad=1)
    assert pairs.ids == ["1"]
    assert [bad.reason for bad in pairs.skipped] == ["unreadable line"] * 2


@pytest.mark.parametrize("damage", ["cut in a file", "cut between files", "a broken header", "not a tar"])
def test_damaged_tar_is_refused(make, tmp_path, damage):
    path = write_pairs(tmp_path / "set", make.lists(3), format="tar") / "train-00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        second = tar.getmembers()[4]
    if damage == "cut in a file":
        data = data[: second.offset_data + 100]
    elif damage == "cut between files":
        data = data[: second.offset]
    elif damage == "a broken header":
        data[second.offset : second.offset + 512] = b"\xff" * 512
    else:
        data = bytearray(b"something else " * 99)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is no whole tar file \(.+\); copy or download it again"):
        open_pairs(path)


def test_compressed_tar_is_refused_with_the_way_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="is compressed; unpack it with gunzip"):
        open_pairs(tmp_path / "x.tar")


# ------------------------------------------------------------------------------------------------ lists


def listed(make, scores: list, prompt: str = "a", **rest) -> ListTable:
    cells = [make.encoded(make.picture(i)) for i in range(5)]
    return datasets.Dataset.from_dict(
        {"prompt": [prompt], "images": [cells], "scores": [scores], **{k: [v] for k, v in rest.items()}}
    )


def test_best_against_worst_of_a_list(make):
    pairs = open_pairs(listed(make, [3.0, 1.0, None, 9.0, 2.0], captions=list("abcde"), id="x"))
    assert [(p.id, p.scores, p.captions) for p in pairs] == [("x", (9.0, 1.0), ("d", "b"))]
    assert pixels(pairs[0].chosen) == pixels(make.picture(3))
    assert open_pairs(listed(make, [1, 1, 1, 1, 1]), ties="soft")[0].preference == 0.5
    with pytest.raises(UserError, match="1 tie"):
        open_pairs(listed(make, [1.0, 1.0]))
    with pytest.raises(UserError, match="1 no label"):
        open_pairs(listed(make, [1.0, float("nan")]))
    with pytest.raises(UserError, match="1 small margin"):
        open_pairs(listed(make, [1.0, 2.0]), selection=Selection(margin=1.5))


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 4), min_size=2, max_size=5), margin=st.sampled_from([0, 1, 2]))
def test_all_pairs_of_a_list(make, scores, margin):
    wanted = {(max(a, b), min(a, b)) for a, b in combinations(scores, 2) if a != b and abs(a - b) >= margin}
    selection = Selection(lists="all", margin=margin)
    if not wanted:
        with pytest.raises(UserError):
            open_pairs(listed(make, scores), selection=selection)
        return
    pairs = open_pairs(listed(make, scores), selection=selection)
    assert {pair.scores for pair in pairs} == wanted
    count = sum(a != b and abs(a - b) >= margin for a, b in combinations(scores, 2))
    assert len(pairs) == len(set(pairs.ids)) == count
    for pair in pairs:
        for image, score in ((pair.chosen, pair.scores[0]), (pair.rejected, pair.scores[1])):
            assert any(pixels(image) == pixels(make.picture(i)) for i, s in enumerate(scores) if s == score)


def test_ranks_are_better_the_lower(make):
    rows = {
        "prompt": ["a"],
        "images": [[make.encoded(make.picture(i)) for i in range(3)]],
        "ranks": [[2, 3, 1]],
    }
    assert pixels(open_pairs(datasets.Dataset.from_dict(rows))[0].chosen) == pixels(make.picture(2))


def test_a_list_shorter_than_its_scores_is_a_bad_row(make):
    table = datasets.Dataset.from_dict(
        {"prompt": ["a"], "images": [[make.encoded(make.picture(0))]], "scores": [[0.0, 1.0]]}
    )
    with pytest.raises(UserError, match="1 missing image"):
        open_pairs(table)


def test_hpdv2(make, tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(4):
        make.picture(i).save(tmp_path / f"train/{i}.png")
    train = [
        {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [0, 1], "user_hash": "u"},
        {"prompt": "b", "file_path": ["2.png", "3.png"], "human_preference": [1, 0], "user_hash": "u"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    pairs = open_pairs(tmp_path / "train.json")
    assert [pixels(p.chosen) for p in pairs] == [pixels(make.picture(i)) for i in (1, 2)]
    test = [{"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 3, 1]}]
    (tmp_path / "train/test.json").write_text(json.dumps(test))
    pair = open_pairs(tmp_path / "train/test.json")[0]
    assert (pixels(pair.chosen), pixels(pair.rejected)) == (pixels(make.picture(2)), pixels(make.picture(1)))


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[1]", "must hold a list of objects")])
def test_json_that_holds_no_rows(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_pairs(tmp_path / "x.json")


# ------------------------------------------------------------------------------------- properties of images


def test_captions_scores_and_models_follow_their_image(make):
    extra = {f"{what}_{side}": [f"{what}{side}"] * 2 for what in ("caption", "model") for side in (0, 1)}
    table = labelled(make, 2, score_0=[1.0, 1.0], score_1=[2.0, 2.0], **extra).remove_columns("label_0")
    pairs = open_pairs(table.add_column("label_0", [1.0, 0.0]))
    first, second = pairs
    assert (first.captions, first.models, first.scores) == (
        ("caption0", "caption1"),
        ("model0", "model1"),
        (1.0, 2.0),
    )
    assert (second.captions, second.models, second.scores) == (
        ("caption1", "caption0"),
        ("model1", "model0"),
        (2.0, 1.0),
    )
    assert pairs.captions == [first.captions, second.captions]
    assert first.swapped().captions == second.captions
    assert first.swapped().chosen is first.rejected


def test_captions_of_the_preferred_image_follow_the_label(make):
    """As files of caption perturbations have them, beside the columns of Pick-a-Pic."""
    names = {
        "caption_preferred": ["good 0", "good 1"],
        "caption_lesspreferred_perturbed_60": ["bad 0", "bad 1"],
    }
    table = labelled(make, 2, **names).remove_columns("label_0").add_column("label_0", [0.0, 1.0])
    columns = {
        "caption_chosen": "caption_preferred",
        "caption_rejected": "caption_lesspreferred_perturbed_60",
    }
    pairs = open_pairs(table, columns=columns)
    assert pairs.captions == [pair.captions for pair in pairs] == [("good 0", "bad 0"), ("good 1", "bad 1")]
    assert pairs.flipped(1.0)[0].captions == ("bad 0", "good 0")


def test_one_uid_on_both_sides_is_one_image(make):
    table = labelled(make, 3, image_0_uid=["a", "b", None], image_1_uid=["c", "b", None])
    pairs = open_pairs(table, max_bad=0.5)
    assert pairs.ids == ["row-0", "row-2"]
    assert [bad.reason for bad in pairs.skipped] == ["identical images"]


def test_an_empty_caption_of_an_image_is_the_prompt(make):
    pairs = open_pairs(labelled(make, 2, caption_0=["", "x"], caption_1=[None, " "]))
    assert [pair.captions for pair in pairs] == [("p0", "p0"), ("x", "p1")]


def test_several_prompts_of_a_row(make):
    table = labelled(make, 2).remove_columns("caption")
    pairs = open_pairs(table.add_column("caption", [["a", " ", "b"], ["c"]]))
    assert [(p.prompt, p.prompts) for p in pairs] == [("a", ("a", "b")), ("c", ("c",))]
    assert pairs.all_prompts == [("a", "b"), ("c",)]


def test_scores_decide_when_asked_to_or_alone(make):
    table = labelled(make, 3, score_0=[1.0, 2.0, 5.0], score_1=[3.0, 2.0, 1.0])
    assert open_pairs(table).ids == ["row-0", "row-1", "row-2"]
    by_scores = open_pairs(table, selection=Selection(label_by="scores"))
    assert [(p.id, p.scores) for p in by_scores] == [("row-0", (3.0, 1.0)), ("row-2", (5.0, 1.0))]
    assert open_pairs(table.remove_columns("label_0")).ids == by_scores.ids
    kept = open_pairs(table, selection=Selection(label_by="scores", margin=3))
    assert kept.ids == ["row-2"]
    assert [bad.reason for bad in kept.skipped] == ["small margin", "tie"]
    half = labelled(make, 2, score_0=[1.0, 2.0], score_1=[3.0, None])
    scored = open_pairs(half, selection=Selection(label_by="scores"))
    assert [bad.reason for bad in scored.skipped] == ["no score"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_by": "scores"}, "label_by=scores needs the columns score_0, score_1"),
        ({"chosen_at_least": 0.5}, "chosen_at_least needs the columns score_0, score_1"),
        ({"margin": 1.0}, "margin needs the columns score_0, score_1"),
        ({"same_generator": True}, "same_generator needs the columns model_0, model_1"),
        ({"generator": "x"}, "generator needs the columns model_0, model_1"),
        ({"drop_nsfw": True}, "drop_nsfw needs a column nsfw"),
        ({"votes": "loudest"}, "votes must be one of separate, majority, share, not 'loudest'"),
        ({"lists": "some"}, "lists must be one of best_worst, all"),
        ({"min_side": -1}, "min_side must be 0 or more"),
    ],
)
def test_selections_that_can_not_work(make, options, message):
    with pytest.raises(UserError, match=message):
        open_pairs(labelled(make, 1), selection=Selection(**options))


def test_filters_are_choices_not_damage(make):
    table = labelled(
        make,
        5,
        model_0=["a", "a", "b", None, "a"],
        model_1=["a", "b", "b", None, "a"],
        nsfw=[0, 0, 0, 0, 0.9],
    )
    same = open_pairs(table, selection=Selection(same_generator=True, drop_nsfw=True), max_bad=0)
    assert same.ids == ["row-0", "row-2"]
    assert [bad.reason for bad in same.skipped] == ["two generators", "two generators", "not safe"]
    assert open_pairs(table, selection=Selection(generator="b")).ids == ["row-2"]
    assert {bad.reason for bad in same.skipped} <= set(CHOICES)


def test_a_judge_may_reject_losers_but_no_winners(make):
    table = labelled(make, 4, score_0=[0.9, 0.1, 0.9, None], score_1=[0.1, 0.9, 0.9, 0.9])
    labels = [open_pairs(table)[i].scores for i in range(4)]
    kept = open_pairs(table, selection=Selection(chosen_at_least=0.5), max_bad=0)
    assert kept.ids == [
        f"row-{i}" for i, (chosen, _) in enumerate(labels) if chosen is not None and chosen > 0.5
    ]
    assert 0 < len(kept) < 4
    assert {bad.reason for bad in kept.skipped} == {"below chosen_at_least"} <= set(CHOICES)


@pytest.mark.parametrize(
    ("word", "unsafe"), [("NSFW", True), ("UNLIKELY", False), ("unsafe", True), ("", False)]
)
def test_nsfw_words(word, unsafe):
    table = ListTable("t", {"image": [b"x"], "nsfw": [word]})
    (_, reason), *_ = image_rows(table, {"image": "image", "nsfw": "nsfw"}, drop_nsfw=True)
    assert (reason == "not safe") is unsafe


def test_min_side_reads_headers_only_and_holds_for_digests(make, monkeypatch):
    small = make.encoded(make.picture(0, (12, 40)))
    table = (
        labelled(make, 2).remove_columns("jpg_1").add_column("jpg_1", [small, make.encoded(make.picture(9))])
    )
    pairs = open_pairs(table, selection=Selection(min_side=16), scan=0)
    monkeypatch.setattr(images, "decode", lambda _: pytest.fail("decoded"))
    assert pairs.digests(0) is None
    assert pairs.digests(1) is not None
    assert pairs.read(0).reason == "below min_side"


def test_weights_make_prompts_count_alike(make):
    table = labelled(make, 4).remove_columns("caption").add_column("caption", ["a", "a", "a", "b"])
    pairs = open_pairs(table, selection=Selection(prompt_weights=True))
    assert pairs.weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert pairs[:2].weights == [1, 1]
    assert open_pairs(table).weights == [1.0] * 4


# ------------------------------------------------------------------------------------------------ votes


def votes_of(make, labels: list[float], turned: list[bool], uids: bool) -> datasets.Dataset:
    """One row a vote on the same two images, shown in either order."""
    one, two = make.encoded(make.picture(1)), make.encoded(make.picture(2))
    rows = {
        "caption": ["a"] * len(labels),
        "jpg_0": [two if t else one for t in turned],
        "jpg_1": [one if t else two for t in turned],
        "label_0": [1 - label if t else label for label, t in zip(labels, turned, strict=True)],
    }
    if uids:
        rows |= {
            "image_0_uid": ["y" if t else "x" for t in turned],
            "image_1_uid": ["x" if t else "y" for t in turned],
        }
    return datasets.Dataset.from_dict(rows)


@settings(max_examples=40, deadline=None)
@given(
    votes=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=6),
    uids=st.booleans(),
)
def test_votes_on_one_pair_are_counted_whichever_way_it_is_shown(make, votes, uids):
    labels, turned = [v for v, _ in votes], [t for _, t in votes]
    share = sum(labels) / len(labels)
    table = votes_of(make, labels, turned, uids)
    for option, expected in (("share", share), ("majority", 0.5 if share == 0.5 else float(share > 0.5))):
        pairs = open_pairs(table, ties="soft", selection=Selection(votes=option))
        assert len(pairs) == 1
        assert pairs[0].preference == pytest.approx(max(expected, 1 - expected))
        if expected != 0.5:
            assert pixels(pairs[0].chosen) == pixels(make.picture(1 if expected > 0.5 else 2))
        assert sum(bad.reason == "repeated pair" for bad in pairs.skipped) == len(votes) - 1


def test_votes_with_uids_touch_no_image(make, monkeypatch):
    table = votes_of(make, [1.0, 0.0, 1.0], [False, True, False], uids=True)
    for name in ("load", "decode", "digest"):
        monkeypatch.setattr(images, name, lambda *_: pytest.fail("touched an image"))
    pairs = open_pairs(table, selection=Selection(votes="share"), scan=0)
    assert pairs.preferences == pytest.approx([2 / 3])


def test_even_votes_are_a_tie(make):
    table = votes_of(make, [1.0, 0.0], [False, False], uids=True)
    with pytest.raises(UserError, match="1 tie, 1 repeated pair"):
        open_pairs(table, selection=Selection(votes="share"))


def test_other_prompts_are_other_pairs(make):
    table = votes_of(make, [1.0, 0.0], [False, False], uids=True)
    table = table.remove_columns("caption").add_column("caption", ["a", "b"])
    assert len(open_pairs(table, selection=Selection(votes="share"))) == 2


# ------------------------------------------------------------------------------------------- single images


def test_imagefolder_with_labels_bad_rows_replaced(make, tmp_path):
    lines = []
    for i, label in enumerate([1, 0, True, None]):
        make.picture(i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"p{i}", "label": label}))
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = open_images(tmp_path, max_bad=1)
    third = ("line-3", "p2", 1.0)  # stands in for the broken second
    assert [(i.id, i.prompt, i.label) for i in found] == [("line-1", "p0", 1.0), third, third]
    assert found.labels == [1.0, 0.0, 1.0]
    assert found.summary() == "2 images, 2 prompts (left out: 1 unreadable image, 1 no label)"


def test_images_without_texts_or_labels(make):
    found = open_images(datasets.Dataset.from_dict({"image": [make.encoded(make.picture(0))]}))
    assert (found[0].prompt, found[0].label) == ("", None)
    assert pixels(found[0].image) == pixels(make.picture(0))


def test_pairs_as_single_images(make):
    table = labelled(make, 2).remove_columns("label_0").add_column("label_0", [1.0, 0.0])
    found = open_images(table)
    assert [(i.id, i.label) for i in found] == [
        ("row-0:chosen", 1.0),
        ("row-0:rejected", 0.0),
        ("row-1:chosen", 1.0),
        ("row-1:rejected", 0.0),
    ]
    assert pixels(found[2].image) == pixels(make.picture(101))
    assert len(open_images(table, limit=3)) == 3


def test_image_sets_that_are_none(make):
    with pytest.raises(UserError, match=r"no column 'image'; did you mean 'imago'\?"):
        open_images(datasets.Dataset.from_dict({"imago": [b"x"]}))
    with pytest.raises(UserError, match="no usable image"):
        open_images(datasets.Dataset.from_dict({"image": [b"x"], "prompt": [""]}))
    with pytest.raises(UserError, match="drop_nsfw needs a column"):
        open_images(datasets.Dataset.from_dict({"image": [b"x"]}), drop_nsfw=True)


def test_opening_and_reading_columns_touches_no_image(make, monkeypatch, tmp_path):
    table = labelled(make, 3, caption_0=["x"] * 3, caption_1=["y"] * 3, score_0=[1.0] * 3, score_1=[0.0] * 3)
    folder = write_pairs(tmp_path / "tar", make.lists(3), format="tar")
    for name in ("load", "decode", "digest", "size"):
        monkeypatch.setattr(images, name, lambda *_: pytest.fail("touched an image"))
    for source in (table, folder):
        pairs = open_pairs(source, scan=0)
        assert len(pairs.prompts) == len(pairs.preferences) == len(pairs.captions) == 3
        assert len(pairs.properties("score")) == len(pairs.weights) == 3
