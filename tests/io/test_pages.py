"""Pages: images as small as they are shown; the report in a real browser, where there is one."""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emor3_jax.evaluation.records import Evaluation, Sample
from emor3_jax.io import pages, report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def _png(side: int) -> bytes:
    out, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (side, 2 * side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_large_images_are_made_smaller() -> None:
    small, large = _png(16), _png(300)
    assert pages.thumbnail(small) == small
    with Image.open(io.BytesIO(pages.thumbnail(large))) as image:
        assert image.size == (336, 168) and image.format == "JPEG"
    broken = b"\x89PNG" + bytes(50_000)
    assert pages.thumbnail(broken) == broken


def _report(folder: Path) -> Path:
    """Writes a report of four responses, with wide tables and long names."""

    def sample(row: int, label: str, answer: str, coherence: float) -> Sample:
        scores = {"accuracy": float(label == answer), "format": 1.0, "coherence": coherence}
        return Sample(f"row {row}", label, answer, f"words {row}", {"coherence": "joy"}, scores)

    samples = [
        sample(0, "joy", "joy", 1.0),
        sample(1, "joy", "fear", 0.0),
        sample(2, "fear", "fear", 0.0),
        sample(3, "fear", "joy", 1.0),
    ]
    metrics = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "rows": 4.0}
    counts = ((1, 1, 0), (1, 1, 0))
    found = Evaluation(metrics, samples, ("joy", "fear"), counts)
    images = dict.fromkeys(("a_data_set_with_a_long_name", "other"), lambda _: _png(16))
    return report.write_report(folder, "t" * 80, {}, dict.fromkeys(images, found), images)


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")
def test_the_gallery_is_filtered_and_fits_a_phone(tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with contextlib.ExitStack() as stack:
        browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        stack.callback(browser.quit)
        metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(_report(tmp_path).as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360

        def shown() -> list[str]:
            found = browser.find_elements("css selector", "#gallery .sample")
            texts = [each.text.splitlines()[-1] for each in found if each.is_displayed()]
            count = browser.find_element("css selector", "output").text
            assert count == f"{len(texts)} of 8 shown"
            return [text.rpartition("row ")[2] for text in texts]

        def press(fault: str) -> None:
            button = browser.find_element("css selector", f"[data-fault='{fault}']")
            # As from the keyboard: by the button's own focus.
            button.send_keys("\ue007")
            assert browser.switch_to.active_element == button

        assert shown() == ["0", "1", "2", "3"] * 2
        press("wrong")
        assert shown() == ["1", "3"] * 2
        press("incoherent")
        assert shown() == ["1"] * 2
        press("wrong")
        assert shown() == ["1", "2"] * 2
        press("")
        browser.find_element("name", "label").send_keys("fear")
        assert shown() == ["2", "3"] * 2
        browser.find_element("name", "set").send_keys("other")
        assert shown() == ["2", "3"]
        browser.find_element("name", "text").send_keys("WORDS 3")
        assert shown() == ["3"]
        assert browser.get_log("browser") == []
