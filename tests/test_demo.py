"""``diffalign demo`` end to end at a size that takes seconds."""

import json
import re

import numpy as np
import pytest

from diffalign.cli import main
from diffalign.demo import Contest, mean, share
from diffalign.playground import load

SMALL = [
    *("--sampler_prompts", "2", "--sampler_steps", "[3,4]", "--pair_prompts", "8", "--pair_images", "2"),
    *(
        "--margin",
        "0",
        "--train_steps",
        "2",
        "--train_batch_size",
        "2",
        "--eval_prompts",
        "4",
        "--steps",
        "3",
    ),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output_dir", str(folder), *SMALL]) == 0
    return folder, json.loads((folder / "summary.json").read_text())


def test_summary_holds_every_figure(done):
    _, summary = done
    assert summary["eval_prompts"] == 4
    for key in ("base", "aligned"):
        share_of = summary["verifier"][key]
        assert share_of["low"] <= share_of["value"] <= share_of["high"]
    assert {(r["sampler"].split()[0], r["steps"], r["nfe"]) for r in summary["samplers"]} == {
        (who, n, n) for who in ("diffalign", "diffusers") for n in (3, 4)
    }
    assert all(np.isfinite(r["error"]) for r in summary["samplers"])
    assert [t["steps"] for t in summary["training"]] == [2, 2]
    assert summary["nfe"]["pairs"] == 2 * 3 * 8 * 2
    assert {"pairs 1", "train 1", "pairs 2", "train 2", "judge", "total"} <= set(summary["seconds"])
    assert summary["versions"]["torch"]


def test_report_needs_nothing_beside_it(done):
    folder, _ = done
    page = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources) > 8
    assert all(s.startswith("data:image/") for s in sources)
    assert not re.search(r'href="http|<script', page)
    assert "diffalign train diffusion-dpo" in page


def test_the_lora_loads_in_diffusers(done):
    folder, _ = done
    pipe = load()
    pipe.load_lora_weights(folder / "lora")
    assert pipe.unet.peft_config
    image = pipe("a red star", num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(image).all()


def test_a_used_folder_is_refused_and_overwritten_on_request(done, capsys):
    folder, _ = done
    assert main(["demo", "--output_dir", str(folder), *SMALL]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["demo", "--output_dir", str(folder), *SMALL, "--rounds", "1", "--overwrite"]) == 0
    assert len(json.loads((folder / "summary.json").read_text())["training"]) == 1


@pytest.mark.parametrize(
    "bad", [["--eval_prompts", "1"], ["--pair_images", "1"], ["--train_step", "3"], ["--guidance", "x"]]
)
def test_bad_options_end_with_a_sentence_and_code_2(tmp_path, capsys, bad):
    assert main(["demo", "--output_dir", str(tmp_path / "out"), *bad]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffalign: ")
    assert error.count("\n") == 1
    assert bad[0].strip("-") in error


def test_intervals():
    hits = np.array([True] * 6 + [False] * 4)
    wilson = share(hits)
    assert wilson["low"] == pytest.approx(0.3127, abs=1e-3)  # textbook values for 6 of 10
    assert wilson["high"] == pytest.approx(0.8318, abs=1e-3)
    normal = mean(np.array([1.0, 0.0, 0.0, 1.0]))
    assert normal["high"] - normal["value"] == pytest.approx(1.96 * 0.57735 / 2, rel=1e-3)
    contest = Contest(
        ["a red star"] * 10, *[np.zeros((10, 64, 64, 3))] * 2, hits, ~hits, *[np.arange(10.0)] * 2
    )
    assert contest.table()["verifier_gain"]["value"] == pytest.approx(-0.2)
