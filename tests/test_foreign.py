"""ABC from elsewhere: dialects and bar lines, the dumps of The Session."""
import csv
import io
import json
import random
import time

import pytest
import symusic
from conftest import smoke_knobs

import LakhMIDI as study
from LakhMIDI import Cfg, Skip, UserError, read_json, run_stages

HEAD = "X:1\nL:1/8\nM:4/4\nK:G\n"


def heard(midi):
    """Of a MIDI file [(onset in eighths, pitch)], the lengths of its bars, [(onset, tempo)]."""
    score = symusic.Score.from_midi(midi)
    eighth = score.tpq / 2
    notes = sorted((note.time / eighth, note.pitch) for track in score.tracks for note in track.notes)
    signs = [(sign.time / eighth, 8 * sign.numerator / sign.denominator) for sign in score.time_signatures]
    bars, now = [], 0
    while now < score.end() / eighth:
        bars.append(next(length for begin, length in reversed(signs) if begin <= now))
        now += bars[-1]
    return notes, bars, [(change.time / eighth, round(change.qpm)) for change in score.tempos]


@pytest.fixture
def read():
    """read(ABC) -> heard(its MIDI file)."""
    return lambda text: heard(study.foreign_abc_to_midi(text))


@pytest.mark.parametrize("same", [
    "R:hornpipe\n" + HEAD + "GABc d2e2|d8|", HEAD + "~G.ABTc !fermata!d2He2|+trill+d8|",
    HEAD + '"Em"GA{/d}B{cd}c "^slow"d2ue2|J`d8| % c4', HEAD + "G!4!AB!roll!c !\nd2e2|!d8|",
    HEAD + "(GABc) d2e2\\\n|d8|\nw:one two\nN:a b c d e\nA: a place\n[r:remark]",
    HEAD + '"Fife"\nGABc d2e2|d8|', HEAD + "\u201cAm\u201dGABc d2e2|d8|",
    HEAD + "GABc<br />\nd2e2 | d8 |</html>\n", HEAD + "GABc !d2e2 !d8|", HEAD + "GABc d-de2|d4-|d4|",
    HEAD + "%%begintext\nabcdefg\n%%endtext\nGABc d2&quot;G&amp;quot;e2|d8|\n\nA note beneath",
    HEAD.replace("K:", "U: T = !trill!\n%%MIDI drumon\nK:") + "%%MIDI gchord fff\nGABc d2e2|d8|",
    "X:1 T:The Flat Reel M:4/4 L:1/8 K:G GABc d2e2|d8|", HEAD.strip() + " GABc d2e2|d8|\n"])
def test_what_is_written_as_notes_is_what_comes_out(read, same):
    assert read(same)[0] == read(HEAD + "GABc d2e2|d8|")[0]


@pytest.mark.parametrize("music, rest, bars", [
    ("B|G2A2B2c2|d6|", 7, [8, 8, 8]),
    ("B2|G2A2B2c2|d6:|", 6, [8, 8, 8, 8, 8]),  # what the last bar lacks is the pick-up of the repeat
    ("B2|G2A2B2c2|d8:|", 6, [8, 8, 8, 2, 8, 8]),
    ("G2A2B2c2|d4z4|[M:3/4]G2A2B2|c6|", 0, [8, 8, 6, 6]),  # a change behind a rest
    ("G2A2B2c2|Z2|\nM:3/4\nz6|c6|", 0, [8, 8, 8, 6, 6]),
    ("|:G2A2B2c2|[M:3/4]d6:|[M:4/4]e8|", 0, [8, 6, 8, 6, 8]),  # a change inside a repeat
    ("|:G2A2B2c2|1 d4 :|2 e6|f8|]", 0, [8, 4, 8, 6, 8]),  # bars that are too short stay so
    ("[M:none]B2|G2A2B2|c4|d6|", 4, [6, 6, 4, 6])])
def test_bar_lines_survive(read, music, rest, bars):
    notes, found, tempos = read(HEAD + music)
    assert notes[0][0] == rest and found == bars and tempos == [(0, 120)]


