"""The Session: a made-up dump with hostile fields, a host that fails, a split by tune."""
import csv
import functools
import http.server
import io
import json
import random
import threading
from pathlib import Path

import pytest

import LakhMIDI as study
from LakhMIDI import Cfg, UserError, read_json, run_stages

COLUMNS = ("tune_id", "setting_id", "name", "type", "meter", "mode", "abc", "date", "username", "composer")


def melody(seed, bars=16):
    rng = random.Random(seed)
    music = ["".join(rng.choices("ABcdefg", k=8)) for _ in range(bars)]
    return "|:" + "|\n".join("|".join(music[i:i + 4]) for i in range(0, bars, 4)) + ":|"


def setting(tune=1, number=1, **fields):
    return {"tune_id": tune, "setting_id": number, "name": "A Made-Up Reel", "type": "reel", "meter": "4/4",
            "mode": "Gmajor", "abc": melody(number), "date": "2019-12-31 10:00:00", "username": "somebody",
            "composer": "", **fields}


def as_csv(rows, columns=COLUMNS):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


GOOD = [setting(tune, 10 * tune + k) for tune in range(1, 41) for k in range(3)]


@pytest.fixture
def extract(tmp_path, monkeypatch):
    """extract(bytes of a dump) -> (midi_index.json, {path: text})."""
    monkeypatch.chdir(tmp_path)

    def run(data, name="tunes.csv"):
        (tmp_path / name).write_bytes(data)
        cfg = Cfg.smoke(tmp_path, DATASET=tmp_path / name, MAX_MIDI_FILES=0)
        study.extract(cfg)
        index = read_json(tmp_path / "data_lakh/midi_index.json")
        assert index["seen"] == len(index["files"]) + sum(index["skipped"].values())
        return index, {file: (cfg.MIDI_ROOT / file).read_text("utf-8") for file in index["files"]}

    return run


def test_a_setting_becomes_a_complete_tune(extract):
    row = setting(7, 70, name="Tom &amp; Jerry's \u201cReel\u201d", abc='"G"GABc dedB:|\nA:|')
    index, files = extract(as_csv([row]))
    title, music = "T:Tom & Jerry's \u201cReel\u201d\n", '"G"GABc dedB:|\nA:|\n'
    assert files == {"7/70.abc": f"X:1\n{title}L:1/8\nM:4/4\nR:reel\nK:Gmaj\n{music}"}
    assert index["dump"]["newest"] == "2019-12-31" and index["dump"]["cleaned"]["name"] == 1
    assert index["dump"]["bytes"] > 100 and len(index["dump"]["sha256"]) == 64


def test_csv_and_json_give_the_same_tunes(extract):
    _, files = extract(as_csv(GOOD))
    assert len(files) == len(GOOD)
    assert extract(json.dumps(GOOD).encode(), "tunes.json")[1] == files
    assert extract(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "tunes.json")[1] == files
    old = as_csv([row | {"tune": row["tune_id"], "setting": row["setting_id"]} for row in GOOD],
                 ("tune", "setting", *COLUMNS[2:]))
    assert extract(old)[1] == files


@pytest.mark.parametrize("change, reason", [
    ({"abc": ""}, "no music"), ({"abc": "|||  z4 |"}, "no music"), ({"abc": None}, "no music"),
    ({"mode": "Hminor"}, "no key or metre"), ({"mode": ""}, "no key or metre"),
    ({"meter": "four"}, "no key or metre"), ({"meter": "4/4\nX:1"}, "no key or metre"),
    ({"tune_id": "../../etc"}, "no tune_id or setting_id"),
    ({"setting_id": ""}, "no tune_id or setting_id"), ({"setting_id": "1/2"}, "no tune_id or setting_id"),
    ({"abc": "A" * 200_000}, "no tune_id or setting_id")])
