"""The page in a real browser, headless, where one and its driver are installed."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from support.stand_in import StandIn, running

from emor3_jax.inference import images
from emor3_jax.inference.server import Service

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def stand_in():
    return StandIn()


@pytest.fixture(scope="module")
def browser(stand_in):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    with (
        running(Service(stand_in, "runs/<b>demo</b>")) as listening,
        contextlib.closing(_Quitting(webdriver.Chrome(options, service))) as held,
    ):
        held.browser.set_page_load_timeout(60)
        held.browser.get(listening.address)
        yield held.browser


class _Quitting:
    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def close(self) -> None:
        self.browser.quit()


def shown(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def choose(browser, path: Path) -> None:
    browser.find_element(By.ID, "file").send_keys(str(path))


def until(browser, condition) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (48, 32), (200, 60, 20)).save(path)
    return path


def test_a_photograph_is_asked_about(browser, stand_in, photograph):
    until(browser, lambda: "among joy, fear" in shown(browser, "about"))
    # Names are shown, not run.
    assert "<b>demo</b>" in shown(browser, "about")
    assert not browser.find_element(By.ID, "ask").is_enabled()
    choose(browser, photograph)
    until(browser, lambda: browser.find_element(By.ID, "preview").is_displayed())
    browser.find_element(By.ID, "question").send_keys("why & how ?")
    browser.find_element(By.ID, "ask").click()
    until(browser, lambda: browser.find_element(By.ID, "result").is_displayed())
    assert stand_in.asked[-1] == (photograph.read_bytes(), "why & how ?")
    assert shown(browser, "label") == "joy"
    steps = [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#steps li")]
    assert steps == ["<b>sun</b>", "one feels glad"]
    rows = browser.find_elements(By.CSS_SELECTOR, "#probabilities tr")
    assert [row.text.split("\n")[0] for row in rows] == ["joy 75 %", "fear 25 %"]
    assert "chosen" in rows[0].get_attribute("class")
    reflections = shown(browser, "reflections")
    assert "Coherence 50 %" in reflections and "Consistency 100 %" in reflections
    assert "Trust 75 %" in reflections
    assert browser.find_element(By.ID, "ask").is_enabled() and not shown(browser, "status")


def test_a_photograph_is_dropped(browser, stand_in):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 0, 255)).save(out, "PNG")
    browser.execute_script(
        """
        const file = new File([new Uint8Array(arguments[0])], "dropped.png", {type: "image/png"});
        const data = new DataTransfer();
        data.items.add(file);
        const drop = document.getElementById("drop");
        for (const name of ["dragover", "drop"]) {
          const event = new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true});
          drop.dispatchEvent(event);
        }
        """,
        list(out.getvalue()),
    )
    browser.find_element(By.ID, "question").clear()
    browser.find_element(By.ID, "ask").click()
    until(browser, lambda: browser.find_element(By.ID, "result").is_displayed())
    assert stand_in.asked[-1] == (out.getvalue(), None)


def test_what_goes_wrong_is_told(browser, tmp_path, photograph):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    choose(browser, text)
    until(browser, lambda: shown(browser, "error") == "notes.txt is no image")
    assert not browser.find_element(By.ID, "ask").is_enabled()
    assert not browser.find_element(By.ID, "result").is_displayed()
    browser.execute_script("maxBytes = 10")
    choose(browser, photograph)
    until(browser, lambda: "photo.png is too large" in shown(browser, "error"))
    browser.execute_script(f"maxBytes = {images.MAX_FETCHED_BYTES}")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"bad")
    choose(browser, bad)
    browser.find_element(By.ID, "ask").click()
    until(browser, lambda: shown(browser, "error") == "cannot decode an image")


def test_no_script_failed_and_nothing_was_blocked(browser):
    # The image that cannot be decoded, and the answer that says so, are no faults of the page.
    said = [x for x in browser.get_log("browser") if "400 (Bad Request)" not in x["message"]]
    assert said == [], json.dumps(said)
