"""MIDI to ABC and back: fidelity on made-up music, the text as abc2midi hears it, harmful files."""
import itertools
import os
import random
import re
import signal

import numpy as np
import pytest
import symusic
from conftest import make_midi

import LakhMIDI as study
from LakhMIDI import Cfg, Reader, Rejected, abc_to_midi, midi_to_abc, note_f1, read_abc, read_score

TICKS = 480  # per beat


def midi_file(voices, metres=((0, 4, 4),), tempos=((0, 120),)):
    """A MIDI file of [(program, is_drum, [(onset, duration, pitch)])]; all times in beats."""
    score = symusic.Score(TICKS)
    score.time_signatures.extend([symusic.TimeSignature(int(at * TICKS), n, d) for at, n, d in metres])
    score.tempos.extend([symusic.Tempo(int(at * TICKS), qpm) for at, qpm in tempos])
    for program, drum, notes in voices:
        track = symusic.Track(program=program, is_drum=drum)
        for onset, length, pitch in notes:
            start = round(onset * TICKS)
            track.notes.append(symusic.Note(start, round((onset + length) * TICKS) - start, pitch, 80))
        score.tracks.append(track)
    return score.dumps_midi()


def everything():
    """Music with all that is hard: triplets, overlaps, long ties, silence, metres, tempos, 20 tracks."""
    rng = random.Random(5)
    melody = [(16 + i / 2, 0.5, rng.randint(60, 84)) for i in range(40)]
    triplets = [(20 + i / 3, 1 / 3, 60 + i % 12) for i in range(48)]
    swing = [(i + at, long, 50 + i % 7) for i in range(16, 40) for at, long in ((0, 2 / 3), (2 / 3, 1 / 3))]
    pad = [(17.5 + 8 * i, 8, pitch) for i in range(4) for pitch in (48, 52, 55)]  # each over three bar lines
    overlaps = [(16 + i, 1.5 + i % 3, 40 + 2 * (i % 9)) for i in range(30)]
    strokes = [(16 + i / 4, 0.25, 64) for i in range(64)]
    drums = [(16 + i / 2, 0.25, (36, 42, 38, 42)[i % 4]) for i in range(60)]
    voices = [(73, False, melody), (0, False, triplets), (11, False, swing), (48, False, pad)]
    voices += [(0, False, overlaps), (24, False, strokes), (0, True, drums)]
    voices += [(n, False, [(30 + n / 8 + i, 1, 55 + i) for i in range(8)]) for n in range(40, 53)]
    return midi_file(voices, ((0, 4, 4), (20, 3, 4), (32, 6, 8)), tempos=((0, 90), (22, 140), (32, 70)))


def scale(beats=16, start=0, pitch=72):
    return [(start + i, 1, pitch + (0, 2, 4, 5, 7, 9, 11)[i % 7]) for i in range(beats)]


def text_of(*voices, metres=((0, 4, 4),), tempos=((0, 120),)):
    """The ABC of piano voices, each a list of notes."""
    return midi_to_abc(midi_file([(0, False, notes) for notes in voices], metres, tempos), Cfg(MIN_NOTES=1))


def one_voice(notes):
    return notes._replace(voice=0 * notes.voice)


def heard(text):
    """What abc2midi makes of a text as it stands: (Notes without voices, programs)."""
    score = read_score(study.run_abc2midi(text.encode())[0])
    return one_voice(score.notes), {program for program, drum in score.voices if not drum}


def music(text):
    """The lines of a text below its header."""
    return [line for line in text.splitlines() if line.endswith("|")]


def test_everything_survives_the_round_trip():
    data = everything()
    score, abc = read_score(data), midi_to_abc(data, Cfg())
    tune = read_abc(abc)
    assert note_f1(score.notes, tune.notes, 1 / 96) == 1  # the grids hold all of it exactly ...
    pitched = [notes._replace(**{name: column[notes.voice != 7] for name, column in notes._asdict().items()})
               for notes in (score.notes, tune.notes)]
    assert note_f1(*pitched, 1 / 96, durations=True) > 0.98
    assert tune.faults == [] and not tune.open_end  # ... and every bar of every voice adds up
    assert tune.voices == score.voices and len(tune.voices) == 20
    again = read_score(abc_to_midi(abc))
    assert {*again.voices} == {*tune.voices}  # of more than 15 voices those of one program are one
    assert note_f1(one_voice(tune.notes), one_voice(again.notes), 1 / 100) > 0.998
    assert [metre[1:] for metre in again.metres] == [(4, 4), (3, 4), (6, 8)]
    assert [round(qpm) for _, qpm in again.tempos] == [90, 102, 140, 70]  # 102: the mean of a bar
    assert set(abc) < set(map(chr, range(32, 127))) | {"\n"} and "(3" in abc
    notes, programs = heard(abc)
    assert note_f1(one_voice(score.notes), notes, 1 / 100) > 0.999
    assert programs == {program for program, drum in score.voices if not drum}


