"""The contest of alignment methods: resumable, paired, and honest about what its intervals say."""

import csv
import json
import re

import numpy as np
import pytest

from diffalign.bench import align, align_report
from diffalign.bench.align import METHODS, AlignConfig, Judged, table, verdict
from diffalign.cli import main
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
    assert found["rows"][1]["step_cost"] == 1
    for row in found["rows"][1:]:
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


def judged(true, score=None, **facts):
    known = {"implicit": [1.0, 0.0, 1.0], "step_seconds": 1.0, "seconds": 9.0, "alarms": []}
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
            (0, "ddo"): judged([1, 1, 1, 0], step_seconds=3.0),
            (1, "ddo"): judged([1, 0, 1, 1], alarms=["saturated"], step_seconds=3.0),
        },
    )
    base, sft, ddo = rows
    assert base["verifier"]["value"] == 2 / 8
    assert sft["gain"]["value"] == 1 / 8
    assert ddo["gain"]["value"] == 4 / 8
    assert ddo["against_sft"]["value"] == 3 / 8
    assert ddo["by_seed"] == [0.5, 0.5]
    assert (sft["against_sft"], sft["verdict"], ddo["step_cost"]) == (None, "-", 3.0)
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


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_trainer_whose_options_are_accepted(name):
    config = AlignConfig()
    options = align.recipe(config, 3, name)
    assert options["seed"] == 3
    align._load(METHODS[name].config)(dataset_name="x", **options).check()
    assert align._load(METHODS[name].trainer).needs_reference or not METHODS[name].reference


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["seppp"]}, "unknown method 'seppp'; did you mean 'seppo'"),
        ({"options": {"dpo": {}}}, "unknown method 'dpo'"),
        ({"seeds": []}, "--seeds is empty"),
        ({"held_out": 0.0}, "--held_out must be between 0 and 1"),
        ({"pair_images": 1}, "--pair_images must be at least 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        AlignConfig(**options)