def test_a_row_that_is_no_tune_is_counted_by_its_reason(extract, change, reason):
    index, files = extract(as_csv([setting(1, 1), setting(2, 2) | change, setting(3, 3)]))
    assert list(files) == ["1/1.abc", "3/3.abc"] and index["skipped"] == {reason: 1}


def test_dirt_in_a_field_is_cleaned_and_counted(extract):
    dirty = (melody(2).replace("\n", "\r\n") + "\x00\u200b\n\n\nT:another name\nZ: somebody\nK:Amin\n"
             "&quot;Am&amp;quot;A2&deg A2|")
    index, files = extract(as_csv([setting(1, 2, name="<script>alert(1)</script>\nK:C", abc=dirty)]))
    text = files["1/2.abc"]
    assert text.count("\nT:") == 1 and text.index("\nT:") < text.index("\nK:G") and "\nZ:" not in text
    assert "\r" not in text and "\0" not in text and "\u200b" not in text and "\n\n" not in text
    assert text.endswith('K:Amin\n"Am"A2&deg A2|\n')
    assert index["dump"]["cleaned"]["abc"] == index["dump"]["cleaned"]["words in abc"] == 1


@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbf" + as_csv(GOOD[:5]), as_csv(GOOD[:5]).replace(b"\n", b"\r\n"),
    as_csv(GOOD[:5]).replace(b"A Made-Up", "Caf\u00e9".encode("latin-1")),
    as_csv(GOOD[:5]) + b"1,2\n\n,,,,,,,\n1," + b"x," * 50,
    as_csv(GOOD[:5]) + b'9,9,"a quotation mark that is never closed,reel,4/4,Gmajor,' + b"A\n" * 200_000,
    as_csv(GOOD[:5], COLUMNS[:2] + COLUMNS[4:7]), as_csv(GOOD[:5]) + as_csv(GOOD[3:4])[:-30]],
    ids=["BOM", "CRLF", "Latin-1", "ragged", "unclosed", "few columns", "cut off"])
def test_a_damaged_dump_gives_what_is_whole(extract, data):
    files = extract(data)[1]
    assert set(files) >= {f"{row['tune_id']}/{row['setting_id']}.abc" for row in GOOD[:5]}
    assert all("\nK:Gmaj\n|:" in text for text in files.values())


@pytest.mark.parametrize("data", [
    b"", b"\n", b"404: Not Found", b"<html>", b"[", b'[{"abc": "', b"[1, null, []]", b"[" * 99_999,
    b"\x00\xff" * 99, as_csv([]), as_csv(GOOD, COLUMNS[:6]), "tune_id,abc\n1,A".encode("utf-16")])
def test_what_is_no_dump_is_refused_in_a_line(extract, data):
    with pytest.raises(UserError) as error:
        extract(data)
    assert "\n" not in str(error.value)


# --- the split

@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """tokens(SPLIT_BY) -> (stats.json, {file: its split}, cfg)."""
    root = tmp_path_factory.mktemp("dump")
    (root / "tunes.csv").write_bytes(as_csv(GOOD))

    def run(by):
        cfg = Cfg.smoke(root, DATASET=root / "tunes.csv", SPLIT_BY=by, VAL_FRAC=0.1, MAX_MIDI_FILES=0)
        run_stages(cfg, "extract", "tokenize")
        splits = {tune["file"]: tune["split"] for tune in study.read_jsonl(cfg.tokens_root / "tunes.jsonl")}
        return read_json(cfg.tokens_root / "stats.json"), splits, cfg

    return run


def sides_of_tunes(splits):
    sides = {}
    for file, split in splits.items():
        sides.setdefault(file.split("/")[0], set()).add(split)
    return sides.values()