def test_the_text_is_what_section_4_says_it_is():
    voices = [[(0, 4, 62), (0, 2, 78), (2, 3, 81)],
              [(0, .33, 55), (.34, .33, 59), (.65, .33, 62), (1, 3, 55)],
              [(8 + i / 3, 1 / 3, 74 + i % 3) for i in range(24)]]
    text = text_of(*voices)
    tune, again = read_abc(text), read_score(abc_to_midi(text))
    assert note_f1(tune.notes, again.notes, 1e-6, durations=True) == 1 and again.voices == tune.voices
    assert "[V:1]f4a4-&D8|[V:2](3GBdG6&z8|" in text and "[V:1]a2z6|" in text
    assert "%%MIDI chordattack 0" not in text  # there is no chord
    assert text.startswith("X:1\nL:1/8\nM:4/4\nQ:1/4=120\nK:") and "[V:3](3=d^de(3=d^de" in text


def test_every_line_has_every_voice():
    text = midi_to_abc(everything(), Cfg())
    short = re.sub(r"\[V:\d+\]Z\d*\|(?=.)", "", text)
    assert all(line.count("[V:") == 20 for line in music(text))
    assert len(short) < 0.85 * len(text)
    assert study.complete_lines(short) == text == study.complete_lines(text)
    alone = text_of(scale())
    assert "V:" not in alone and study.complete_lines(alone) == alone


def test_where_abc2midi_has_no_room_for_all_layers_chords_end_early():
    notes = [(i, 2.5, 50 + i) for i in range(0, 16, 2)]
    reference = read_score(midi_file([(0, False, notes)] * 30)).notes
    assert note_f1(one_voice(reference), heard(text_of(*[notes] * 30))[0], 1 / 100) == 1


def test_drums_have_one_layer_and_no_key():
    drums = [(i / 2, 2, 42) for i in range(32)] + [(i, .1, 36) for i in range(16)]
    text = midi_to_abc(midi_file([(0, False, scale()), (0, True, drums)]), Cfg())
    assert "&" not in text and text.count("K:") == 1 and "%%MIDI channel 10" in text
    assert note_f1(read_score(midi_file([(0, True, drums)])).notes, read_abc(text).notes) > .7


def test_accidentals_do_not_depend_on_the_reader():
    """A letter that a bar has in two forms is marked each time: no memory of accidentals can change it."""
    for bar in music(text_of([(i / 4, 0.25, 60 + 7 * i % 12) for i in range(64)])):
        forms = {}
        for mark, letter in re.findall("([_^=]*)([A-Ga-g])", bar):
            forms.setdefault(letter.upper(), set()).add(mark)
        assert len(set.union(*forms.values())) > 1
        assert all("" not in marks for marks in forms.values() if len(marks) > 1)


def test_bars_are_those_of_the_file():
    """A pick-up, a change inside a bar, two changes at one tick; constant 1/4, as POP909 has it, is 4/4."""
    def lines(*metres):
        return music(text_of(scale(16), metres=metres))
    assert lines((0, 1, 4), (1, 4, 4))[:2] == ["c|", "[M:4/4]defg|"]
    assert lines((0, 4, 4), (6, 3, 4))[1:3] == ["[M:2/4]ga|", "[M:3/4]bcd|"]
    assert lines((0, 4, 4), (8, 2, 4), (8, 3, 4))[2] == "[M:3/4]def|"
    assert lines((0, 1, 4)) == lines((0, 4, 4)) and len(lines()) == 4


