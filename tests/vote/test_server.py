"""The page's server: what it answers, and to whom."""

import contextlib
import functools
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from diffalign import cli
from diffalign.errors import UserError
from diffalign.vote import VoteConfig, vote
from diffalign.vote.server import LARGEST_REQUEST, create_app

TOKEN = "secret"
ROOT = Path(__file__).resolve().parents[2]


class Page:
    """A test client and what ended."""

    def __init__(self, ballot, **options):
        self.ballot, self.stopped = ballot, 0
        app = create_app(ballot, token=TOKEN, hosts=("127.0.0.1", "localhost"), stop=self.stop, **options)
        self.client = app.test_client()

    def stop(self):
        self.stopped += 1

    def get(self, path, **options):
        return self.client.get(f"/{TOKEN}/{path}", **options)

    def post(self, path, body=None, **options):
        answer = self.client.post(f"/{TOKEN}/{path}", json={} if body is None else body, **options)
        answer.close()  # as the server does once it is sent
        return answer


@pytest.fixture
def page(folder, helpers):
    return Page(helpers.ballot_of(folder))


def test_a_course_of_votes(page):
    state = page.get("state").get_json()
    assert (state["judged"], state["total"], state["mode"], state["annotator"]) == (0, 4, "pair", "anna")
    assert state["file"] == str(page.ballot.out)
    for number in range(4):
        assert state["task"]["number"] == number
        assert state["task"]["prompt"] == page.ballot.tasks[number].prompts[0]
        following = state["following"]
        state = page.post("vote", {"number": number, "verdict": 1}).get_json()
        assert state["task"] == following
    assert state["task"] is state["following"] is None
    assert page.post("undo").get_json()["task"]["number"] == 3
    assert page.stopped == 0
    assert page.post("finish").status_code == 200
    assert page.stopped == 1


def test_images_are_served_by_number_as_they_are(page):
    shown = page.get("state").get_json()["task"]["images"]
    for number, file in zip(shown, page.ballot.tasks[0].images, strict=True):
        answer = page.get(f"image/{number}")
        assert answer.data == file.read_bytes()
        assert answer.mimetype == "image/png"
        assert "private" in answer.headers["Cache-Control"]


def test_what_a_browser_may_not_know_is_sent_as_png(tmp_path, helpers):
    for number, name in enumerate(["0.gif", "1.jpg"]):
        helpers.picture(tmp_path / name, number)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.gif", "prompt": "p"}\n{"file_name": "1.jpg", "prompt": "p"}\n'
    )
    page = Page(helpers.ballot_of(tmp_path))
    kinds = {image.suffix: number for number, image in enumerate(page.ballot.tasks[0].images)}
    answer = page.get(f"image/{kinds['.gif']}")
    assert answer.mimetype == "image/png"
    assert Image.open(io.BytesIO(answer.data)).format == "PNG"
    assert page.get(f"image/{kinds['.jpg']}").mimetype == "image/jpeg"
    (tmp_path / "1.jpg").unlink()
    assert page.get(f"image/{kinds['.jpg']}").status_code == 404


def test_the_second_of_two_tabs_does_not_overwrite(page, helpers):
    assert page.post("vote", {"number": 0, "verdict": 1}).status_code == 200
    late = page.post("vote", {"number": 0, "verdict": 0})
    assert late.status_code == 409
    assert late.get_json()["task"]["number"] == 1
    assert [row["label_0"] for row in helpers.rows_of(page.ballot.out)] == [1]


def test_it_ends_by_itself_if_asked_to(folder, helpers):
    page = Page(helpers.ballot_of(folder, "rank"), until_done=True)
    page.post("vote", {"number": 0, "verdict": [0]})
    assert page.stopped == 0
    page.post("vote", {"number": 1, "verdict": None})
    assert page.stopped == 1


def test_a_vote_that_is_not_on_disk_is_said_so(page, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffalign.vote.ballot.write_text", full)
    answer = page.post("vote", {"number": 0, "verdict": 1})
    assert answer.status_code == 507
    assert answer.text == "The vote was not saved (No space left on device); make room and vote again."
    assert page.get("state").get_json()["judged"] == 0


# ------------------------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize(
    "path", ["/", "/state", "/vote", "/secrets/", "/secret", "/SECRET/state", "//secret/"]
)
def test_without_the_token_there_is_nothing(page, path):
    for call in (page.client.get, page.client.post):
        answer = call(path)
        assert answer.status_code in (308, 400, 404, 405)
        assert b"judged" not in answer.data
        assert b"<script" not in answer.data


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.localhost", "127.0.0.1.evil.example", "localhost.", "10.0.0.1:8765", ""]
)
def test_another_name_for_this_address_is_refused(page, host):
    """DNS rebinding: a web page whose name suddenly leads here."""
    for path in ("", "state", "image/0"):
        assert page.get(path, headers={"Host": host}).status_code == 400
    assert page.post("vote", {"number": 0, "verdict": 1}, headers={"Host": host}).status_code == 400
    assert not page.ballot.out.exists()
    assert page.get("state", headers={"Host": "localhost:9000"}).status_code == 200  # a forwarded port


