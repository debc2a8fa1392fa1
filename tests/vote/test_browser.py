"""The page in a real browser: keys, clicks, layouts; skipped where there is no Chromium."""

import queue
import shutil
import threading
from pathlib import Path

import pytest

from diffalign.vote import vote

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if Path(own).exists() else next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip("no Chromium or Chrome on this machine")
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Voting:
    """A server in a thread, and pages that are open on it."""

    def __init__(self, browser, monkeypatch, images, **options):
        links = queue.Queue()
        monkeypatch.setattr("diffalign.vote._has_screen", lambda: True)
        monkeypatch.setattr("webbrowser.open", links.put)
        self.browser, self.images, self.faults, self.asked = browser, images, [], []
        self.thread = threading.Thread(
            target=vote, args=(images,), kwargs={"port": 0, **options}, daemon=True
        )
        self.thread.start()
        self.link = links.get(timeout=20)

    def open(self, **options):
        page = self.browser.new_page(**{"viewport": {"width": 1000, "height": 700}, **options})
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(self.link)
        self.settle(page)
        return page

    def settle(self, page):
        """Wait until votes count again."""
        page.locator("main[aria-busy=false]").wait_for()

    def press(self, page, *keys):
        """Press keys, each when the page is ready for it."""
        for key in keys:
            page.keyboard.press(key)
            self.settle(page)

    def end(self):
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()
        assert self.faults == []
        assert all(url.startswith((self.link, "data:")) for url in self.asked)  # nothing from elsewhere


@pytest.fixture
def start(browser, monkeypatch):
    def start(images, **options):
        return Voting(browser, monkeypatch, images, **options)

    return start


def count(page) -> str:
    return page.inner_text("#count")


def test_pairs_by_keyboard_mouse_and_in_two_tabs(start, folder, helpers):
    voting = start(folder, annotator="anna")
    votes = folder / "votes.jsonl"
    page, late = voting.open(), voting.open()
    shown = page.eval_on_selector_all(".card img", "all => all.map(i => i.src)")
    assert len(shown) == 2
    assert page.inner_text("h1") in ("a red star", "two blue rings")
    assert (count(page), page.inner_text("#who")) == ("0 of 4", "anna")
    assert page.is_disabled("#undo")
    following = [voting.link + f"image/{n}" for n in page.evaluate("state.following.images")]
    assert set(following) <= set(voting.asked)  # the next pair is there before it is shown

    voting.press(page, "ArrowRight")
    row = helpers.rows_of(votes)[0]
    assert row["label_0"] == 0
    assert [page.evaluate("state.judged"), count(page), page.title()] == [1, "1 of 4", "1/4 Vote"]
    assert row["prompt"] in ("a red star", "two blue rings")

    voting.press(late, "1")  # that pair is judged already
    assert "another tab" in late.inner_text("#say")
    assert count(late) == "1 of 4"

    voting.press(page, "u", "ArrowLeft", "Space", "s")
    assert [row["label_0"] for row in helpers.rows_of(votes)] == [1, 0.5, None]
    page.keyboard.press("Control+ArrowLeft")  # the browser's own keys are left alone
    page.click(".card:nth-child(2)")
    page.get_by_text("All done").wait_for()
    assert [row["label_0"] for row in helpers.rows_of(votes)] == [1, 0.5, None, 0]
    assert page.inner_text("h1") == "All done. Thank you!"
    assert str(votes) in page.inner_text("#stage")

    voting.press(page, "u")
    assert page.locator(".card").count() == 2
    page.get_by_role("button", name="Tie").focus()
    voting.press(page, "Enter")  # reached with Tab, a button works as buttons do
    assert [row["label_0"] for row in helpers.rows_of(votes)] == [1, 0.5, None, 0.5]
    page.get_by_role("button", name="Finish").click()
    page.get_by_text("Voting has ended").wait_for()
    voting.end()
    late.keyboard.press("1")
    late.get_by_text("The server has stopped. All votes up to here are saved.").wait_for()


def test_rankings(start, folder, helpers):
    voting = start(folder, mode="rank")
    page = voting.open()
    while page.locator(".card").count() != 3:  # the order is the annotator's own
        voting.press(page, "s")
    voting.press(page, "Enter")
    assert page.locator("#actions .main").is_disabled()
    voting.press(page, "3", "Backspace", "2", "2", "9")
    labels = page.locator(".label").all_inner_texts()
    assert labels == ["1", "1st", "3"]
    assert "picked 1st" in page.locator("img").nth(1).get_attribute("alt")
    voting.press(page, "Enter")
    saved = [row["ranks"] for row in helpers.rows_of(folder / "votes.jsonl")]
    assert [2, 1, 2] in saved
    voting.press(page, "u", "3", "1")  # the last place is clear, so it is saved
    saved = [row["ranks"] for row in helpers.rows_of(folder / "votes.jsonl")]
    assert [2, 3, 1] in saved
    while page.evaluate("state.task"):
        voting.press(page, "1")
    page.keyboard.press("Enter")
    voting.end()


def test_ratings_on_a_phone_in_the_dark(start, folder, helpers):
    voting = start(folder, mode="rate", until_done=True)
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    page = voting.open(color_scheme="dark", **phone)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    for box in [card.bounding_box() for card in page.locator(".card, footer .key").all()]:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
        assert min(box["width"], box["height"]) >= 36  # wide enough for a thumb
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    marks = {}
    while page.evaluate("state.task"):
        number = page.evaluate("state.task.number")
        images = page.locator(".card").count()
        assert page.locator(".label").all_inner_texts() == ["?"] * images
        page.locator(".card").last.tap()
        for mark in range(images):  # from the last image on round to the one before it
            page.get_by_role("button", name=str(mark + 2), exact=True).tap()
        marks[number] = [*range(3, images + 2), 2]
        assert page.locator(".label").all_inner_texts() == list(map(str, marks[number]))
        page.get_by_role("button", name="Save").tap()
        voting.settle(page)
    assert [row["scores"] for row in helpers.rows_of(folder / "votes.jsonl")] == list(marks.values())
    voting.end()  # by itself


def test_wide_and_tall_images_fit_the_window(start, tmp_path, helpers):
    for number, size in enumerate([(64, 16), (16, 64)]):
        for image in range(4):
            helpers.picture(tmp_path / f"{number}" / f"{image}.png", image, size)
    voting = start(tmp_path, mode="rank")
    page = voting.open()
    for _ in range(2):
        boxes = [card.bounding_box() for card in page.locator(".card").all()]
        shape = page.evaluate("(image => image.naturalWidth / image.naturalHeight)(document.images[0])")
        for box in boxes:
            assert box["width"] / box["height"] == pytest.approx(shape, rel=0.05)
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 1000
            assert box["y"] + box["height"] <= 700
        columns = len({round(box["x"]) for box in boxes})
        assert columns == (1 if shape == 4 else 4)  # what makes them largest
        voting.press(page, "s")
    page.keyboard.press("Enter")
    voting.end()


def test_markup_in_a_prompt_is_text(start, tmp_path, helpers):
    prompt = "<img src=x onerror=document.title='taken'> & <b>bold</b>"
    voting = start(helpers.sampled(tmp_path / "images", {prompt: 2}))
    page = voting.open()
    assert page.inner_text("h1") == prompt
    assert page.locator("h1 *").count() == 0
    voting.press(page, "1")
    page.keyboard.press("Enter")
    voting.end()
