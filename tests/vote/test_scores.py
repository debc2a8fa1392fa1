"""Votes as numbers."""

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data import Vote, image_scores, read_votes, write_pairs
from diffalign.data.pairs import Pair
from diffalign.data.votes import shares
from diffalign.errors import UserError


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(image_0, image_1, label_0, annotator="anna"):
    return {
        "prompt": "p",
        "image_0": image_0,
        "image_1": image_1,
        "label_0": label_0,
        "annotator": annotator,
    }


def test_pairs_give_win_rates(tmp_path):
    rows = [pair("a", "b", 1), pair("c", "a", 0), pair("b", "c", 0.5), pair("a", "d", None)]
    votes = read_votes(written(tmp_path / "votes.jsonl", rows))
    assert votes[0] == Vote("p", ("a", "b"), (1.0, 0.0), "anna")
    assert image_scores(votes) == {"a": 1.0, "b": 0.25, "c": 0.25}  # nobody judged d


def test_annotators_count_alike_however_much_they_vote(tmp_path):
    rows = [pair("a", "b", 1, "anna"), pair("a", "b", 0, "bob"), pair("a", "c", 0, "bob")]
    scores = image_scores(read_votes(written(tmp_path / "votes.jsonl", rows)))
    assert scores == {"a": (1 + 0) / 2, "b": (0 + 1) / 2, "c": 1.0}


def test_ranks_give_shares_and_ratings_their_mean(tmp_path):
    row = {"prompt": "p", "images": ["a", "b", "c", "d"], "ranks": [2, 1, 3, 3]}
    assert image_scores(read_votes(written(tmp_path / "ranks.jsonl", [row]))) == pytest.approx(
        {"a": 2 / 3, "b": 1.0, "c": 1 / 6, "d": 1 / 6}
    )
    rated = [
        {"prompt": "p", "images": ["a", "b"], "scores": [4, 2], "annotator": "anna"},
        {"prompt": "p", "images": ["b", "a"], "scores": [3, 5], "annotator": "bob"},
        {"prompt": "p", "images": ["c", "d"], "scores": None, "annotator": "bob"},
        {"prompt": "p", "images": ["e"], "scores": [1], "annotator": "bob"},
    ]
    votes = read_votes(written(tmp_path / "scores.jsonl", rated))
    assert [vote.rated for vote in votes] == [True] * 3
    assert image_scores(votes) == {"a": 4.5, "b": 2.5, "e": 1.0}


def test_files_of_several_folders_have_one_set_of_names(tmp_path):
    one = written(tmp_path / "images" / "anna.jsonl", [pair("a.png", "sub/b.png", 1)])
    other = written(tmp_path / "bob" / "votes.jsonl", [pair("../images/a.png", "c.png", 0, "bob")])
    assert image_scores(read_votes(one, other)) == {"a.png": 0.5, "sub/b.png": 0.0, "../bob/c.png": 1.0}


def test_no_mean_of_ratings_and_comparisons():
    with pytest.raises(UserError, match="no common mean"):
        image_scores([Vote("p", ("a",), (4.0,), rated=True), Vote("p", ("a", "b"), (1.0, 0.0))])


def test_any_labelled_files_will_do_but_files_they_must_be(tmp_path, helpers):
    from PIL import Image

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "", "chosen": "a", "rejected": "c"}]
    assert image_scores(read_votes(written(tmp_path / "pairs.jsonl", rows))) == {"a": 1.0, "b": 0.0}
    a, b = (Image.open(helpers.picture(tmp_path / f"{i}.png", i)) for i in (0, 1))
    tar = write_pairs(tmp_path / "tar", [Pair("0", "p", a, b)], format="tar")
    with pytest.raises(UserError, match=r"no files.*data convert"):
        read_votes(tar)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=7))
def test_shares_are_what_all_pairs_of_the_ranking_would_give(worth):
    names = [f"{i}" for i in range(len(worth))]
    wins = [
        Vote("p", (names[i], names[j]), shares((worth[i], worth[j])))
        for i, j in combinations(range(len(worth)), 2)
    ]
    assert image_scores(wins) == pytest.approx(dict(zip(names, shares(worth), strict=True)))
    assert sum(shares(worth)) == pytest.approx(len(worth) / 2)
    assert shares([3 * w - 1 for w in worth]) == shares(worth)