@pytest.mark.parametrize(
    "path",
    ["image/99", "image/-1", "image/", "image/../state", "image/%2e%2e%2fmetadata.jsonl", "image/00000.png",
     "image//etc/passwd", "metadata.jsonl", "static/vote.html"],
)  # fmt: skip
def test_nothing_but_listed_images(page, path):
    answer = page.get(path)
    assert answer.status_code == 404
    assert b"prompt" not in answer.data


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@pytest.mark.parametrize("path", ["vote", "undo", "finish"])
def test_forms_of_other_pages_do_not_vote(page, path, kind):
    answer = page.client.post(f"/{TOKEN}/{path}", data='{"number": 0, "verdict": 1}', content_type=kind)
    assert answer.status_code == 415
    assert not page.ballot.out.exists()
    assert page.stopped == 0
    assert page.get(path).status_code == 405


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[1]",
        "1",
        "{}",
        '{"number": 0}',
        '{"number": 0, "verdict": 3}',
        '{"number": 9, "verdict": 1}',
        "{",
    ],
)
def test_nonsense_is_refused(page, body):
    answer = page.client.post(f"/{TOKEN}/vote", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert not page.ballot.out.exists()


def test_long_requests_are_refused(page):
    assert page.post("vote", {"number": 0, "verdict": "x" * LARGEST_REQUEST}).status_code == 413


def test_answers_stay_here(page):
    for answer in (page.get(""), page.get("state"), page.get("image/0"), page.get("nothing")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in answer.headers
    html = page.get("").text
    policy = page.get("").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)  # works offline
    nonce = re.search(r'<script nonce="([^"]+)"', html).group(1)
    assert nonce not in policy  # one per answer


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set_size": 10}, "--set_size must be from 2 to 9"),
        ({"scale": 1}, "--scale must be from 2 to 9"),
        ({"per_prompt": 0}, "--per_prompt must be at least 1"),
        ({"annotator": " "}, "--annotator is empty"),
        ({"port": 70000}, "--port must be from 0 to 65535"),
        ({"host": "::1"}, "--host takes an IPv4 address"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        VoteConfig(images="x", **options)


def test_nothing_to_judge_and_places_in_use(folder, helpers, tmp_path):
    alone = helpers.sampled(tmp_path / "alone", {"p": 1})
    (alone / "00000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"nothing to judge in .*alone.*left out: 1 unreadable image"):
        vote(alone, no_open=True)
    for name in ("pairs.jsonl", "metadata.jsonl", "votes.json"):
        with pytest.raises(UserError, match=r"--out must be a \.jsonl file other than"):
            vote(folder, folder / name)
    with (
        FileLock(folder / ".votes.jsonl.lock"),
        pytest.raises(UserError, match="another diffalign vote writes"),
    ):
        vote(folder, no_open=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen on 127.0.0.1, port {port}.*--port"):
            vote(folder, no_open=True, port=port)
    with pytest.raises(UserError, match=r"can't listen on no\.such\.host\.invalid"):
        vote(folder, no_open=True, host="no.such.host.invalid")


def test_everything_judged_already_ends_at_once(folder, helpers, capsys):
    ballot = helpers.ballot_of(folder, "rank")
    for number in range(2):
        ballot.cast(number, [0])
    out = vote(folder, mode="rank", annotator="anna", until_done=True)
    assert out == folder / "votes.jsonl"
    said = capsys.readouterr().out
    assert "2 of 2 sets judged by anna; all done." in said
    example = re.search(r"^Train: (.*)$", said, re.M).group(1).split()
    assert cli.COMMANDS["train diffusion-dpo"].example.split()[:3] == example[:3]


@pytest.fixture
def started():
    """Starts the command in a process of its own; gives it and its link."""
    running = []

    def start(*options):
        command = [sys.executable, "-m", "diffalign", "vote", "--port", "0", "--no_open", *options]
        # A shell may have told what runs in its background to ignore Ctrl-C.
        heeding = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heeding)
        running.append(process)
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                return process, found.group()
        raise AssertionError("no link")

    yield start
    for process in running:
        process.kill()
        process.communicate()


def post(link, path, body):
    request = urllib.request.Request(link + path, body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_killed_it_has_what_it_acknowledged_and_ctrl_c_ends_with_a_summary(tmp_path, helpers, started):
    folder = helpers.sampled(tmp_path / "images", {"p": 30})
    process, link = started("--images", str(folder))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", link)
    acknowledged, values = 0, ("1", "0.5", "null")
    kill = threading.Timer(0.05, process.kill)  # at any moment of a vote
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        while acknowledged < 435:
            body = f'{{"number": {acknowledged}, "verdict": {values[acknowledged % 3]}}}'
            acknowledged = post(link, "vote", body)["judged"]
            if acknowledged == 5:
                kill.start()
    assert process.wait() == -signal.SIGKILL
    assert acknowledged >= 5
    saved = len(helpers.rows_of(folder / "votes.jsonl"))
    assert acknowledged <= saved <= acknowledged + 1  # the last may be on disk without an answer
    assert saved < 435

    process, link = started("--images", str(folder))
    state = json.load(urllib.request.urlopen(link + "state"))
    assert state["judged"] == saved
    number = state["task"]["number"]
    assert number == saved
    post(link, "vote", f'{{"number": {number}, "verdict": {values[number % 3]}}}')
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    labels = [row["label_0"] for row in helpers.rows_of(folder / "votes.jsonl")]
    assert labels == [(1.0, 0.5, None)[i % 3] for i in range(saved + 1)]
    assert f"{saved + 1} of 435 pairs judged by anonymous" in said
    assert f"; {434 - saved} to go: the same command goes on." in said