def test_a_change_of_metre_stands_in_every_voice_and_new_layer():
    voices = scale(24), [*scale(8, 0), *scale(4, 19), (20, 4, 84)]
    text = text_of(*voices, metres=((0, 4, 4), (12, 3, 4)), tempos=((0, 90), (12, 60)))
    assert "[V:1][M:3/4][Q:1/4=60]" in text and "|[V:2][M:3/4]z3|" in text and "&[M:3/4]" in text
    both = read_score(midi_file([(0, False, [*voices[0], *voices[1]])])).notes
    assert note_f1(both, heard(text)[0]) == 1


def test_time_is_that_of_the_file():
    def tempos(*changes, beats=16):
        text = text_of(scale(beats), tempos=changes)
        return re.findall(r"Q:(\S+?)[]\n]", text), read_score(abc_to_midi(text))
    assert tempos((0, 12.5))[0] == ["1/8=25"] and tempos((0, 60), (0, 90))[0] == ["1/4=90"]
    written, score = tempos((0, 100), (16, 102.9), beats=400)  # never 3 % off, yet 6 seconds in the end
    ends = [np.interp(400, *study.clock(found)) for found in (score.tempos, [(0, 100), (16, 102.9)])]
    assert abs(ends[0] - ends[1]) < 0.5 and len(written) < 5


def joined(*chunks):
    return b"".join(tag + len(body).to_bytes(4) + body for tag, body in chunks)


def test_what_other_readers_lose_is_read():
    data = midi_file([(0, False, scale())])
    head, body = re.split(b"(?s)MThd....|MTrk....", data)[1:]
    at = body.index(b"\x90") - 1  # the delta before the first note
    head, music, program = (b"MThd", head), (b"MTrk", body), (b"MTrk", b"\0\xc0\x28\0\xff\x2f\0")
    cases = {"cut": data[:-1], "header": joined((b"MThd", head[1] + b"1234"), music),
             "alien": joined(head, (b"JUNK", b"abc"), music),
             "damaged": joined(head, music, (b"MTrk", b"\0\xff\5\4la l\0p\1\2")),
             "sysex": joined(head, (b"MTrk", body[:at] + b"\0\xf7\3abc" + body[at:])),
             "program": joined(head, program, music)}
    for name, case in cases.items():
        score = read_score(case)
        assert note_f1(read_score(data).notes, score.notes, 0) > (.96 if name == "cut" else .999), name
        assert score.voices == [(0, False)], name
    moved = read_score(joined(head, program, (b"MTrk", body[at:])))
    assert moved.voices == [(40, False)] and len(moved.notes.pitch) == len(scale())


@pytest.mark.parametrize("events, notes", [
    ([(0, 80), (100, 80), (110, 0), (200, 0)], [(0, 100), (100, 100)]),
    ([(0, 80), (100, 80), (200, 80)], [(0, 100), (100, 100), (200, TICKS)]),
    ([(0, 80), (100, 0), (150, 0), (200, 80), (230, 0)], [(0, 100), (200, 30)])])
def test_a_note_ends_where_its_key_is_struck_again_and_lasts_a_beat_without_an_end(events, notes):
    deltas = np.diff([0, *(tick for tick, _ in events)]).tolist()
    track = b"".join(bytes([delta >> 7 | 128, delta & 127, 0x90, 60, velocity])
                     for delta, (_, velocity) in zip(deltas, events, strict=True))
    head = b"\0\0\0\1" + TICKS.to_bytes(2)
    found = read_score(joined((b"MThd", head), (b"MTrk", track + b"\0\xff\x2f\0"))).notes
    assert list(zip(found.onset * TICKS, found.duration * TICKS, strict=True)) == notes


def test_long_silence_is_short_and_a_hung_note_costs_nothing():
    text = text_of(scale(8) + scale(8, 2000), scale(8))
    assert "[V:1]Z498|[V:2]Z498|" in text and len(music(text)) == 5
    assert read_abc(text).n_bars == 502 and read_abc(text).faults == []
    assert len(text_of([*scale(), (0, 9_000, 40)])) < 400


