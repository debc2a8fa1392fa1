"""``diffalign data convert | score | caption | stats | synth``, and ``check --against``."""

import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from pyarrow import parquet

from diffalign import score
from diffalign.cli import main
from diffalign.data import PairDataset, Selection, convert, images, open_pairs, write_pairs
from diffalign.data import caption as caption_module
from diffalign.data.stats import stats, token_counter
from diffalign.errors import UserError
from diffalign.playground import synth
from diffalign.playground.verifier import verify
from diffalign.rewards import Reward


def contents(dataset) -> list:
    return [(p.id, p.prompts, p.preference, p.captions, p.scores, p.models, p.digests) for p in dataset]


@pytest.fixture
def rich(make, tmp_path):
    """Pairs with all that a row may have, as JPEG and PNG, and a broken one."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"p{i % 3}",
            "chosen": make.encoded(make.picture(i), "JPEG"),
            "rejected": make.encoded(make.picture(20 + i)),
            "preference": [1.0, 0.75, 0.5][i % 3],
            "score_chosen": i + 0.5,
            "score_rejected": 1.0,
            "model_chosen": "m",
            "model_rejected": "n",
            "caption_chosen": f"own {i}",
        }
        for i in range(7)
    ]
    rows[3]["chosen"] = b"broken"
    return make.jsonl_folder(tmp_path / "rich", rows)


@pytest.mark.parametrize("form", ["folder", "parquet", "tar"])
def test_every_format_reads_back_the_same(rich, tmp_path, form):
    source = open_pairs(rich, ties="soft", max_bad=1)
    expected = [row for row in contents(source) if row[0] != "r3"]
    count = convert.convert(source, tmp_path / "out", format=form, shard_rows=2, progress=False)
    assert count == 6
    back = open_pairs(tmp_path / "out", ties="soft", max_bad=0)
    assert contents(back) == list(dict.fromkeys(expected))  # bytes are copied, so digests are equal
    assert not [path for path in (tmp_path / "out").glob(".*")]
    assert not [path for path in tmp_path.glob(".out*")]


def test_parquet_has_the_columns_of_pick_a_pic(rich, tmp_path):
    source = open_pairs(rich, ties="soft", max_bad=1)
    convert.convert(source, tmp_path / "out", format="parquet", progress=False)
    rows = parquet.read_table(tmp_path / "out/train-00000.parquet").to_pylist()
    assert (rows[1]["label_0"], rows[1]["label_1"]) == (0.75, 0.25)
    assert rows[0]["best_image_uid"] == rows[0]["image_0_uid"] == images.digest(rows[0]["jpg_0"])
    assert rows[2]["best_image_uid"] is None
    assert (rows[0]["has_label"], rows[0]["are_different"], rows[0]["model_1"]) == (True, True, "n")
    assert rows[0]["num_example_per_prompt"] == 3


def test_several_prompts_are_kept_or_refused(make, tmp_path):
    row = {
        "prompt": ["a", "b"],
        "chosen": make.encoded(make.picture(0)),
        "rejected": make.encoded(make.picture(1)),
    }
    source = open_pairs(make.jsonl_folder(tmp_path / "set", [row]))
    convert.convert(source, tmp_path / "tar", format="tar", progress=False)
    assert open_pairs(tmp_path / "tar")[0].prompts == ("a", "b")
    with pytest.raises(UserError, match="has several prompts"):
        convert.convert(source, tmp_path / "out", format="parquet", progress=False)


def test_an_interrupted_conversion_goes_on_and_shows_nothing_half(make, tmp_path, caplog):
    source, out = make.lists(10), tmp_path / "out"
    calls = []

    def annotate(pairs, stop=None):
        calls.append([pair.id for pair in pairs])
        if len(calls) == stop:
            raise KeyboardInterrupt
        return [replace(pair, captions=("x", "y")) for pair in pairs]

    options = {"shard_rows": 3, "settings": {"k": 1}, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, out, annotate=lambda pairs: annotate(pairs, 3), **options)
    assert not out.exists()
    calls.clear()
    assert convert.convert(source, out, annotate=annotate, **options) == 10
    assert calls == [["row-6", "row-7", "row-8"], ["row-9"]]
    assert [p.captions for p in open_pairs(out)] == [("x", "y")] * 10
    with pytest.raises(UserError, match="is not empty"):
        convert.convert(source, out, **options)

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, out, overwrite=True, annotate=lambda pairs: annotate(pairs, 2), **options)
    assert len(open_pairs(out)) == 10  # what was there stays until the new one is whole
    calls.clear()
    with caplog.at_level(logging.WARNING):
        convert.convert(source, out, overwrite=True, annotate=annotate, **options | {"settings": {"k": 2}})
    assert len(calls) == 4
    assert "other options: started again" in caplog.text


def test_what_convert_refuses(make, tmp_path):
    with pytest.raises(UserError, match="format must be one of folder, parquet, tar"):
        convert.convert(make.lists(1), tmp_path / "x", format="zip")
    with pytest.raises(UserError, match="shard_rows must be at least 1"):
        convert.convert(make.lists(1), tmp_path / "x", shard_rows=0)
    broken = open_pairs(
        Dataset.from_dict({"prompt": ["a"], "chosen": [b"x"], "rejected": [b"y"]}), max_bad=1, scan=0
    )
    with pytest.raises(UserError, match="no usable pair in the data set: 1 unreadable image"):
        convert.convert(broken, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_convert_command(rich, tmp_path, capsys):
    command = [
        "data",
        "convert",
        "--dataset",
        str(rich),
        "--output_dir",
        str(tmp_path / "out"),
        "--format",
        "tar",
    ]
    assert main(command) == 2
    assert "14.3% of the rows" in capsys.readouterr().err
    assert main([*command, "--max_bad", "0.4", "--ties", "drop", "--selection.margin", "2"]) == 0
    out = capsys.readouterr().out
    assert "wrote 2 pairs" in out
    assert "small margin" in out
    assert open_pairs(tmp_path / "out").ids == ["r4", "r6"]


# ------------------------------------------------------------------------------------------------ score


class Brightness(Reward):
    """The brighter, the better, in grey levels."""

    def rewards(self, images, prompts):
        return 255 * images.mean((1, 2, 3))


def test_scores_of_images_of_any_size_and_labels_from_them(make):
    pairs = [replace(pair, scores=(None, None)) for pair in make.lists(3)]
    pairs[1] = replace(pairs[1], chosen=make.picture(5, (24, 10)), rejected=make.picture(6, (9, 30)))
    scored = score.add_scores(pairs, Brightness("brightness"))
    for before, after in zip(pairs, scored, strict=True):
        assert after.scores == pytest.approx((np.mean(before.chosen), np.mean(before.rejected)))
        assert after.chosen is before.chosen
    for pair in score.add_scores(pairs, Brightness("brightness"), relabel=True):
        assert pair.scores[0] >= pair.scores[1]
        assert np.mean(pair.chosen) >= np.mean(pair.rejected)
    same = [replace(pairs[0], rejected=pairs[0].chosen)]
    equal = score.add_scores(same, Brightness("brightness"), relabel=True)
    assert equal[0].preference == 0.5


def test_relabelled_copies_swap_the_stored_bytes(make, tmp_path):
    pictures = [make.encoded(make.picture(i)) for i in range(12)]
    source = PairDataset.from_lists(["a"] * 6, pictures[:6], pictures[6:])
    convert.convert(
        source,
        tmp_path / "out",
        annotate=lambda pairs: score.add_scores(pairs, Brightness("brightness"), relabel=True),
        progress=False,
    )
    swapped = 0
    for before, after in zip(source, open_pairs(tmp_path / "out"), strict=True):
        assert np.mean(after.chosen) > np.mean(after.rejected)
        turned = np.mean(before.chosen) < np.mean(before.rejected)
        assert after.digests == (before.digests[::-1] if turned else before.digests)
        swapped += turned
    assert 0 < swapped < 6


def test_score_command_with_the_playground_scorer(tmp_path, capsys):
    synth.run(synth.SynthConfig(output_dir=str(tmp_path / "set"), pairs=8))
    command = ["data", "score", "--dataset", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    pairs = open_pairs(tmp_path / "out", selection=Selection(label_by="scores"))
    labels = open_pairs(tmp_path / "out")
    agreed = sum(a.digests == b.digests for a, b in zip(pairs, labels, strict=True))
    assert agreed >= 6
    assert main([*command, "--overwrite", "--rewards", f"pickscore={tmp_path}"]) == 2
    assert "no CLIP model" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ caption


def test_captions_are_added_to_both_images(make, tmp_path):
    seen = []

    def captioner(pictures, prompts):
        seen.extend(prompts)
        return [
            f"{prompt} {np.asarray(picture)[0, 0, 0]}"
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]

    pairs = caption_module.add_captions(list(make.lists(3)), captioner)
    assert seen == ["prompt 0"] * 2 + ["prompt 1"] * 2 + ["prompt 2"] * 2
    for pair in pairs:
        assert pair.captions == tuple(
            f"{pair.prompt} {np.asarray(image)[0, 0, 0]}" for image in (pair.chosen, pair.rejected)
        )
    silent = caption_module.add_captions(pairs[:1], lambda pictures, _: [""] * len(pictures))
    assert silent[0].captions == ("prompt 0", "prompt 0")


@pytest.fixture
def tiny_captioner(tmp_path):
    """A BLIP of random weights, small enough to be made here."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(words), "bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**text, "eos_token_id": 3, "encoder_hidden_size": 16, "projection_dim": 16},
        vision_config={**shape, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    sized = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(sized, tokenizer).save_pretrained(tmp_path / "blip")
    return tmp_path / "blip"


def test_caption_command(make, tmp_path, tiny_captioner, capsys):
    folder = write_pairs(tmp_path / "set", make.lists(3))
    command = ["data", "caption", "--dataset", str(folder), "--output_dir", str(tmp_path / "out")]
    command += ["--captioner", str(tiny_captioner), "--max_new_tokens", "4", "--batch_size", "2"]
    assert main(command) == 0, capsys.readouterr().err
    captioner = caption_module.TransformersCaptioner(tiny_captioner, max_new_tokens=4, batch_size=3)
    for pair in open_pairs(tmp_path / "out"):
        said = captioner([pair.chosen, pair.rejected], [pair.prompt] * 2)
        assert pair.captions == tuple(text or pair.prompt for text in said)
    assert main([*command, "--overwrite", "--captioner", str(tmp_path)]) == 2
    assert "no captioning model at" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ stats and check


def test_stats(rich, monkeypatch):
    monkeypatch.setattr(images, "decode", lambda _: pytest.fail("decoded"))
    source = open_pairs(rich, max_bad=1, scan=0)
    found, samples = stats(source, lambda text: len(text), max_tokens=4, progress=False)
    assert (found.rows, found.pairs, found.prompts, found.ties, found.soft_labels) == (7, 5, 2, 2, 2)
    assert found.left_out == {"tie": 2}
    assert found.own_captions == 5
    assert found.cut_off == 5 / 7  # five captions of their own, two prompts
    assert found.score_gap["max"] == 5.5
    assert found.against_label == 1 / 5
    assert found.generators == {"m": 5, "n": 5}
    assert (found.one_generator, found.unequal_sizes) == (0, 0)
    assert found.shortest_side["min"] == 16
    assert len(samples.shortest_side) == 8  # of the broken pair none
    monkeypatch.setattr(images, "load", lambda *_: pytest.fail("touched"))
    bare, _ = stats(source, len, image_sizes=False, progress=False)
    assert (bare.shortest_side, bare.unequal_sizes) == ({}, None)


def test_clip_tokens_are_counted_offline():
    count = token_counter(None)
    assert count("a red star") == 5
    assert count("a " * 100) == 102
    with pytest.raises(UserError, match="no tokenizer at"):
        token_counter("/nowhere/at/all")


def test_stats_command(rich, tmp_path, capsys):
    command = ["data", "stats", "--dataset", str(rich), "--report", str(tmp_path / "s.json")]
    assert main([*command, "--html", str(tmp_path / "s.html")]) == 0
    assert "7 rows, 5 pairs, 2 prompts" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["generators"] == {"m": 5, "n": 5}
    page = (tmp_path / "s.html").read_text()
    assert page.count("<figure>") == 4


def test_check_against_another_set(make, tmp_path, capsys):
    rows = [
        {"prompt": p, "chosen": make.encoded(make.picture(i)), "rejected": make.encoded(make.picture(50 + i))}
        for i, p in enumerate(["A red  star", "a blue ring", "a hat"])
    ]
    train = make.jsonl_folder(tmp_path / "train", rows)
    held = make.jsonl_folder(tmp_path / "held", [rows[2] | {"prompt": "a Red star"}])
    command = ["data", "check", "--dataset", str(train), "--against"]
    assert main([*command, str(held)]) == 2
    out, err = capsys.readouterr()
    assert "prompts shared with the other set: 1" in out
    assert "(first: 'A red star')" in err  # messages are one line, so spaces are single
    other = make.jsonl_folder(tmp_path / "other", [rows[2] | {"prompt": "a cat"}])
    assert main([*command, str(other)]) == 0


# ------------------------------------------------------------------------------------------------ synth


def test_synth_is_a_function_of_its_seed_and_true_by_the_verifier(tmp_path):
    config = synth.SynthConfig(output_dir=str(tmp_path / "a"), pairs=12)
    synth.run(config)
    pairs = open_pairs(tmp_path / "a")
    assert len(pairs) == 12
    for pair in pairs:
        assert verify(pair.prompt, np.asarray(pair.chosen)).true
        assert not verify(pair.prompt, np.asarray(pair.rejected)).true
    rows = list(synth.rows(config))
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    assert rows == parquet.read_table(tmp_path / "a/train-00000.parquet").select(list(rows[0])).to_pylist()
    assert rows[:5] == list(synth.rows(replace(config, pairs=5)))
    assert rows[0] != next(synth.rows(replace(config, seed=1)))


def test_synth_with_ties_missing_labels_damage_and_repeats(tmp_path):
    config = synth.SynthConfig(
        output_dir=str(tmp_path / "a"), pairs=80, ties=0.2, unlabelled=0.2, damaged=0.2, repeats=0.3
    )
    synth.run(config)
    pairs = open_pairs(tmp_path / "a", max_bad=1, scan=200)
    found = Counter(bad.reason for bad in pairs.skipped)
    assert found["tie"] > 4
    assert found["no label"] > 4
    assert sum(found[reason] for reason in ("missing image", "unreadable image", "identical images")) > 3
    shared = open_pairs(tmp_path / "a", max_bad=1, scan=0, selection=Selection(votes="share"))
    assert sum(bad.reason == "repeated pair" for bad in shared.skipped) > 4


@pytest.mark.parametrize(
    ("option", "message"), [({"pairs": 0}, "pairs must be"), ({"ties": 2.0}, "ties is a share")]
)
def test_synth_refuses(tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        synth.run(synth.SynthConfig(output_dir=str(tmp_path / "x"), **option))
    assert not (tmp_path / "x").exists()
