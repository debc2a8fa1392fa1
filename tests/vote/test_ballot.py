"""The votes file: what the data layer reads, nothing lost, nothing twice."""

import errno
import json
import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffalign.data import Selection, image_scores, open_pairs, read_votes
from diffalign.errors import UserError
from diffalign.vote.ballot import AlreadyJudged, Ballot


def test_pairs_are_read_as_preference_pairs_with_no_conversion(folder, helpers):
    ballot = helpers.ballot_of(folder)
    for number, value in enumerate([1, 0, 0.5, None]):
        ballot.cast(number, value)
    pairs = open_pairs(ballot.out)
    expected = [
        [task.images[i].name for i in order]
        for task, order in zip(ballot.tasks, [(0, 1), (1, 0)], strict=False)
    ]
    names = {(folder / f"{i:05d}.png").read_bytes(): f"{i:05d}.png" for i in range(5)}
    assert [[names[data] for data in pairs.payloads(i)] for i in range(2)] == expected
    assert [bad.reason for bad in pairs.skipped] == ["tie", "no label"]
    assert open_pairs(ballot.out, ties="soft").preferences == [1.0, 1.0, 0.5]
    assert ballot.verdicts == {"judged": 2, "ties": 1, "skipped": 1}
    assert ballot.coming == []


def test_rankings_and_ratings_are_read_as_lists(folder, helpers):
    ballot = helpers.ballot_of(folder, "rank")
    ballot.cast(0, [2, 0])  # of three: the last place is clear
    ballot.cast(1, None)
    row = helpers.rows_of(ballot.out)[0]
    assert row["ranks"] == [2, 3, 1]
    best, worst = (folder / row["images"][i] for i in (2, 1))
    pairs = open_pairs(ballot.out)
    assert pairs.payloads(0) == [best.read_bytes(), worst.read_bytes()]
    assert len(open_pairs(ballot.out, selection=Selection(lists="all"))) == 3
    ballot.undo()
    ballot.undo()
    ballot.cast(0, [1])  # only the best: the others share the second place
    assert helpers.rows_of(ballot.out)[0]["ranks"] == [2, 1, 2]
    assert len(open_pairs(ballot.out, selection=Selection(lists="all"))) == 2

    rated = Ballot(ballot.tasks, folder / "marks.jsonl", mode="rate", annotator="anna", scale=7)
    rated.cast(0, [1, 7, 2])
    assert helpers.rows_of(rated.out)[0]["scores"] == [1, 7, 2]
    assert sorted(image_scores(read_votes(rated.out)).values()) == [1, 2, 7]


def test_two_annotators_share_a_file_and_their_votes_are_shares(folder, helpers):
    for annotator, values in (("anna", (1, 1)), ("bob", (0, 1))):
        ballot = helpers.ballot_of(folder, annotator=annotator)
        assert ballot.coming == [0, 1]  # bob has not seen what anna judged
        for number, value in enumerate(values):
            ballot.cast(number, value)
    pairs = open_pairs(ballot.out, selection=Selection(votes="share"), ties="soft")
    assert pairs.preferences == [0.5, 1.0]
    ballot.undo()
    ballot.undo()
    ballot.undo()  # of bob's two
    assert [row["annotator"] for row in helpers.rows_of(ballot.out)] == ["anna", "anna"]


BAD = {
    "pair": [2, -1, 0.7, True, "1", [1], {}],
    "rank": [[], [0, 0], [3], [-1], [True], ["0"], 0, "0"],
    "rate": [[], [1, 2], [0, 1, 2], [1, 2, 6], [1, 2, 2.5], [1, 2, True], 3],
}


@pytest.mark.parametrize(
    ("mode", "value"), [(mode, value) for mode, values in BAD.items() for value in values]
)
def test_what_is_no_verdict_is_refused(folder, helpers, mode, value):
    ballot = helpers.ballot_of(folder, mode)
    with pytest.raises(ValueError, match=r"\d"):
        ballot.cast(0, value)
    assert not ballot.out.exists()
    assert ballot.coming == [0, 1]