def test_no_string_makes_the_reader_raise():
    rng, text = random.Random(2), midi_to_abc(everything(), Cfg())
    alphabet = sorted(set(text)) + list("\0\r\t\"!{}<>~xyz²٣éß\ud800\U0001f3b5")
    texts = ["X:1\nK:C\n" + "C99999999" * 50, "[V:1]Z9999|c|" * 30, "M:9999/1\n(9:9999:9999c", "[V:1\nc|",
             "L:1/99999\nK:C\n^^^c,,,,,,,,,,,,|", "Q:1/4=999999999999\nK:C\nc|", "Z9999|\n" * 99 + "c|",
             "L:0/0\nM:0/0\nQ:0/0=0\nK:H\nc/0", "K:C\n[V:1]" + "[" * 5000]
    for _ in range(300):
        at = rng.randrange(len(text))
        part = text[at:at + 300] if rng.random() < 2 / 3 else ""
        texts.append(part + "".join(rng.choices(alphabet, k=rng.randrange(100))))
    for garbage in texts:
        read_score(abc_to_midi(study.complete_lines(garbage)))


GOOD = "X:1\nL:1/4\nM:4/4\nK:C\nV:1\nV:2\n[V:1]cdef|[V:2]Z|\n[V:1]c4-|[V:2]G4|\n[V:1]c4|[V:2]Z|\n"


@pytest.mark.parametrize("wrong, reason", [
    ("cde|", "bar_length"), ("cdefg|", "bar_length"), ("cdef", "no_bar_line"), ("c3[df|", "open_bracket"),
    ("cdef-|", "open_tie"), ("cd(3ef|", "open_tuplet"), ("c?def|", "bad_char"), ("Z2|", "silent_bars"),
    ("[M:3/4]cde|", "metre"), ("[M:3/9]cdef|", "bad_field"), ("c4&z3|", "bar_length")])
def test_faults_are_named_with_bar_and_voice(wrong, reason):
    assert read_abc(GOOD).faults == []
    faults = read_abc(GOOD.replace("cdef|", wrong)).faults
    assert (7, 0, reason) in {(fault.line, fault.bar, fault.reason) for fault in faults}
    assert read_abc(GOOD.replace("G4|", "G3|")).faults == [(8, 1, "2", "bar_length")]


def test_a_line_can_be_tried_before_it_is_read():
    reader = Reader()
    for line in GOOD.splitlines()[:-1]:
        reader.read_line(line)
    rows = [list(row) for row in reader.rows]
    for line, good in [("[V:1]c4|[V:2]Z|", True), ("[V:1]c3|[V:2]Z|", False), ("[V:1]d4|[V:2]Z|", False)]:
        twin = reader.fork()
        twin.read_line(line)
        assert (twin.faults == []) is good and rows == reader.rows and reader.faults == []
    assert read_abc(GOOD[:-20]).open_end and not read_abc(GOOD).open_end


@pytest.mark.parametrize("data, reason", [
    (b"", "bad_header"), (b"no music", "bad_header"), (make_midi(1)[:60], "bad_bytes"),
    (make_midi(1).replace(b"\x90", b"\xf4", 1), "bad_bytes"), (make_midi(2, bars=0), "no_notes"),
    (midi_file([(0, False, [(0, 1, 60)])]), "too_few_notes"),
    (midi_file([(0, False, [(i * 30_000, 1, 60) for i in range(9)])]), "too_long"),
    (midi_file([(0, False, [(i / 100, 0.01, 30 + i % 80) for i in range(400)])]), "too_dense"),
    (midi_file([(0, False, scale(500))]), "too_many_chars"),
    (midi_file([(0, False, scale())] * 39), "too_many_voices")])
def test_rejects_have_reasons(data, reason):
    with pytest.raises(Rejected) as reject:
        midi_to_abc(data, Cfg(MAX_ABC_CHARS=600))
    assert reject.value.reason == reason


def test_mutated_files_are_converted_or_rejected():
    rng, seeds, converted = random.Random(3), [everything(), make_midi(4), make_midi(5)], 0
    for _ in range(300):
        data = bytearray(rng.choice(seeds))
        kind = rng.randrange(4)
        if kind == 0:
            del data[rng.randrange(len(data)):]
        for _ in range(rng.choice((1, 5, 30))):
            at = rng.randrange(8 if kind == 1 else 22, max(23, len(data)))
            if at < len(data):
                data[at] = rng.choice((0, 127, 128, 255, data[at] ^ 1 << rng.randrange(8)))
        try:
            row = study.convert_one(bytes(data), Cfg())
        except Rejected:
            continue
        converted += 1
        assert read_abc(row["abc"]).faults == []  # bars add up, whatever the file was
    assert converted > 50


