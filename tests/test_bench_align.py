"""The contest of alignment methods: resumable, paired, and honest about what its intervals say."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from diffalign.bench import align, align_report
from diffalign.bench.align import METHODS, AlignConfig, table, verdict
from diffalign.bench.align_judge import Judged, diversity
from diffalign.cli import main
from diffalign.data import open_pairs
from diffalign.errors import UserError

SMALL = {
    "pair_prompts": 8,
    "pair_images": 2,
    "margin": 0.0,
    "train_steps": 2,
    "train_batch_size": 2,
    "held_out": 0.4,
    "eval_prompts": 3,
    "steps": 2,
    "rank": 2,
}


def words(folder, *more):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    return ["bench", "align", "--output_dir", str(folder), *options, "--seeds", "0", *more]


def test_a_contest_end_to_end_goes_on_with_another_method(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "contest"
    assert main(words(folder, "--methods", "sft")) == 0
    trained = []
    train = align.train
    monkeypatch.setattr(align, "train", lambda *a: trained.append(a[-1]) or train(*a))
    assert main(words(folder, "--methods", "sft", "diffusion-kto")) == 0
    assert trained == ["diffusion-kto"]  # sft and the pairs were there
    found = json.loads((folder / "align.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["base", "sft", "diffusion-kto"]
    assert found["rows"][0]["diversity"] > 0
    pairs = json.loads((folder / "seed-0" / "pairs" / "cost.json").read_text())
    assert pairs["evaluations"] == 8 * 2 * 2 * 2  # captions, images, steps, both branches of guidance
    for row in found["rows"][1:]:
        assert row["drift"] > 0
        assert row["steps"] == 2
        assert 0 <= row["implicit"]["value"] <= 1
        assert len(row["by_seed"]) == 1
    with (folder / "align.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base", "sft", "diffusion-kto *"]
    page = (folder / "report.html").read_text()
    assert not re.search(r'src="(?!data:)|href="http|<script', page)
    assert (folder / "gains.png").stat().st_size > 1000
    assert "diffusion-kto" in capsys.readouterr().out
    # Other settings would mix two contests.
    assert main(words(folder, "--methods", "sft", "--guidance", "2")) == 2
    assert "other settings" in capsys.readouterr().err


def test_captions_and_lists_are_made_of_the_same_candidates(tmp_path):
    folder = tmp_path / "contest"
    more = ("--pair_images", "3", "--methods", "dcpo", "list-dpo")
    assert main(words(folder, *more)) == 0
    seed = folder / "seed-0"
    pairs, captions = open_pairs(seed / "pairs"), open_pairs(seed / "captions")
    lists = [json.loads(line) for line in (seed / "lists" / "pairs.jsonl").read_text().splitlines()]
    assert [pair.prompt for pair in pairs] == [row["prompt"] for row in lists]
    for pair, own, row in zip(pairs, captions, lists, strict=True):
        assert own.captions[0] == pair.prompt != own.captions[1]  # told without a look at the image
        assert own.images == pair.images
        best, worst = (row["scores"].index(end(row["scores"])) for end in (max, min))
        shown = [Image.open(seed / "lists" / file).copy() for file in row["images"]]
        assert len(shown) == 3
        assert (shown[best], shown[worst]) == pair.images
    dcpo, list_dpo = json.loads((folder / "align.json").read_text())["rows"][1:]
    drawn = 8 * 3 * 2 * 2  # captions, images, steps, both branches of guidance
    assert dcpo["evaluations"] == drawn + 2 * 2 * 2 * 4  # steps, pairs, images, policy (3) and reference
    assert list_dpo["evaluations"] == drawn + 2 * 2 * 3 * 4


def test_a_contest_older_than_the_lists_draws_them_again_and_keeps_its_pairs(tmp_path):
    config = AlignConfig(**SMALL | {"pair_prompts": 2})
    pairs = align.draw_pairs(config, tmp_path / "pairs", 0)
    lines = (tmp_path / "lists" / "pairs.jsonl").read_text()
    before = (pairs / "pairs.jsonl").stat()
    shutil.rmtree(tmp_path / "lists")
    align.draw_pairs(config, tmp_path / "pairs", 0)
    assert not (tmp_path / "lists").exists()
    align.draw_pairs(config, tmp_path / "pairs", 0, lists=True)
    assert (tmp_path / "lists" / "pairs.jsonl").read_text() == lines
    assert (pairs / "pairs.jsonl").stat() == before


def test_equal_evaluations_buy_each_method_its_own_number_of_steps(tmp_path, capsys):
    folder = tmp_path / "contest"
    more = ("--methods", "sft", "d3po", "--equal", "evaluations", "--budget")
    small = {"prompts_per_round": 4, "images_per_prompt": 2, "train_batch_size": 2}
    options = ("--options", json.dumps({"d3po": small | {"gradient_accumulation_steps": 1}}))
    assert main(words(folder, *more, "20", *options)) == 2
    assert "more than --budget 20" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(words(folder, *more, "260", *options)) == 0
    sft, d3po = json.loads((folder / "align.json").read_text())["rows"][1:]
    log = [json.loads(line) for line in (folder / "seed-0" / "d3po" / "log.jsonl").read_text().splitlines()]
    assert d3po["evaluations"] == sum(record["evaluations"] for record in log)  # it samples its own
    assert sft["evaluations"] - 64 == 3 * 2 * sft["steps"]
    assert sft["steps"] == (260 - 64) // 6
    assert d3po["steps"] > 2
    for row in (sft, d3po):
        assert 0.6 < row["evaluations"] / 260 < 1.4  # whole steps, and whole rounds


def test_a_budget_is_used_up_by_rounds_longer_than_the_first_steps(tmp_path, monkeypatch):
    asked = []

    def rounds(config, folder, pairs, method, options, seed):  # of 64 steps, paid when they begin
        asked.append(steps := options["max_train_steps"])
        return {"steps": steps, "evaluations": 2048 * -(-steps // 64) + 48 * steps, "seconds": 1.0}

    monkeypatch.setattr(align, "_train", rounds)
    config = AlignConfig(equal="evaluations", budget=12_000, train_steps=10)
    facts = align.train(config, tmp_path, tmp_path, 0, "flow-rwr-online")
    assert 0.9 < facts["evaluations"] / config.budget < 1.1
    assert asked == sorted(set(asked))
    assert facts["steps"] == asked[-1]


def test_diversity_is_the_distance_between_images_of_one_caption():
    images = np.zeros((2, 2, 4, 4, 3), np.uint8)
    images[0, 1] = 10  # the two of the first caption are 10 apart, those of the second alike
    assert diversity(images) == pytest.approx(5.0)


def judged(true, score=None, **facts):
    known = {"implicit": [1.0, 0.0, 1.0], "alarms": [], "diversity": 20.0, "drift": 0.1}
    known |= {"steps": 5, "evaluations": 100, "seconds": 9.0}
    true = np.array(true, bool)
    return Judged(true, np.zeros(len(true)) if score is None else np.array(score), known | facts)


def test_gains_are_paired_with_the_base_and_with_sft():
    config = AlignConfig(methods=["sft", "ddo"], seeds=[0, 1])
    rows = table(
        config,
        {
            (0, "base"): judged([1, 0, 0, 0]),
            (1, "base"): judged([0, 0, 0, 1]),
            (0, "sft"): judged([1, 1, 0, 0]),
            (1, "sft"): judged([0, 0, 0, 1]),
            (0, "ddo"): judged([1, 1, 1, 0], diversity=10.0),
            (1, "ddo"): judged([1, 0, 1, 1], alarms=["saturated"], diversity=20.0),
        },
    )
    base, sft, ddo = rows
    assert base["verifier"]["value"] == 2 / 8
    assert sft["gain"]["value"] == 1 / 8
    assert ddo["gain"]["value"] == 4 / 8
    assert ddo["against_sft"]["value"] == 3 / 8
    assert ddo["by_seed"] == [0.5, 0.5]
    assert (sft["against_sft"], sft["verdict"], ddo["diversity"]) == (None, "-", 0.75)
    assert ddo["alarms"] == ["saturated"]
    difference = np.array([0, 0, 1, 0, 1, 0, 1, 0])
    half = 1.959964 * difference.std(ddof=1) / 8**0.5
    assert ddo["against_sft"]["low"] == pytest.approx(3 / 8 - half)
    shown = align_report.shown_row(ddo)
    assert shown["method"] == "ddo *"
    assert shown["gain"].startswith("+50.0 (")


@pytest.mark.parametrize(
    ("low", "high", "implicit", "words"),
    [
        (0.01, 0.05, 0.6, "beats sft"),
        (-0.02, 0.05, 0.6, "no clear difference to sft; held-out pairs won 70%, more than chance"),
        (
            -0.09,
            -0.01,
            0.4,
            "worse than sft; held-out pairs won 70%, not clearly more than chance; alarms: x",
        ),
    ],
)
def test_the_verdict_says_what_the_interval_says_and_why(low, high, implicit, words):
    row = {
        "against_sft": {"low": low, "high": high},
        "implicit": {"value": 0.7, "low": implicit},
        "alarms": ["x"] if high < 0 else [],
    }
    assert verdict(row) == words


@pytest.mark.parametrize("few_step", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_trainer_whose_options_are_accepted(name, few_step):
    model = {"model": "playground/few-step", "steps": 4, "guidance": 1.0} if few_step else {}
    options = align.recipe(AlignConfig(**model), 3, name)
    assert options["seed"] == 3
    trainer_config = align._load(METHODS[name].config)(dataset_name="x", **options)
    trainer_config.check()
    assert align._load(METHODS[name].trainer).needs_reference or not METHODS[name].reference
    if few_step and name in ("d3po", "spo", "pso", "ddpo"):  # as its own sampler goes
        assert (trainer_config.transition, trainer_config.sample_spacing) == ("renoise", "trailing")


@pytest.mark.parametrize("model", ["sd", "few-step"])
@pytest.mark.parametrize("name", ["d3po", "spo", "pso", "ddpo"])
def test_a_round_of_own_samples_fills_an_optimiser_step(name, model):
    steps = 4 if model == "few-step" else 12
    options = align.recipe(AlignConfig(model=f"playground/{model}", steps=steps), 0, name)
    trained = min(steps - 1, round(options["trained_steps"] * steps))
    images = options["images_per_prompt"] if name == "ddpo" else 1  # others' items hold a prompt's images
    items = options["prompts_per_round"] * trained * images
    assert items >= options["train_batch_size"] * options["gradient_accumulation_steps"] * 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["seppp"]}, "unknown method 'seppp'; did you mean 'seppo'"),
        ({"options": {"dpo": {}}}, "unknown method 'dpo'"),
        ({"seeds": []}, "--seeds is empty"),
        ({"equal": "seconds"}, "--budget is what"),
        ({"budget": 100.0}, "--budget is what"),
        ({"held_out": 0.0}, "--held_out must be between 0 and 1"),
        ({"pair_images": 1}, "--pair_images must be at least 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        AlignConfig(**options)
