"""``diffalign data score``: rewards as they are written on the command line, and what is stored."""

import json

import numpy as np
import pytest
from PIL import Image

from diffalign import cli, score
from diffalign.data import ScoredImages, open_pairs, open_scored, write_lists
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


# ------------------------------------------------------------------------------------- images by themselves


@pytest.fixture
def drawn(tmp_path):
    """Images as 'diffalign sample' leaves them: three of one caption, two of another, one of them JPEG."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    rows = []
    for number, (caption, light) in enumerate(
        [
            ("a red star", 40),
            ("two blue rings", 10),
            ("a red star", 200),
            ("two blue rings", 90),
            ("a red star", 120),
        ]
    ):
        noise = np.random.default_rng(number).integers(0, light, (64, 64, 3), np.uint8)
        file = f"{number}.{'jpg' if number == 4 else 'png'}"
        Image.fromarray(noise).save(folder / file)
        rows.append({"file_name": file, "prompt": caption, "seed": number})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


JPEG = ["--rewards", "jpeg-incompressibility"]


def wanted(folder):
    sizes = {}
    for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
        image = Image.open(folder / row["file_name"]).convert("RGB")
        (size,) = score_images(load_rewards([JPEG[1]]), [image], ["x"])
        sizes.setdefault(row["prompt"], []).append(size)
    return sizes


def test_single_images_become_scored_lists(drawn, tmp_path, capsys):
    command = ["score", "--dataset", str(drawn), "--output_dir", str(tmp_path / "out"), *JPEG]
    assert cli.main(command) == 0
    assert "wrote 5 images to" in capsys.readouterr().out
    scored = open_scored(tmp_path / "out")
    found = {}
    for image, value in zip(scored, scored.scores, strict=True):
        assert image.score == value
        found.setdefault(image.prompt, []).append(value)
    assert found == {prompt: pytest.approx(sizes) for prompt, sizes in wanted(drawn).items()}
    kept = [path.read_bytes() for path in sorted((tmp_path / "out/images").iterdir())]
    assert kept == [path.read_bytes() for path in sorted(drawn.glob("?.*"))]  # as they were
    pairs = open_pairs(tmp_path / "out")
    assert [pair.prompt for pair in pairs] == ["a red star", "two blue rings"]
    assert np.asarray(pairs[0].chosen).mean() > np.asarray(pairs[0].rejected).mean()


def test_lists_without_scores_are_scored(drawn, tmp_path):
    names = ["0.png", "2.png", "4.jpg"]
    (drawn / "lists.jsonl").write_text(json.dumps({"prompt": "a red star", "images": names}) + "\n")
    score.run(config("--dataset", str(drawn / "lists.jsonl"), "--output_dir", str(tmp_path / "out"), *JPEG))
    assert open_scored(tmp_path / "out").scores == pytest.approx(wanted(drawn)["a red star"])


def test_lists_with_scores_stay_pairs_of_the_best_and_the_worst(drawn, tmp_path):
    images = [Image.open(drawn / name) for name in ("0.png", "2.png", "3.png")]
    write_lists(tmp_path / "lists", [ScoredImages("a", "a red star", images, [3.0, 1.0, 2.0])])
    score.run(config("--dataset", str(tmp_path / "lists"), "--output_dir", str(tmp_path / "out"), *JPEG))
    (pair,) = open_pairs(tmp_path / "out")
    assert np.array_equal(np.asarray(pair.chosen), np.asarray(images[0]))


def test_scoring_of_images_goes_on_where_it_was_cut_off(drawn, tmp_path, monkeypatch):
    given = config("--dataset", str(drawn), "--output_dir", str(tmp_path / "out"), *JPEG, "--shard_rows", "2")
    honest, seen = score.add_image_scores, []

    def counting(images, reward, **options):
        seen.append([image.id for image in images])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return honest(images, reward, **options)

    monkeypatch.setattr(score, "add_image_scores", counting)
    with pytest.raises(KeyboardInterrupt):
        score.run(given)
    assert not (tmp_path / "out").exists()
    score.run(given)
    assert seen == [["line-1", "line-2"], ["line-3", "line-4"], ["line-3", "line-4"], ["line-5"]]
    assert len(open_scored(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    "words", [["--relabel"], ["--unanimous"], ["--format", "tar"], ["--selection.margin", "1"]]
)
def test_what_is_for_pairs_is_refused_for_images(drawn, tmp_path, words):
    with pytest.raises(UserError, match=r"is for pairs, but .* holds images that nobody compared"):
        score.run(config("--dataset", str(drawn), "--output_dir", str(tmp_path / "out"), *words))


def test_images_need_a_prompt_and_broken_pairs_are_called_pairs(drawn, tmp_path):
    (drawn / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(UserError, match=r"has no column 'prompt' .* a reward judges an image for a prompt"):
        score.run(config("--dataset", str(drawn), "--output_dir", str(tmp_path / "out")))
    (drawn / "metadata.jsonl").write_text('{"prompt": "a", "chosen": "0.png"}\n')
    with pytest.raises(UserError, match=r"has no column 'rejected'.* pairs need"):
        score.run(config("--dataset", str(drawn), "--output_dir", str(tmp_path / "out")))