def test_settings_of_one_tune_stay_on_one_side(tokens, capsys):
    stats, splits, cfg = tokens("work")
    assert len(splits) == len(GOOD) and all(len(sides) == 1 for sides in sides_of_tunes(splits))
    assert set(splits.values()) == {"train", "val", "test"}
    assert stats["works"]["groups"] == 40 and stats["round_trip_f1"] is None
    assert stats["works"]["leak_of_split_by_file"]["leaked_files"] == pytest.approx(0.96)
    assert "96.0%" in capsys.readouterr().out
    row = next(study.read_jsonl(cfg.ABC_ROOT / "report.jsonl"))
    text = (cfg.ABC_ROOT / row["abc"]).read_text()
    assert text.startswith("X:1\nL:1/8\nM:4/4\nR:reel\nK:Gmaj\n|:")
    assert row["n_notes"] == 128 and row["seconds"] == 32


def test_the_published_split_by_setting_is_a_knob_away(tokens):
    stats, splits, _ = tokens("file")
    assert stats["split_by"] == "file" and any(len(sides) > 1 for sides in sides_of_tunes(splits))


# --- the host

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body, how, start = self.server.body, self.server.how, 0
        self.server.asked += 1
        if how == "404" or (how == "503" and self.server.asked == 1):
            return self.send_error(int(how))
        if span := self.headers.get("Range"):
            start = int(span[6:-1])
        self.send_response(206 if span else 200)
        length = len(body) - start + 9 * (how == "longer") - 999 * (how == "shorter")
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body[start:start + 70_000] if how == "cuts" else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.how, server.asked = as_csv(GOOD * 20), "", 0
        threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
        monkeypatch.setattr(study, "THESESSION_URL", f"http://127.0.0.1:{server.server_port}/tunes.csv")
        monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        yield server
        server.shutdown()


@pytest.mark.parametrize("how", ["", "cuts", "503"])
def test_the_dump_is_fetched_once_however_often_the_line_breaks(host, tmp_path, how):
    host.how = how
    cfg = Cfg.smoke(tmp_path, DATASET="thesession", MAX_MIDI_FILES=0)
    study.extract(cfg)
    index = read_json(tmp_path / "data_lakh/midi_index.json")
    assert Path(tmp_path, "data_lakh/downloads/thesession.csv").read_bytes() == host.body
    assert index["seen"] == len(GOOD) * 20 and index["dump"]["bytes"] == len(host.body)
    assert cfg.corpus == "The Session, settings until 2019-12-31"
    asked = host.asked
    assert study.extract(cfg) is False and study.extract(cfg, force=True) and host.asked == asked


@pytest.mark.parametrize("how", ["404", "longer"])
def test_without_the_dump_the_folk_tunes_are_used_and_it_is_said(host, tmp_path, capsys, how):
    host.how = how
    cfg = Cfg.smoke(tmp_path, DATASET="thesession", MAX_MIDI_FILES=3)
    study.extract(cfg)
    said = [line for line in capsys.readouterr().out.splitlines() if "folk tunes" in line]
    assert len(said) == 1 and "can't download" in said[0]
    assert cfg.corpus == study.FOLK and len(read_json(tmp_path / "data_lakh/midi_index.json")["files"]) == 3
    host.how = ""
    study.extract(cfg, force=True)
    assert cfg.corpus.startswith("The Session")


def test_a_host_that_sends_less_than_the_file_gives_what_is_whole(host, tmp_path):
    host.how = "shorter"
    study.extract(Cfg.smoke(tmp_path, DATASET="thesession", MAX_MIDI_FILES=0))
    assert read_json(tmp_path / "data_lakh/midi_index.json")["seen"] > len(GOOD) * 19


def test_the_whole_study_runs_on_settings(tmp_path):
    (tmp_path / "tunes.csv").write_bytes(as_csv(GOOD))
    cfg = Cfg.smoke(tmp_path, DATASET=tmp_path / "tunes.csv", MAX_MIDI_FILES=0, MODELS=("gpt_8w", "lstm_10w"))
    run_stages(cfg)
    music = read_json(Path(cfg.SAVE_DIR, "evaluation.json"))["music"]
    assert next(row for row in music if row["kind"] == "real")["valid"]["value"] == 1
    assert "would have reported" in Path(cfg.SAVE_DIR, "report.html").read_text("utf-8")