@pytest.mark.parametrize("number", [-1, 4, "0", 0.0, True, None])
def test_what_is_no_set_is_refused(folder, helpers, number):
    with pytest.raises(ValueError, match="no set number"):
        helpers.ballot_of(folder).cast(number, 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 3), st.sampled_from([0, 0.5, 1, None])),
            st.sampled_from(["undo", "restart"]),
        ),
        max_size=12,
    )
)
def test_any_course_of_votes_undos_and_restarts(folder, helpers, course):
    """Against a plain list: the file says what was voted, in order, and what is open."""
    (folder / "votes.jsonl").unlink(missing_ok=True)
    ballot, expected = helpers.ballot_of(folder), []
    for event in course:
        if event == "undo":
            ballot.undo()
            if expected:
                number, _ = expected.pop()
                assert ballot.coming[0] == number
        elif event == "restart":
            ballot = helpers.ballot_of(folder)
        elif event[0] in dict(expected):
            with pytest.raises(AlreadyJudged):
                ballot.cast(*event)
        else:
            ballot.cast(*event)
            expected.append(event)
        assert [row["label_0"] for row in helpers.rows_of(ballot.out)] == [value for _, value in expected]
        assert ballot.judged == len(expected)
        assert set(ballot.coming) <= set(range(4)) - set(dict(expected))
        assert bool(ballot.coming) == (len(expected) < 4)


def test_votes_from_many_threads_count_once_each(tmp_path, helpers):
    folder = helpers.sampled(tmp_path / "images", {"p": 9})
    ballot, refused = helpers.ballot_of(folder), []

    def work():
        for number in range(36):
            try:
                ballot.cast(number, 1)
            except AlreadyJudged:
                refused.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = helpers.rows_of(ballot.out)
    assert len({frozenset((row["image_0"], row["image_1"])) for row in rows}) == len(rows) == 36
    assert len(refused) == 3 * 36
    assert helpers.ballot_of(folder).coming == []


def test_a_full_disk_loses_the_vote_at_hand_alone(folder, helpers, monkeypatch):
    ballot = helpers.ballot_of(folder)
    ballot.cast(0, 1)
    before = ballot.out.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for act in (lambda: ballot.cast(1, 1), ballot.undo):
            with pytest.raises(OSError, match="No space"):
                act()
    assert ballot.out.read_bytes() == before
    assert ballot.coming == [1, 2]
    assert sorted(p.name for p in folder.iterdir() if "votes" in p.name) == ["votes.jsonl"]
    ballot.cast(1, 1)
    assert len(helpers.rows_of(ballot.out)) == 2


def test_new_images_are_asked_about_and_old_votes_kept(tmp_path, helpers):
    folder = helpers.sampled(tmp_path / "images", {"p": 2})
    helpers.ballot_of(folder).cast(0, 1)
    helpers.sampled(folder, {"p": 3})
    ballot = helpers.ballot_of(folder)
    assert (ballot.judged, len(ballot.tasks)) == (1, 3)


def test_replaced_images_are_noticed(folder, helpers):
    ballot = helpers.ballot_of(folder, "rank")
    ballot.cast(0, [0])
    image = ballot.tasks[0].images[0]
    os.utime(image)  # written again, the same
    assert helpers.ballot_of(folder, "rank").judged == 1
    helpers.picture(image, 77)
    with pytest.raises(UserError, match=r"no longer the image that .* has a vote on; choose another --out"):
        helpers.ballot_of(folder, "rank")
    image.unlink()
    with pytest.raises(ValueError, match="skip this set"):
        Ballot(ballot.tasks, folder / "new.jsonl", mode="rank", annotator="anna").cast(0, [0])


def test_a_file_of_something_else_is_not_touched(folder, helpers):
    helpers.ballot_of(folder).cast(0, 1)
    out = folder / "votes.jsonl"
    for mode in ("rank", "rate"):
        with pytest.raises(UserError, match=r"line 1 of .*votes\.jsonl is no vote of this --mode"):
            helpers.ballot_of(folder, mode)
    whole = out.read_bytes()
    for damage in (b"[1]\n", b'{"prompt": "p"}\n', whole[:20]):
        out.write_bytes(whole + damage)
        with pytest.raises(UserError, match="line 2"):
            helpers.ballot_of(folder)
        assert out.read_bytes() == whole + damage


def test_any_prompt_survives(tmp_path, helpers):
    odd = 'line\u2028break \u0085 "quoted" <b>\t\u00e9\u661f\n'
    rows = [{"prompt": [odd, "other wording"], "images": ["0.png", "1.png"]}]
    for number in range(2):
        helpers.picture(tmp_path / f"{number}.png", number)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ballot = helpers.ballot_of(tmp_path)
    ballot.cast(0, 1)
    assert helpers.ballot_of(tmp_path).coming == []
    assert open_pairs(ballot.out).all_prompts == [(odd, "other wording")]
