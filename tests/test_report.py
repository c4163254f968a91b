"""The report page, whole by itself and inert, shown and played by a browser; sound, rolls and scores."""

import copy
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

import LakhMIDI as study

HOSTILE = "</pre><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
BARS = "DEFGABcd|\ndcBAGFED|\n"
SCALE = "X:1\nL:1/8\nM:4/4\nQ:1/4=120\nK:D\n" + BARS
VOICES = "V:1\n%%MIDI program 40\nV:2\n%%MIDI program 32\nV:3\n%%MIDI channel 10\n"
DUET = f"X:1\nL:1/4\nM:3/4\nQ:1/4=120\nK:Bb\n{VOICES}" + "[V:1]Bcd|[V:2]B,3|[V:3]CCC|\n" * 2


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
    names = "scaling_results.json", "evaluation.json", "best_samples/metadata.json"
    results, evaluation, tunes = files = [study.read_json(save / name) for name in names]
    results["corpus"] = HOSTILE
    evaluation["music"][0]["reasons"] = {HOSTILE: 1}
    tunes[0]["copy"] = {"nearest": HOSTILE, "share": 0.5, "bars": [1, 2], "notes": 20}
    for name, data in zip(names, files, strict=True):
        study.write_json(save / name, data)
    for path in (save / "best_samples").glob("*.abc"):
        path.write_text(f"T:{HOSTILE}\n" + path.read_text("utf-8"), encoding="utf-8")


def test_the_page_holds_every_network_table_and_tune_is_small_and_asks_for_nothing(smoke):
    path = Path(smoke.SAVE_DIR, "report.html")
    page = Page(path.read_text("utf-8"))
    for row in study.read_json(Path(smoke.SAVE_DIR, "evaluation.json"))["models"]:
        assert study.model_name(row["run"]) in page.text and f"{row['bits_per_note']:.4g}" in page.text
    for heading in ("In short", "Laws", "Training", "What emerges", "Data", "Checklist", "Cite", "Commit"):
        assert heading in page.text
    tunes = study.read_json(Path(smoke.SAVE_DIR, "best_samples", "metadata.json"))
    downloads = {value for name, value in page.attributes if name == "download"}
    assert downloads >= {tune["name"] + kind for tune in tunes for kind in (".abc", ".mid")}
    assert not re.search(r"\bnan\b", page.text)
    assert not any(text in page.text for text in ("None", "Undefined", "gpt_", "lstm_"))
    names = "src", "href", "srcset", "poster", "data"
    addresses = [value for name, value in page.attributes if name in names]
    assert len(addresses) > 10 and all(address.startswith("data:") for address in addresses)
    assert path.stat().st_size < 8_000_000


def test_hostile_text_stays_text(copied):
    clean = Page(render(copied))
    spoil(copied)
    page = Page(render(copied))
    assert page.tags == clean.tags and page.text.count(HOSTILE) > 3
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_what_could_not_be_fitted_or_made_is_left_out(copied, monkeypatch):
    path = Path(copied.SAVE_DIR, "fits.json")
    fits = study.read_json(path)
    for law in fits["families"].values():
        law["power_law"] = law["parametric"] = {"status": "refused", "reason": "too few points"}
        law.pop("frontier", None)
        law.pop("prediction", None)
    study.write_json(path, fits)
    for sound in Path(copied.SAVE_DIR).glob("*/*.mp3"):
        sound.unlink()
    monkeypatch.setattr(study, "midirenderer", None)
    page = Page(render(copied))
    assert "audio" not in page.tags and "midirenderer was not installed" in page.text


def wait(page, condition):
    """page.wait_for_function needs eval, which the policy of the page forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def test_a_browser_shows_plays_and_seeks(copied):
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
        wait(page, "[...document.querySelectorAll('audio')].every(audio => audio.duration > 1)")
        wait(page, "[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sideways
        lowest = page.locator(".first audio").last.bounding_box()
        assert lowest["y"] + lowest["height"] < 800  # three players on the first screen

        roll = page.locator(".first .roll").first
        roll.click(position={"x": roll.bounding_box()["width"] / 2, "y": 10})
        wait(page, "document.querySelector('.first audio').currentTime > 1")
        place = "+document.querySelector('.first .head').getAttribute('transform').match(/[\\d.]+/)[0]"
        reached = page.evaluate(place)
        assert reached > 200
        wait(page, f"{place} > {reached}")
        assert page.title() == "Tunes by networks, small to large"
        browser.close()
    assert complaints == []
    assert [request for request in requests if not request.startswith("data:")] == [address]


def sound_of(text):
    return study.render_sound(study.abc_to_midi(text))


def brightness(text):
    """Centre of the spectrum, in hertz."""
    wave, rate = sound_of(text)
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float(power @ np.fft.rfftfreq(len(wave), 1 / rate) / power.sum())


def test_instruments_sound_unlike_and_the_last_note_rings_out(tmp_path):
    wave, rate = sound_of(SCALE)
    assert np.abs(wave).max() == pytest.approx(0.8) and np.sqrt((wave**2).mean()) > 0.03
    assert len(wave) / rate > 5.5 and np.abs(wave[-rate // 10 :]).max() < 0.02  # four seconds of notes
    lines = "program 40", "channel 10"
    violin, drums = (SCALE.replace("K:D\n", f"K:D\nV:1\n%%MIDI {line}\n") for line in lines)
    assert abs(brightness(violin) / brightness(SCALE) - 1) > 0.2
    assert brightness(drums) > 1.5 * brightness(SCALE)
    assert len(sound_of(SCALE + BARS * 40)[0]) <= 32.5 * rate


def test_a_tune_is_written_as_text_midi_sound_roll_and_score(tmp_path):
    study.write_tune(tmp_path / "tune", SCALE, score=True)
    wave, rate = soundfile.read(tmp_path / "tune.mp3")
    roll, score = ((tmp_path / f"tune{end}.svg").read_text("utf-8") for end in ("_roll", ""))
    assert len(wave) > 5 * rate and np.abs(wave).max() < 1
    assert roll.count("<rect") == score.count('class="notehead"') == 16
    assert 'class="keySig"' in score and "The whole tune" in score
    signs = re.findall(r'class="accid"[^>]*><use', score)  # without one, a group is empty
    assert 'class="accid"' in score and not signs


def test_a_score_names_its_voices_and_says_what_is_left_out():
    score = study.engrave(study.read_abc(DUET), study.abc_to_midi(DUET))
    assert "Violin" in score and "Acoustic Bass" in score and "Left out: the drums." in score
    long = DUET + DUET[DUET.index("[V:1]") :] * 40
    cut = study.engrave(study.read_abc(long), study.abc_to_midi(long))
    assert "bars 17 to 82" in cut and len(cut) <= 150_000


def test_a_continued_tune_is_heard_and_seen_from_two_bars_before_the_join():
    prompt = SCALE + BARS * 3
    tune = study.read_abc(prompt + BARS * 2)
    begin, given = study.heard_from(tune, prompt)
    roll = study.draw_roll(tune, begin, given)
    assert given == tune.n_bars - 4 and begin == 2 * (given - 2)
    assert roll.count(study.GIVEN_COLOUR) == 16 and "stroke-dasharray" in roll
