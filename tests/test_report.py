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

ROOT = Path(study.__file__).parent
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
    return Page(Path(cfg.SAVE_DIR, "report.html").read_text("utf-8"))


def edit(path, change):
    change(data := study.read_json(path))
    study.write_json(path, data)


def spoil(cfg):
    """Puts hostile text wherever names and texts of other people come in."""
    copied = {"nearest": HOSTILE, "share": 0.5, "bars": [1, 2], "notes": 20}
    edit(cfg.SAVE_DIR / "scaling_results.json", lambda results: results.update(corpus=HOSTILE))
    edit(cfg.SAVE_DIR / "evaluation.json", lambda found: found["music"][0].update(first_fault={HOSTILE: 1}))
    edit(cfg.SAVE_DIR / "best_samples" / "metadata.json", lambda tunes: tunes[0].update(copy=copied))
    for path in (cfg.SAVE_DIR / "best_samples").glob("*.abc"):
        path.write_text(f"T:{HOSTILE}\n" + path.read_text("utf-8"), encoding="utf-8")


def test_the_page_holds_every_network_and_tune_and_asks_for_nothing(copied):
    page, evaluation = render(copied), study.read_json(copied.SAVE_DIR / "evaluation.json")
    for row in evaluation["models"]:
        assert study.model_name(row["run"]) in page.text and f"{row['bits_per_note']:.4g}" in page.text
    headings = ("In short", "Laws", "Training", "What emerges", "Data", "Checklist", "Cite", "Commit")
    assert all(heading in page.text for heading in headings)
    tunes = study.read_json(copied.SAVE_DIR / "best_samples" / "metadata.json")
    downloads = {value for name, value in page.attributes if name == "download"}
    assert downloads >= {tune["name"] + kind for tune in tunes for kind in (".abc", ".mid")}
    assert not re.search(r"\bnan\b|None|Undefined|gpt_|lstm_", page.text)
    names = "src", "href", "srcset", "poster", "data"
    addresses = [value for name, value in page.attributes if name in names]
    assert len(addresses) > 10 and all(address.startswith("data:") for address in addresses)
    assert (copied.SAVE_DIR / "report.html").stat().st_size < 8_000_000


def test_hostile_text_stays_text(copied):
    clean = render(copied)
    spoil(copied)
    page = render(copied)
    assert page.tags == clean.tags and page.text.count(HOSTILE) > 3
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_what_could_not_be_fitted_or_made_is_left_out(copied, monkeypatch):
    def refuse(fits):
        refused = {"status": "refused", "reason": "too few points"}
        for law in fits["families"].values():
            law |= {"power_law": refused, "parametric": refused, "frontier": [], "prediction": None}
        fits["comparison"][0] |= {"equal_parameters": refused, "equal_flops": refused}

    edit(copied.SAVE_DIR / "fits.json", refuse)
    for sound in copied.SAVE_DIR.glob("*/*.mp3"):
        sound.unlink()
    monkeypatch.setattr(study, "midirenderer", None)
    page = render(copied)
    assert "audio" not in page.tags and "midirenderer was not installed" in page.text
    assert "can't be compared with that of the LSTM: too few points." in page.text


def test_values_are_shown_for_people():
    shown = {0.85493: "0.8549", 47_786.3: "47,790", 1_599_488: "1,599,488", None: "\u2013", "lstm": "LSTM"}
    assert [study.show(value) for value in shown] == [*shown.values()]
    assert study.show({"value": 0.12345, "lo": 0.1, "hi": None}, as_percent=True) == "12.3 [10, open]"
    assert study.show({"bar_length": 3, "cut": 2, "x": 1}) == "bars that do not add up 3, cut off 2"


def test_the_first_sentences_answer_the_question_and_the_readme_quotes_the_run():
    found = study.read_json(ROOT / "benchmarks" / "study.json")
    first, second = study.answers(found)
    assert "At equal parameters the loss of the Transformer is" in first and "At equal flops" in second
    readme = (ROOT / "README.md").read_text("utf-8")
    quoted = re.search("<!-- figures of a default run.*?-->(.*?)<!-- end -->", readme, re.S)[1]
    for law in (found["comparison"][0][key] for key in ("equal_parameters", "equal_flops")):
        bits = [-law["bits_per_note"][end] for end in ("value", "hi", "lo")]
        assert "{:.2f} [{:.2f}, {:.2f}]".format(*bits).replace("0.", ".") in quoted
        assert study.show({"value": bits[0], "lo": bits[1], "hi": bits[2]}) in first + second
    for law in found["families"].values():
        alpha, stated = law["power_law"]["alpha"], law["prediction"]
        errors = [f"{100 * stated[key]:+.1f}" for key in ("error", "ruler_error")]
        for figure in ("{value:.2f} [{lo:.2f}, {hi:.2f}]".format(**alpha), *errors):
            assert figure.replace("0.", ".") in quoted


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
        wait(page, "document.querySelectorAll('.first .lit').length > 0")
        assert page.title() == "Tunes by networks, small to large"
        browser.close()
    assert complaints == []
    assert [request for request in requests if not request.startswith("data:")] == [address]


def test_instruments_sound_unlike_and_the_last_note_rings_out():
    def sound(text):
        """Samples, their rate, and the centre of the spectrum in hertz."""
        wave, rate = study.render_sound(study.abc_to_midi(text))
        power = np.abs(np.fft.rfft(wave)) ** 2
        return wave, rate, float(power @ np.fft.rfftfreq(len(wave), 1 / rate) / power.sum())

    wave, rate, piano = sound(SCALE)
    assert np.abs(wave).max() == pytest.approx(0.8) and np.sqrt((wave**2).mean()) > 0.03
    assert len(wave) / rate > 5.5 and np.abs(wave[-rate // 10 :]).max() < 0.02  # four seconds of notes
    lines = "program 40", "channel 10"
    violin, drums = (sound(SCALE.replace("K:D\n", f"K:D\nV:1\n%%MIDI {line}\n"))[2] for line in lines)
    assert abs(violin / piano - 1) > 0.2 and drums > 1.5 * piano
    assert len(sound(SCALE + BARS * 40)[0]) <= 32.5 * rate


def test_a_tune_is_written_as_text_midi_sound_roll_and_score(tmp_path):
    study.write_tune(tmp_path / "tune", SCALE, score=True)
    wave, rate = soundfile.read(tmp_path / "tune.mp3")
    roll, score = ((tmp_path / f"tune{end}.svg").read_text("utf-8") for end in ("_roll", ""))
    assert len(wave) > 5 * rate and np.abs(wave).max() < 1
    assert roll.count("<rect") == score.count('class="notehead"') == 16
    assert 'class="keySig"' in score and "The whole tune" in score
    assert 'class="accid"' in score and not re.search('class="accid"[^>]*><use', score)


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
