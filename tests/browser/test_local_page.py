"""The local page in headless Chromium, as a person uses it: nothing is fetched, nothing breaks.

Needs the programs chromium and chromedriver (Debian: chromium, chromium-driver); `make browser`.
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

from dkdetr.inference.serve_finder import MAX_UPLOAD_BYTES
from tests.served_world import EVIL, encoded, lying, served_parts, serving
from tests.unit.test_inference_serve import NAMES, FakeText, make_detector

pytestmark = pytest.mark.browser
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1280,900",
)  # fmt: skip
_PATIENCE_S = 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "no program chromium: apt-get install chromium chromium-driver"
    assert driver, "no program chromedriver: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver)
    started = webdriver.Chrome(options=options, service=service)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "drop").mkdir()
    (folder / "drop" / "größe 1.jpg").write_bytes(encoded(kind="JPEG"))
    (folder / "drop" / "no.png").write_bytes(b"<svg/>")
    return folder, served_parts(folder, make_detector(FakeText()))


@pytest.fixture
def page(browser: WebDriver, world):
    with serving(world[1]) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        wait(browser, lambda: browser.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
        yield browser
        assert_nothing_broke(browser, port)


def wait(browser: WebDriver, until) -> None:
    WebDriverWait(browser, _PATIENCE_S, poll_frequency=0.05).until(lambda _: until())


def assert_nothing_broke(browser: WebDriver, port: int) -> None:
    """No error in the console (a broken policy is one), and no request to anybody else."""
    assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            address = event["params"]["request"]["url"]
            assert address.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:", "chrome:")), (
                address
            )


def text(browser: WebDriver, element: str) -> str:
    return browser.find_element(By.ID, element).text


def boxes(browser: WebDriver) -> list[str]:
    return [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#list li span")]


def upload(browser: WebDriver, path: Path) -> None:
    browser.find_element(By.ID, "file").send_keys(str(path))


def set_threshold(browser: WebDriver, score: float) -> None:
    browser.execute_script(
        "const s = document.getElementById('threshold'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))", score,
    )  # fmt: skip


def test_a_picture_words_and_boxes(page: WebDriver, world):
    folder, parts = world
    page.find_element(By.ID, "words").send_keys("<b>saw</b>, hammer")
    upload(page, folder / "drop" / "größe 1.jpg")
    wait(page, lambda: "box" in text(page, "count"))
    set_threshold(page, 0.01)
    page.find_element(By.ID, "best").click()
    (expected,) = parts.detector.predict(
        folder / "drop" / "größe 1.jpg", ["<b>saw</b>", "hammer"], threshold=0.01
    )
    assert boxes(page) == list(expected.names)
    assert len(page.find_elements(By.CSS_SELECTOR, "#view rect.box")) == len(expected) > 0
    assert not page.find_element(By.ID, "own-least").is_displayed()
    assert page.find_elements(By.CSS_SELECTOR, "#list b b, #view b") == []
    assert page.find_element(By.ID, "view").get_dom_attribute("viewBox") == "0 0 90 60"
    middle = float(sorted(expected.scores)[len(expected) // 2])
    set_threshold(page, round(middle, 2) + 0.01)
    assert 0 <= len(boxes(page)) < len(expected)
    assert "hidden" in text(page, "count")
    set_threshold(page, 0.01)
    page.find_element(By.ID, "best").click()
    assert 0 < len(boxes(page)) < len(expected)


def test_a_names_own_least_score_counts_until_the_slider_is_moved(browser: WebDriver, world):
    folder, parts = world
    detector = make_detector(FakeText())
    strict = NAMES[0]
    detector.vocabulary = replace(detector.vocabulary, thresholds={strict: 1.0})
    with serving(replace(parts, detector=detector, threshold=0.01)) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        wait(browser, lambda: browser.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
        browser.find_element(By.ID, "best").click()
        upload(browser, folder / "drop" / "größe 1.jpg")
        wait(browser, lambda: "box" in text(browser, "count"))
        before = boxes(browser)
        assert before
        assert strict not in before
        told = f"The vocabulary's own, until this is moved: {strict} 1.00."
        assert text(browser, "own-least") == told
        set_threshold(browser, 0.01)
        assert text(browser, "own-least") == ""
        assert strict in boxes(browser)
        assert_nothing_broke(browser, port)


@pytest.mark.parametrize(
    ("kind", "orientation"), [("JPEG", 6), ("JPEG", 8), ("PNG", 3), ("WEBP", 6), ("WEBP", 1)]
)
def test_a_picture_that_lies_is_shown_upright(page: WebDriver, world, kind: str, orientation: int):
    """Blue above, red below, whatever the browser itself makes of the format's EXIF data."""
    path = world[0] / "drop" / f"lying-{orientation}.{kind.lower()}"
    path.write_bytes(lying(orientation, kind))
    upload(page, path)
    wait(page, lambda: "box" in text(page, "count"))
    set_threshold(page, 0.99)
    view = page.find_element(By.ID, "view")
    assert view.get_dom_attribute("viewBox") == "0 0 60 90"
    with Image.open(io.BytesIO(view.screenshot_as_png)) as shot:
        shown = np.asarray(shot.convert("RGB")).astype(int)
    height, width = shown.shape[:2]
    above, below = shown[height // 4, width // 2], shown[3 * height // 4, width // 2]
    assert above[2] > 200 > 60 > above[0]
    assert below[0] > 200 > 60 > below[2]


def test_a_picture_to_try_and_one_that_is_none(page: WebDriver, world):
    folder, _ = world
    page.find_element(By.CSS_SELECTOR, "#examples button").click()
    wait(page, lambda: "box" in text(page, "count"))
    upload(page, folder / "drop" / "no.png")
    wait(page, lambda: text(page, "problem"))
    assert "not a picture" in text(page, "problem")
    # A new picture makes good.
    page.find_element(By.CSS_SELECTOR, "#examples button").click()
    wait(page, lambda: not text(page, "problem"))


def test_a_file_that_is_too_large_is_not_even_sent(page: WebDriver, world):
    folder, _ = world
    large = folder / "drop" / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    upload(page, large)
    wait(page, lambda: "at most 32 MB" in text(page, "problem"))


def test_the_cache_and_the_curves(page: WebDriver, world):
    links = {each.text: each for each in page.find_elements(By.CSS_SELECTOR, "nav a")}
    assert list(links) == ["pictures and words", "the cache", "curves", "report"]
    links["the cache"].click()
    assert "teacher's cache" in page.title
    source = page.find_element(By.TAG_NAME, "main").text
    assert all(name in source for name in EVIL)
    broken = page.execute_script(
        "return [...document.images].filter((i) => !i.naturalWidth && i.loading !== 'lazy').length"
    )
    assert broken == 0
    neighbour = page.find_element(By.CSS_SELECTOR, ".near a")
    asked = neighbour.get_attribute("href")
    neighbour.click()
    assert page.current_url == asked
    assert len(page.find_elements(By.TAG_NAME, "article")) == 1
    page.find_element(By.LINK_TEXT, "← pictures and words").click()
    wait(page, lambda: page.find_elements(By.LINK_TEXT, "curves"))  # its script fills the links in
    page.find_element(By.LINK_TEXT, "curves").click()
    wait(page, lambda: page.title == "Curves")
    assert page.title == "Curves"
    assert len(page.find_elements(By.CSS_SELECTOR, ".chart path")) == 2
    assert "<s>mine</s>" in page.find_element(By.TAG_NAME, "main").text


def test_without_a_student_it_says_so(browser: WebDriver, world):
    _, parts = world
    with serving(replace(parts, detector=None)) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        wait(browser, lambda: "No student" in text(browser, "hint"))
        assert not browser.find_element(By.ID, "find").is_enabled()
        assert_nothing_broke(browser, port)
