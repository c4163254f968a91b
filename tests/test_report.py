"""The report page: nothing comes from elsewhere, hostile text stays text, a browser shows and plays it."""

import copy
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import LakhMIDI as study

HOSTILE = "</pre><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def copied(smoke, tmp_path):
    """The smoke study with a folder of results of its own, which a test may spoil."""
    shutil.copytree(smoke.SAVE_DIR, tmp_path / "runs")
    cfg = copy.copy(smoke)
    cfg.SAVE_DIR = tmp_path / "runs"
    return cfg


def render(cfg):
    study.report.__wrapped__(cfg)
    return Path(cfg.SAVE_DIR, "report.html").read_text("utf-8")


def spoil(cfg):
    """Puts hostile text wherever names and texts of other people come in."""
    save = Path(cfg.SAVE_DIR)
    results, evaluation = (
        study.read_json(save / f"{name}.json") for name in ("scaling_results", "evaluation")
    )
    results["corpus"] = evaluation["music"][0]["reasons"][HOSTILE] = HOSTILE
    evaluation["music"][0]["reasons"] = {HOSTILE: 1}
    study.write_json(save / "scaling_results.json", results)
    study.write_json(save / "evaluation.json", evaluation)
    for path in (save / "best_samples").glob("*.abc"):
        path.write_text(f"T:{HOSTILE}\n" + path.read_text("utf-8"), encoding="utf-8")


def test_the_page_holds_every_model_table_and_tune(smoke):
    page = Page(Path(smoke.SAVE_DIR, "report.html").read_text("utf-8"))
    evaluation = study.read_json(Path(smoke.SAVE_DIR, "evaluation.json"))
    for row in evaluation["models"]:
        assert row["run"] in page.text and f"{row['bits_per_note']:.4g}" in page.text
    for heading in (
        "In short",
        "Listen",
        "Data",
        "Training",
        "Laws",
        "Where the loss is",
        "What emerges at which size",
        "To repeat this",
    ):
        assert heading in page.text
    for tune in study.read_json(Path(smoke.SAVE_DIR, "best_samples", "metadata.json")):
        assert tune["name"] in page.text
    assert not any(text in page.text for text in ("None", "nan", "Undefined"))


def test_the_page_asks_for_nothing_from_elsewhere(smoke):
    page = Page(Path(smoke.SAVE_DIR, "report.html").read_text("utf-8"))
    assert "script" not in page.tags and {"img", "audio", "table", "figure"} <= page.tags
    addresses = [
        value for name, value in page.attributes if name in ("src", "href", "srcset", "poster", "data")
    ]
    assert len(addresses) > 10 and all(address.startswith("data:") for address in addresses)


def test_hostile_text_stays_text(copied):
    clean = Page(render(copied))
    spoil(copied)
    page = Page(render(copied))
    assert page.tags == clean.tags and HOSTILE in page.text
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_what_could_not_be_fitted_is_left_out(copied):
    path = Path(copied.SAVE_DIR, "fits.json")
    fits = study.read_json(path)
    for law in fits["families"].values():
        law["power_law"] = law["parametric"] = {"status": "refused", "reason": "too few points"}
        law.pop("frontier", None)
        law.pop("prediction", None)
    study.write_json(path, fits)
    shutil.rmtree(Path(copied.SAVE_DIR, "best_samples"))
    assert "What emerges" in render(copied)


def test_a_browser_shows_and_plays_the_page(copied):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for found in map(shutil.which, names) if found), None)
    if not program:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    spoil(copied)
    render(copied)
    address, complaints, requests = Path(copied.SAVE_DIR, "report.html").resolve().as_uri(), [], []
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        page.wait_for_function("[...document.querySelectorAll('audio')].every(audio => audio.duration > 1)")
        page.wait_for_function(
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )
        assert page.locator("audio").count() > 3 and page.locator("img").count() > 6
        assert (
            page.evaluate("document.documentElement.scrollWidth") == 390
        )  # a phone need not scroll sideways
        assert page.title() == "Lakh MIDI Scaling Study"
        browser.close()
    assert complaints == []
    assert [request for request in requests if not request.startswith("data:")] == [address]
