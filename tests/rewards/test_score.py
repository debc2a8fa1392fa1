"""``diffalign data score``: rewards as they are written on the command line, and what is stored."""

import numpy as np
import pytest

from diffalign import cli, score
from diffalign.data import open_pairs
from diffalign.errors import UserError
from diffalign.playground import synth
from diffalign.rewards import RewardSpec, load_rewards, score_images

EXAMPLE = "[{name: playground/scorer, weight: 0.5}, {name: playground/verifier, at_least: 1}]"


def config(*words, **options):
    return cli.parse(
        score.ScoreConfig, ["--dataset", "x", "--output_dir", "y", *words], prog="diffalign", example=""
    )


def test_rewards_may_be_names_paths_or_mappings():
    assert config("--rewards", "pickscore").rewards == ["pickscore"]
    assert config("--rewards", "pickscore=a/b", "clip=c").rewards == ["pickscore=a/b", "clip=c"]
    given = config("--rewards", "[{name: aesthetic, path: a, options: {clip: b}}, jpeg-compressibility]")
    assert given.rewards == [RewardSpec("aesthetic", "a", options={"clip": "b"}), "jpeg-compressibility"]
    gate = config("--rewards", EXAMPLE, "--rejected_score", "-5", "--aggregate", "wco")
    assert gate.rewards[1] == RewardSpec("playground/verifier", at_least=1.0)
    assert (gate.rejected_score, gate.aggregate) == (-5.0, "wco")


def test_a_mapping_of_other_keys_is_explained():
    with pytest.raises(UserError, match=r"is not of the form \{name: ..., path: ..., weight: ..., at_least"):
        load_rewards(config("--rewards", "[{name: clip, wieght: 3}]").rewards)


def test_pairs_on_which_rewards_disagree_are_left_out(tmp_path, capsys):
    synth.run(synth.SynthConfig(output_dir=str(tmp_path / "set"), pairs=12))
    given = ["--dataset", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out"), "--shard_rows", "5"]
    both = ["--rewards", "jpeg-compressibility", "playground/scorer", "--unanimous", "true"]
    score.run(config(*both, "--relabel", "true", *given))
    pairs = list(open_pairs(tmp_path / "set"))
    images = [image for pair in pairs for image in (pair.chosen, pair.rejected)]
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    gaps = [
        np.diff(score_images(load_rewards([name]), images, prompts).reshape(-1, 2)).ravel()
        for name in ("jpeg-compressibility", "playground/scorer")
    ]
    agreed = [pair.id for pair, one, two in zip(pairs, *gaps, strict=True) if one * two >= 0]
    kept = open_pairs(tmp_path / "out")
    assert [pair.id for pair in kept] == agreed
    assert 0 < len(agreed) < 12
    assert f"wrote {len(agreed)} pairs of 12" in capsys.readouterr().out
    assert all(pair.scores[0] >= pair.scores[1] for pair in kept)
    of_one = ["--rewards", EXAMPLE, "--rejected_score", "-20", "--unanimous", "true", "--overwrite"]
    with pytest.raises(UserError, match="unanimous compares rewards: give two or more"):
        score.run(config(*of_one, *given))


def test_scores_of_an_ensemble_are_written_and_read(tmp_path):
    synth.run(synth.SynthConfig(output_dir=str(tmp_path / "set"), pairs=4))
    given = ["--dataset", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    options = config("--rewards", EXAMPLE, "--rejected_score", "-20", *given)
    score.run(options)
    reward = load_rewards(options.rewards, rejected_score=-20.0)
    pairs = open_pairs(tmp_path / "out")
    for pair in pairs:
        both = score_images(reward, [pair.chosen, pair.rejected], [pair.prompt] * 2)
        assert pair.scores == pytest.approx(tuple(both), abs=1e-4)
    rejected = np.array([pair.scores[1] for pair in pairs])
    assert (rejected == -20).all()  # what synth rejects is false
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        score.run(config("--batch_size", "0", *given))