def test_voices_keep_in_step_and_tempi_are_kept(read):
    notes, bars, _ = read(HEAD + "[V:1]B2|G4A4|[M:3/4]B6|\n[V:2]z2|D8|[M:3/4]G6|\n[V:1]c6|\n[V:2]A6|\n")
    assert notes == [(6, 71), (8, 62), (8, 67), (12, 69), (16, 67), (16, 71), (22, 69), (22, 72)]
    assert bars == [8, 8, 6, 6]
    assert read('X:1\nL:1/8\nM:6/8\nQ:"Slow" 3/8=40\nK:G\nd|G6|[Q:90]A6|')[2] == [(0, 60), (12, 90)]


@pytest.mark.parametrize("text, reason", [
    ("X:1\nabc|", "no K: field"), (HEAD + "z8|", "no music"), (HEAD + '"abcdefg"|', "no music"),
    (HEAD + 'G8|"A4 BcdefgabB|', "notes lost"), (HEAD + "c|" * 6001, "more than 6,000 bars")])
def test_what_can_not_be_read_is_skipped_by_its_reason(read, text, reason):
    with pytest.raises(Skip, match=reason):
        read(text)


@pytest.mark.parametrize("bomb", ["A", "[A:", "{", "!h", ":", '"', "%%begintext\n", "<a =", "1+", " "])
def test_no_text_takes_long(bomb):
    for text in (HEAD + bomb * 30_000, HEAD + "!" + bomb * 30_000, f"M:{bomb * 30_000}\n{HEAD}"):
        began = time.perf_counter()
        text = study.JUNK.sub(r"\1", study.plain_text(text))
        study.mark_bars(text), study.count_notes(text)
        assert time.perf_counter() - began < 3, text[:50]


def test_a_user_s_tune_is_read_whatever_its_encoding(tmp_path, capsys):
    path, text = tmp_path / "mine.abc", HEAD.replace("X:1\n", "X:1\nT:\u00c9t\u00e9\n") + "B|G2A2B2c2|"
    for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1"):
        path.write_bytes(text.encode(codec))
        assert [pitch for _, pitch in heard(study.read_foreign(path))[0]] == [71, 67, 69, 71, 72], codec
    path.write_text(f"%abc-2.1\n\n{text}\n\n{HEAD}c8|\n")
    assert len(heard(study.read_foreign(path))[0]) == 5 and "2 tunes; the first" in capsys.readouterr().out


@pytest.mark.parametrize("name, data, why", [
    ("a.musicxml", b"<score/>", ".abc, .mid, .midi"), ("a.abc.gz", b"", ".abc, .mid, .midi"),
    ("a.txt", HEAD.encode(), ".abc, .mid, .midi"), ("b.abc", b"no tune", "K:"), ("c.abc", None, "no file"),
    ("d.abc", (HEAD + "z8|").encode(), "no music"), ("e.abc", b"\xff\xfe\x00", "K:")])
def test_what_is_no_tune_is_refused_in_a_line(tmp_path, name, data, why):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"\A.*{why}.*\Z"):
        study.read_foreign(tmp_path / name)


# --- The Session

COLUMNS = ("tune_id", "setting_id", "name", "type", "meter", "mode", "abc", "date", "username")


def setting(tune, number):
    bars = ["".join(random.Random(16 * number + i).choices("ABcdefg", k=8)) for i in range(16)]
    music = "|\n".join("|".join(bars[i:i + 4]) for i in range(0, 16, 4))
    return {"tune_id": tune, "setting_id": number, "name": "A Made-Up Reel", "type": "reel", "meter": "4/4",
            "mode": "Gmajor", "abc": f"|:{music}:|", "date": "2019-12-31 10:00:00", "username": "somebody"}


def as_csv(rows, columns=COLUMNS):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


GOOD = [setting(tune, 10 * tune + k) for tune in range(1, 11) for k in range(3)]


@pytest.fixture
def extract(tmp_path):
    """extract(bytes of a dump) -> (midi_index.json, {path: bytes})."""
    def run(data):
        (tmp_path / "tunes").write_bytes(data)
        cfg = Cfg(**smoke_knobs(tmp_path, DATASET=tmp_path / "tunes", MAX_MIDI_FILES=0))
        study.extract(cfg, force=True)
        index = read_json(cfg.DATA_ROOT / "midi_index.json")
        assert index["seen"] == len(index["files"]) + sum(index["skipped"].values())
        return index, {file: (cfg.MIDI_ROOT / file).read_bytes() for file in index["files"]}

    return run


