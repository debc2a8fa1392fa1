"""``diffalign data perturb``: rewritten captions for rejected images."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cli import main
from diffalign.data import open_pairs, write_pairs
from diffalign.data.perturb import LEVELS, DipperPerturber, RulePerturber, perturb
from diffalign.errors import UserError

words = st.lists(st.text("abcdefg", min_size=1, max_size=6), min_size=2, max_size=20)


@given(words, st.sampled_from(sorted(LEVELS)))
def test_a_rewriting_differs_keeps_words_and_depends_on_the_caption_alone(caption, level):
    text = " ".join(caption)
    first, again = RulePerturber(level)([text, text])
    assert first == again == RulePerturber(level)(["other", text])[1]
    assert first != text
    assert set(first.split()) <= set(caption)  # no synonyms among these
    assert 1 <= len(first.split()) <= len(caption)


def changed(level, count=40):
    caption = "a big red car near an old house by the sea with two small people in a bright picture"
    before = caption.split()
    rewritten = [RulePerturber(level, seed)([caption])[0].split() for seed in range(count)]
    return sum(len(set(before) - set(after)) + (len(before) - len(after)) for after in rewritten) / count


def test_stronger_levels_change_more():
    weak, medium, strong = (changed(level) for level in ("weak", "medium", "strong"))
    assert weak < medium < strong


def test_synonyms_keep_punctuation_and_single_words_stay():
    rewritten = {RulePerturber("weak", seed)(["a big, red car"])[0] for seed in range(60)}
    assert any("large," in text or "huge," in text for text in rewritten)
    assert RulePerturber("strong")(["star", ""]) == ["star", ""]


def test_the_chosen_image_keeps_prompt_or_caption(make):
    pairs = list(make.lists(3))
    done = perturb(pairs, lambda captions: [f"not {c}" for c in captions])
    assert [p.captions for p in done] == [(p.prompt, f"not {p.prompt}") for p in pairs]
    again = perturb(done, lambda captions: ["" for _ in captions], of="caption")
    assert [p.captions for p in again] == [p.captions for p in done]  # nothing said, nothing changed


def test_the_command(make, tmp_path, capsys):
    folder = write_pairs(tmp_path / "in", list(make.lists(4)))
    command = ["data", "perturb", "--dataset", str(folder), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--level", "strong"]) == 0
    for pair in open_pairs(tmp_path / "out"):
        assert pair.captions == (pair.prompt, RulePerturber("strong")([pair.prompt])[0])
        assert pair.captions[0] != pair.captions[1]
    command = ["data", "perturb", "--dataset", str(folder), "--output_dir", str(tmp_path / "other")]
    assert main([*command, "--of", "caption"]) == 2
    assert "no captions of their own" in capsys.readouterr().err
    assert main([*command, "--prefix", "Rewrite:"]) == 2
    assert "give --perturber as well" in capsys.readouterr().err


def test_a_paraphrasing_model(tmp_path):
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    from tests.align.families import _t5

    _, tokenizer = _t5()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewrite = DipperPerturber(tmp_path, level="weak", max_new_tokens=5, batch_size=2)
    told, generate = [], rewrite._model.generate
    rewrite._model.generate = lambda **options: told.append(options) or generate(**options)
    said = rewrite(["a red star", "two", "three"])
    assert len(said) == 3
    assert {(options["top_p"], options["top_k"]) for options in told} == {(0.75, 0)}  # the nucleus alone
    assert said == rewrite(["a red star", "two", "three"])
    asked = []
    rewrite._rewritten = lambda parts: asked.extend(parts) or [now.upper() for _, now in parts]
    caption = "One. Two! Three? Four 4.5 m. Five."
    assert rewrite([caption, "short"]) == [caption.upper(), "SHORT"]
    assert asked == [("", "One. Two! Three?"), ("", "short"), ("ONE. TWO! THREE?", "Four 4.5 m. Five.")]
    with pytest.raises(UserError, match="leave --perturber out for the rules"):
        DipperPerturber(tmp_path / "nowhere")
