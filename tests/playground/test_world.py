"""The language, the scenes and the verifier of the playground."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from diffalign.errors import UserError
from diffalign.playground.captions import (
    COLOURS,
    KINDS,
    SHAPES,
    all_captions,
    change_one_word,
    draw_captions,
    is_held_out,
    parse,
)
from diffalign.playground.verifier import accuracy, find, verify
from diffalign.playground.world import Thing, relation_of, render, scene


@pytest.fixture(scope="module")
def fresh():
    """1500 scenes that no model was trained on, and their pictures."""
    scenes = [scene(91, i) for i in range(1500)]
    return scenes, np.stack([render(s) for s in scenes])


def recall(scenes, images):
    return np.mean([verify(s.caption, image).true for s, image in zip(scenes, images, strict=True)])


def test_every_caption_is_read_back_as_it_was_written():
    captions = all_captions()
    assert len(set(captions)) == len(captions) == 8820
    assert all(str(parse(c)) == c for c in captions)
    assert max(len(c.split()) for c in captions) <= 9


@pytest.mark.parametrize(
    "text", ["", "a cat", "two red star", "a red star left a blue ring", "a red red star"]
)
def test_other_sentences_are_refused_with_an_example(text):
    with pytest.raises(UserError, match="say for example"):
        parse(text)


def test_the_split_of_captions_is_disjoint_and_a_fifth():
    train, held_out = (draw_captions(0, 400, held_out=h) for h in (False, True))
    assert not set(train) & set(held_out)
    assert 0.18 < np.mean([is_held_out(c) for c in all_captions()]) < 0.22
    shares = {kind: np.mean([parse(c).kind == kind for c in held_out]) for kind in KINDS}
    assert all(abs(shares[kind] - KINDS[kind]) < 0.08 for kind in KINDS)


@given(st.integers(0, 2**31), st.integers(0, 2**31))
@example(69214, 71821067)  # the corners of two shapes would meet here
@settings(max_examples=60, deadline=None)
def test_a_scene_depends_on_seed_and_index_alone_and_makes_its_caption_true(seed, index):
    one = scene(seed, index)
    assert one == scene(seed, index)
    image = render(one)
    assert image.dtype == np.uint8
    assert verify(one.caption, image).true
    changed = change_one_word(one.claim, np.random.default_rng(seed))
    assert str(changed) != one.caption
    assert parse(str(changed)).kind == one.claim.kind


def test_backgrounds_and_shadows_stay_out_of_the_foreground(fresh):
    scenes, _ = fresh
    for one in scenes[:300]:
        assert render(replace(one, things=())).min() > 0.55 * 255


def test_precision_and_recall_on_clean_scenes(fresh):
    scenes, images = fresh
    rng = np.random.default_rng(0)
    wrong = [str(change_one_word(s.claim, rng)) for s in scenes]
    assert recall(scenes, images) > 0.995
    assert np.mean([verify(c, i).true for c, i in zip(wrong, images, strict=True)]) < 0.005


@pytest.mark.parametrize(
    ("blur", "noise", "least"), [(0.6, 0, 0.99), (1.0, 0, 0.97), (0, 12, 0.99), (0.6, 8, 0.99)]
)
def test_mild_blur_and_noise_change_little(fresh, blur, noise, least):
    scenes, images = fresh
    rng = np.random.default_rng(1)
    worse = ndimage.gaussian_filter(images[:400].astype(float), (0, blur, blur, 0))
    worse = np.clip(worse + rng.normal(0, 1, worse.shape) * noise, 0, 255).astype(np.uint8)
    assert recall(scenes[:400], worse) > least
    wrong = [str(change_one_word(s.claim, rng)) for s in scenes[:400]]
    assert np.mean([verify(c, i).true for c, i in zip(wrong, worse, strict=True)]) < 0.005


def with_things(*things):
    return render(replace(scene(0, 0), things=things))


STAR = Thing("red", "star", 20, 32, 9)
RING = Thing("blue", "ring", 46, 32, 9)


@pytest.mark.parametrize(
    ("caption", "things", "expected"),
    [
        ("a red star left of a blue ring", (STAR, RING), True),
        ("a blue ring right of a red star", (STAR, RING), True),
        ("a red star and a blue ring", (STAR, RING), True),
        ("a red star above a blue ring", (STAR, RING), False),
        ("a blue star and a red ring", (STAR, RING), False),
        ("a red star", (STAR, RING), False),
        ("two red stars", (STAR, replace(STAR, x=46)), True),
        ("three red stars", (STAR, replace(STAR, x=46)), False),
        ("a red star and a blue ring", (STAR, replace(RING, x=31)), False),  # they touch
        ("a small red star", (replace(STAR, radius=8),), True),
        ("a large red star", (replace(STAR, radius=8),), False),
        ("a large red star", (replace(STAR, radius=14),), True),
        ("a red star", (), False),
    ],
)
def test_verdicts_by_hand(caption, things, expected):
    assert verify(caption, with_things(*things)).true is expected


def test_the_verdict_names_what_is_wrong():
    verdict = verify("a red star left of a green ring", with_things(RING, STAR))
    assert verdict.count
    assert verdict.shapes
    assert verdict.clean
    assert not verdict.colours
    assert not verdict.true


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(COLOURS),
    st.floats(18, 46),
    st.floats(18, 46),
    st.floats(7.5, 16),
)
@settings(max_examples=80, deadline=None)
def test_one_object_anywhere_is_found_as_what_it_is(shape, colour, x, y, radius):
    found, clean = find(with_things(Thing(colour, shape, x, y, radius)))
    assert clean
    assert [(f.shape, f.colour) for f in found] == [(shape, colour)]
    assert np.hypot(found[0].x - x, found[0].y - y) < 1.5


def test_specks_make_an_image_unclean():
    image = with_things(STAR).copy()
    for i in range(8):
        image[60, 4 + 7 * i : 6 + 7 * i] = 0
    assert not verify("a red star", image).clean


def test_float_images_are_judged_alike(fresh):
    scenes, images = fresh
    assert verify(scenes[0].caption, images[0] / 255) == verify(scenes[0].caption, images[0])
    with pytest.raises(ValueError, match="64, 64, 3"):
        verify(scenes[0].caption, images[0][:32])


def test_accuracy_table(fresh):
    scenes, images = fresh
    table = accuracy([s.caption for s in scenes[:200]], np.roll(images[:200], 100, axis=0))
    assert table["true"] < 0.1
    assert set(table) >= {"true", "count", "clean", *KINDS}


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_relations_are_opposite_from_the_other_side(dx, dy):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    if dx and dy:
        assert relation_of(-dx, -dy) == opposite[relation_of(dx, dy)]