def test_all_forms_of_a_dump_and_damaged_ones_give_the_same_tunes(extract):
    index, files = extract(as_csv(GOOD))
    assert len(files) == len(GOOD) and "2/21.mid" in files and index["dump"]["newest"] == "2019-12-31"
    chords = [row | {"abc": row["abc"].replace("|", '|"G"', 1)} for row in GOOD]
    bang = [row | {"abc": row["abc"].replace("\n", "! ")} for row in GOOD]
    pages = [{"id": tune, "type": "reel", "settings": [
        {"id": row["setting_id"], "key": "Gmajor", "abc": row["abc"]}
        for row in GOOD if row["tune_id"] == tune]} for tune in range(1, 11)]
    for data in (json.dumps(GOOD), b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), json.dumps({"tunes": pages}),
                 as_csv(chords), as_csv(chords).replace(b'""', b'\\"'), json.dumps(bang),
                 json.dumps(GOOD).replace("\\n", "<br />\\r\\n"), json.dumps(GOOD).replace("\\n", "\\\\n"),
                 as_csv(GOOD).replace(b"\n", b"\r\n"), as_csv(GOOD).replace(b"A Made-Up", b"Caf\xe9"),
                 as_csv(GOOD, COLUMNS[:2] + COLUMNS[4:7]), as_csv(GOOD) + b"1,2\n\n,,,,,,,\n1," + b"x," * 50,
                 as_csv(GOOD) + b'9,9,"never closed,reel,4/4,Gmajor,' + b"A\n" * 200_000):
        assert extract(data.encode() if isinstance(data, str) else data)[1] == files


@pytest.mark.parametrize("change, reason", [
    ({"abc": ""}, "no music"), ({"abc": "|||  z4 |"}, "no music"), ({"abc": None}, "no music"),
    ({"mode": "Hminor"}, "no key or metre"), ({"meter": "4/4\nX:1"}, "no key or metre"),
    ({"tune_id": "../../etc"}, "unsafe path"), ({"setting_id": ""}, "no tune_id or setting_id"),
    ({"abc": "A" * 200_000}, "abc2midi failed"), ({"abc": 'AB|"BcdefgabBcdefg'}, "notes lost")])
def test_a_row_that_is_no_tune_is_counted_by_its_reason(extract, change, reason):
    index, files = extract(as_csv([setting(1, 1), setting(2, 2) | change, setting(3, 3)]))
    assert list(files) == ["1/1.mid", "3/3.mid"] and index["skipped"] == {reason: 1}


@pytest.mark.parametrize("data", [
    b"", b"404: Not Found", b"[", b'[{"abc": "', b"[1, null, []]", b'{"tunes": [{"settings": 1}]}',
    b"[" * 99_999, b"\x00\xff" * 99, as_csv([]), as_csv(GOOD, COLUMNS[:6])])
def test_what_is_no_dump_is_refused_in_a_line(extract, data):
    with pytest.raises(UserError, match=r"\A.+\Z"):
        extract(data)


def test_settings_of_one_tune_stay_on_one_side(tmp_path):
    (tmp_path / "tunes.csv").write_bytes(as_csv(GOOD))
    cfg = Cfg(**smoke_knobs(tmp_path, DATASET=tmp_path / "tunes.csv", VAL_FRAC=0.1, MAX_MIDI_FILES=0))
    run_stages(cfg, "extract", "tokenize")
    sides = {}
    for tune in study.read_jsonl(cfg.tokens_root / "tunes.jsonl"):
        sides.setdefault(tune["file"].split("/")[0], set()).add(tune["split"])
    assert len(sides) == 10 and all(len(splits) == 1 for splits in sides.values())


def test_the_dump_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "THESESSION_URL", "http://127.0.0.1:9/tunes.csv")  # where no one answers
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    cfg = Cfg(**smoke_knobs(tmp_path, DATASET="thesession"))
    with pytest.raises(UserError, match="can't download"):
        study.extract(cfg)
    (cfg.DATA_ROOT / "downloads/thesession.csv").write_bytes(as_csv(GOOD))
    study.extract(cfg)
    assert cfg.corpus == "The Session, settings until 2019-12-31"
    assert read_json(cfg.DATA_ROOT / "midi_index.json")["seen"] == len(GOOD)