def extracted(folder, files, **knobs):
    """The Cfg of a study of {name: bytes of a MIDI file}, ready to be converted."""
    (folder / "midi").mkdir()
    for name, data in files.items():
        (folder / "midi" / name).write_bytes(data)
    cfg = Cfg(USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=folder / "midi", DATA_ROOT=folder / "data", **knobs)
    study.extract(cfg)
    return cfg


def convert_or_die(data, cfg, convert=study.convert_one):
    """Instead of convert_one, in the worker: what becomes of a file is the first word in it."""
    if data.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.startswith(b"hang"):
        signal.pause()
    return convert(None if data.startswith(b"bug") else data, cfg)


@pytest.mark.skipif(not hasattr(signal, "pause"), reason="POSIX signals")
def test_a_worker_that_dies_or_hangs_costs_one_file_and_a_bug_is_told(tmp_path, monkeypatch, capsys):
    files = {"a.mid": make_midi(1), "b.mid": b"crash", "c.mid": b"hang", "d.mid": b"bug", "e.mid": b"MThd",
             "f.mid": make_midi(2)}
    monkeypatch.setattr(study, "convert_one", convert_or_die)
    cfg = extracted(tmp_path, files, WORKERS=2, CONVERT_TIMEOUT=2)
    study.convert(cfg)
    rows = list(study.read_jsonl(cfg.ABC_ROOT / "report.jsonl"))
    bug = "bug: TypeError in read_score"
    assert [row.get("reason", "") for row in rows] == ["", "crashed", "timeout", bug, "bad_header", ""]
    assert f"A {bug} cost 1 files" in capsys.readouterr().out
    assert (cfg.ABC_ROOT / rows[5]["abc"]).read_bytes().count(b"\r") == 0


def test_an_interrupted_conversion_goes_on_and_another_recipe_starts_anew(tmp_path, monkeypatch):
    files = {f"{seed}.mid": make_midi(seed) for seed in range(6)} | {"6.mid": b"nothing"}
    cfg, asked, convert_all = extracted(tmp_path, files, WORKERS=1), [], study.convert_all

    def stop_after_three(files, cfg):
        yield from itertools.islice(convert_all(files, cfg), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "convert_all", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        study.convert(cfg)
    journal = cfg.ABC_ROOT / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"file": "3.mi')  # the line that was being written
    monkeypatch.setattr(study, "convert_all", lambda *args: asked.extend(args[0]) or convert_all(*args))
    study.convert(cfg)
    report = list(study.read_jsonl(cfg.ABC_ROOT / "report.jsonl"))
    assert [row["file"] for row in report][3:] == asked and {row["file"] for row in report} == files.keys()
    assert report[-1] == {"file": "6.mid", "reason": "bad_header"}
    assert all(row["f1"] == 1 and (cfg.ABC_ROOT / row["abc"]).is_file() for row in report[:6])
    assert np.load(cfg.ABC_ROOT / "signatures.npy").shape == (6, study.NUM_PERM) and not journal.exists()

    cfg.MAX_ABC_CHARS = max(row["n_chars"] for row in report[:6]) - 1
    study.convert(cfg)
    report = study.read_jsonl(cfg.ABC_ROOT / "report.jsonl")
    texts = {path.name for path in cfg.ABC_ROOT.glob("*.abc")}
    assert texts == {row["abc"] for row in report if "abc" in row} and len(texts) < 6


def test_comments_count_down_the_lines_of_music_that_are_to_come():
    bars = [f"[V:1]C{n}|[V:2]c|\n" for n in range(1, 10)]
    header = "X:1\n%%MIDI chordattack 0\nK:C\nV:1\nV:2\n"
    counted = header + "%9\n" + bars[0] + "%8\n" + "".join(bars[1:5]) + "%4\n" + "".join(bars[5:])
    assert study.count_down(header + "".join(bars)) == study.count_down(counted) == counted
    assert study.count_down(header + "".join(bars), 3).count("%") == 2 + 3  # %12, %8, %4
    alone = study.count_down("X:1\nK:C\n" + "C4|\n" * 17)
    assert [line for line in alone.splitlines() if line[0] == "%"] == ["%17", "%16", "%8"]
