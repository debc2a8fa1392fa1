"""Pieces of the reports: tiles, data URIs, templates, atomic files."""

import base64
import io
import json
import math
import os

import jinja2
import numpy as np
import pytest
from PIL import Image

from diffalign import output, report
from diffalign.errors import UserError


def decode(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_png_uri_keeps_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(report.png_uri(image)), image)


def test_tile_places_images_row_by_row():
    images = np.stack([np.full((2, 3, 3), 10 * i, np.uint8) for i in range(1, 6)])
    sheet = report.tile(images, 2, pad=1)
    assert sheet.shape == (3 * (2 + 4), 2 * (3 + 4), 3)
    for i in range(5):
        top, left = (i // 2) * 6 + 2, (i % 2) * 7 + 2
        np.testing.assert_array_equal(sheet[top : top + 2, left : left + 3], images[i])
    assert (sheet[12:, 7:] == 255).all()


def test_tile_frames_have_their_colours():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    sheet = report.tile(images, 2, frames=["#ff0000", "#00ff80"], pad=1)
    assert sheet[1, 1].tolist() == [255, 0, 0]
    assert sheet[1, 9].tolist() == [0, 255, 128]
    assert sheet[2, 2].tolist() == [0, 0, 0]


def test_figures_become_svg_and_png():
    figure, axes = report.new_figure()
    axes.plot([1, 2], [3, 4])
    pixels = report.figure_png(figure)
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8
    assert (pixels < 128).any()
    uri = report.figure_uri(figure)
    assert b"<svg" in base64.b64decode(uri.partition(",")[2])


def test_save_png_replaces_whole_files(tmp_path):
    path = tmp_path / "a.png"
    for value in (0, 200):
        report.save_png(path, np.full((2, 2, 3), value, np.uint8))
        assert (np.asarray(Image.open(path)) == value).all()
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_render_escapes_and_refuses_missing_names():
    context = {
        "model": "<script>",
        "count": 1,
        "yardstick": "x",
        "steps": [5],
        "parts": [],
        "trajectories": [],
        "skipped": [],
        "command": "diffalign",
        "environment": {"torch": "2"},
    }
    page = report.render("samplers.html", **context)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "://" not in page  # nothing is loaded from elsewhere
    del context["command"]
    with pytest.raises(jinja2.UndefinedError, match="command"):
        report.render("samplers.html", **context)


def test_versions_name_what_a_number_depends_on():
    found = report.versions()
    assert {"diffalign", "torch", "diffusers", "python", "device", "machine"} <= set(found)
    assert all(found.values())


def test_json_is_readable_by_everyone(tmp_path):
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": (np.float64(2.0),), 3: tmp_path, "é": None}
    path = output.write_json(tmp_path / "x.json", value)
    assert json.loads(path.read_text()) == {
        "a": None,
        "b": [None, 1.5],
        "c": [2.0],
        "3": str(tmp_path),
        "é": None,
    }


def test_prepare_creates_and_protects(tmp_path):
    folder = output.prepare(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert output.prepare(folder) == folder  # empty: fine
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty; add --overwrite"):
        output.prepare(folder)
    assert output.prepare(folder, overwrite=True) == folder
    assert [f.name for f in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["file", "file/under"])
def test_prepare_refuses_files(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        output.prepare(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_prepare_refuses_what_it_cannot_write(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="no permission to write"):
            output.prepare(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


def test_prepare_reports_a_refused_write(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(UserError, match="no permission to write to"):
        output.prepare(tmp_path / "a")
