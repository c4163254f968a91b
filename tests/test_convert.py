"""MIDI to ABC and back: fidelity on made-up music, the strict export in two other readers, harmful files."""
import io
import json
import os
import random
import re
import signal

import mido
import numpy as np
import pytest
from conftest import make_midi

import LakhMIDI
from LakhMIDI import Cfg, Rejected, abc_to_midi, convert_all, midi_to_abc, note_f1, read_abc, strict_abc

TICKS = 480  # per beat


def midi_file(voices, metres=((0, 4, 4),), tempos=((0, 120),)):
    """A MIDI file of [(program, is_drum, [(onset, duration, pitch)])]; all times in beats."""
    midi = mido.MidiFile(ticks_per_beat=TICKS)
    events = [(beat, mido.MetaMessage("time_signature", numerator=n, denominator=d)) for beat, n, d in metres]
    events += [(beat, mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(qpm))) for beat, qpm in tempos]
    midi.tracks.append(in_order(events))
    for i, (program, drum, notes) in enumerate(voices):
        channel = 9 if drum else i % 9
        events = [(0, mido.Message("program_change", program=program, channel=channel))]
        for onset, duration, pitch in notes:
            events += [(onset, mido.Message("note_on", note=pitch, velocity=80, channel=channel)),
                       (onset + duration - 1e-6, mido.Message("note_off", note=pitch, channel=channel))]
        midi.tracks.append(in_order(events))
    file = io.BytesIO()
    midi.save(file=file)
    return file.getvalue()


def in_order(events):
    """A track of (beat, message), with delta times."""
    track, now = mido.MidiTrack(), 0
    for beat, message in sorted(events, key=lambda event: event[0]):
        tick = round(beat * TICKS)
        track.append(message.copy(time=tick - now))
        now = tick
    return track


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


def reference(data):
    return LakhMIDI.score_notes(LakhMIDI.read_score(data))


def one_voice(notes):
    return notes._replace(voice=np.zeros(len(notes.pitch), int))


def test_everything_survives_the_round_trip():
    data = everything()
    notes, voices = reference(data)
    abc = midi_to_abc(data, Cfg())
    tune = read_abc(abc)
    assert note_f1(notes, tune.notes, 1 / 96) == 1  # the grids hold all of it exactly ...
    assert note_f1(notes, tune.notes, 1 / 96, durations=True) > 0.99
    assert tune.problems == []  # ... and every bar of every voice adds up
    assert tune.voices == voices and len(voices) == 20
    again, again_voices = reference(abc_to_midi(abc))
    assert note_f1(tune.notes, again, 1e-6, durations=True) == 1 and again_voices == voices
    score = LakhMIDI.read_score(abc_to_midi(abc))
    assert [(s.numerator, s.denominator) for s in score.time_signatures] == [(4, 4), (3, 4), (6, 8)]
    assert [round(tempo.qpm) for tempo in score.tempos] == [90, 102, 140, 70]  # 102: the mean of a bar
    assert set(abc) < set(map(chr, range(32, 127))) | {"\n"} and "(3" in abc and "Z" in abc


def test_the_text_is_the_notation_it_claims_to_be():
    """Small cases whose text is known: a chord, a tie, a layer, a triplet, a voice that is silent."""
    notes = [(0, 4, 60), (0, 1, 76), (1, 3, 79), (4, 6, 67), (4, 6, 71)]
    notes += [(10 + i / 3, 1 / 3, 72 + i) for i in range(3)] + [(11, 1, 61), (12, 4, 60)]
    abc = midi_to_abc(midi_file([(0, False, notes), (0, False, [(12, 4, 72)])]), Cfg(MIN_NOTES=1))
    body = abc[abc.index("[V:1]"):].split("\n")
    tune = read_abc(abc)
    assert len(body) == 5 and body[3].startswith("[V:1]") and "[V:2]Z3|" in body[3]
    assert "&" in body[0] and body[1].count("]") == 2 and "-|" in body[1] and "(3" in body[2]
    assert note_f1(reference(midi_file([(0, False, [*notes, (12, 4, 72)])]))[0], tune.notes, 1e-6, True) == 1


def test_accidentals_do_not_depend_on_the_reader():
    """A letter that a bar has in two forms is marked each time: no memory of accidentals can change it."""
    notes = [(i / 4, 0.25, 60 + 7 * i % 12) for i in range(64)]
    abc = midi_to_abc(midi_file([(0, False, notes)]), Cfg())
    for bar in abc[abc.index("[V:1]") + 5:].split("\n[V:1]"):
        forms = {}
        for mark, letter in re.findall("([_^=]*)([A-Ga-g])", bar):
            forms.setdefault(letter.upper(), set()).add(mark)
        assert len(set.union(*forms.values())) > 1
        assert all("" not in marks for marks in forms.values() if len(marks) > 1)


@pytest.mark.parametrize("text", ["", "X:1\nK:C\n", "everything"])
def test_strict_export_is_read_alike_by_others(text):
    text = midi_to_abc(everything(), Cfg()) if text == "everything" else text
    tune = read_abc(text)
    assert note_f1(tune.notes, read_abc(strict_abc(text)).notes, 1e-6) == 1
    if len(tune.notes.pitch):
        notes, sounds = LakhMIDI.abc2midi_notes(text)
        assert note_f1(tune.notes, notes, 1 / 100) == 1
        assert note_f1(tune.notes, notes, 1 / 100, durations=True) > 0.99
        assert set(sounds) == set(tune.voices)
        assert note_f1(one_voice(tune.notes), LakhMIDI.music21_notes(text), 1 / 100) > 0.998


def test_strict_export_of_more_voices_than_abc2midi_knows_keeps_the_notes():
    voices = [(n, False, [(n % 7 + i, 2.5, 50 + i) for i in range(0, 16, 2)]) for n in range(40)]
    text = midi_to_abc(midi_file(voices), Cfg())
    assert len(read_abc(text).voices) == 40
    strict = strict_abc(text)
    assert 0 < strict.count("\nV:") <= 30
    notes, _ = LakhMIDI.abc2midi_notes(text)
    assert note_f1(one_voice(read_abc(text).notes), one_voice(notes), 1 / 100) > 0.99


def test_a_hundredth_of_the_characters_wrong_leaves_most_notes():
    text = midi_to_abc(everything(), Cfg())
    start, rng, scores = text.index("[V:"), random.Random(1), []
    for _ in range(10):
        chars = list(text)
        for i in range(start, len(chars)):
            if rng.random() < 0.01:
                chars[i] = rng.choice(["", rng.choice(text), chars[i] + rng.choice(text)])
        scores.append(note_f1(read_abc(text).notes, read_abc("".join(chars)).notes))
    assert np.median(scores) > 0.8


def test_no_string_makes_the_reader_raise():
    rng, text = random.Random(2), midi_to_abc(everything(), Cfg())
    alphabet = sorted(set(text)) + list("\0\r\t\"!{}<>~xyz²٣éß\ud800\U0001f3b5")
    for n in range(300):
        if n % 3:
            at = rng.randrange(len(text))
            garbage = text[at:at + 300] + "".join(rng.choices(alphabet, k=rng.randrange(60)))
        else:
            garbage = "".join(rng.choices(alphabet, k=rng.randrange(400)))
        LakhMIDI.read_score(abc_to_midi(garbage))
        assert read_abc(strict_abc(garbage)).problems is not None
    hostile = ["X:1\nK:C\n" + "C99999999" * 50, "[V:1]Z9999|c|" * 30, "M:9999/1\n(9:9999:9999c",
               "L:1/99999\nK:C\n^^^c,,,,,,,,,,,,|", "Q:1/4=999999999999\nK:C\nc|",
               "L:0/0\nM:0/0\nQ:0/0=0\nK:H\nc/0", "K:C\n[V:1]" + "[" * 5000]
    for garbage in hostile:
        LakhMIDI.read_score(abc_to_midi(garbage))
        strict_abc(garbage)


def test_problems_are_named():
    good = "X:1\nL:1/4\nM:4/4\nK:C\nV:1\n[V:1]cdef|\n[V:1]c4-|\n[V:1]c4|\n"
    assert read_abc(good).problems == []
    for wrong, slug in [("cde|", "bar_length"), ("cdef", "no_bar_line"), ("c3[df|", "open_bracket"),
                        ("cdef-|", "open_tie"), ("cd(3ef|", "open_tuplet"), ("c?def|", "bad_char"),
                        ("Z2|cdef|", "silent_bars")]:
        assert slug in {problem for _, problem in read_abc(good.replace("cdef|", wrong)).problems}, slug


def test_other_peoples_abc_is_read():
    tune = read_abc('X:1\nM:6/8\nL:1/8\nK:Edor\n|:"Em"B2e {f}~gfe|!trill![1 Bcd d2e:|[2 B6||\nK:G\nf6|]\n')
    assert tune.notes.pitch.tolist() == [71, 76, 79, 78, 76, 71, 73, 74, 74, 76, 71, 78]
    assert tune.notes.onset.tolist()[:6] == [0, 1, 1.5, 2, 2.5, 3] and tune.n_bars == 4


@pytest.mark.parametrize("data, reason", [
    (b"", "bad_header"), (b"no music", "bad_header"), (make_midi(1)[:60], "bad_bytes"),
    (make_midi(2, bars=0), "no_notes"), (midi_file([(0, False, [(0, 1, 60)])]), "too_few_notes"),
    (midi_file([(0, False, [(i * 3000, 1, 60) for i in range(9)])]), "too_long"),
    (midi_file([(0, False, [(i / 100, 0.01, 30 + i % 80) for i in range(400)])]), "too_dense")])
def test_rejects_have_reasons(data, reason):
    with pytest.raises(Rejected) as reject:
        midi_to_abc(data, Cfg())
    assert reject.value.reason == reason


def test_no_text_is_longer_than_allowed():
    data = make_midi(3, bars=40)
    length = len(midi_to_abc(data, Cfg()))
    assert len(midi_to_abc(data, Cfg(MAX_ABC_CHARS=length))) == length
    with pytest.raises(Rejected, match="too_many_chars"):
        midi_to_abc(data, Cfg(MAX_ABC_CHARS=length - 1))


def mutate(data, rng):
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        del data[rng.randrange(len(data)):]
    for _ in range(rng.choice((1, 5, 30))):
        at = rng.randrange(8 if kind == 1 else 22, max(23, len(data)))
        if at < len(data):
            data[at] = rng.choice((0, 127, 128, 255, data[at] ^ 1 << rng.randrange(8)))
    return bytes(data)


def test_mutated_files_are_converted_or_rejected():
    rng, seeds, converted = random.Random(3), [everything(), make_midi(4), make_midi(5)], 0
    for _ in range(300):
        data = mutate(rng.choice(seeds), rng)
        try:
            row = LakhMIDI.convert_one(data, Cfg())
        except Rejected:
            continue
        converted += 1
        assert read_abc(row["abc"]).problems == []  # bars add up, whatever the file was
    assert converted > 50


def die_or_convert(source, target, cfg):
    """Instead of convert_file, in the worker."""
    if source.name == "crash.mid":
        os.kill(os.getpid(), signal.SIGKILL)
    if source.name == "hang.mid":
        signal.pause()
    if source.name == "bug.mid":
        raise AssertionError
    return CONVERT_FILE(source, target, cfg)


CONVERT_FILE = LakhMIDI.convert_file


@pytest.mark.skipif(not hasattr(signal, "pause"), reason="POSIX signals")
def test_a_worker_that_dies_or_hangs_costs_one_file(tmp_path, monkeypatch):
    names = ["a.mid", "crash.mid", "b.mid", "hang.mid", "gone.mid", "c.mid"]
    for seed, name in enumerate(names):
        if name != "gone.mid":
            (tmp_path / name).write_bytes(make_midi(seed))
    monkeypatch.setattr(LakhMIDI, "convert_file", die_or_convert)
    cfg = Cfg(MIDI_ROOT=tmp_path, ABC_ROOT=tmp_path / "abc", WORKERS=2, CONVERT_TIMEOUT=2)
    rows = list(convert_all(names, cfg))
    assert [row.get("reason", "text") for row in rows] == [
        "text", "crashed", "text", "timeout", "failed_FileNotFoundError", "text"]
    assert (tmp_path / "abc" / rows[5]["abc"]).read_bytes().count(b"\r") == 0


def test_an_interrupted_conversion_goes_on_and_another_recipe_starts_anew(tmp_path, monkeypatch):
    (tmp_path / "midi").mkdir()
    for seed in range(6):
        (tmp_path / "midi" / f"{seed}.mid").write_bytes(make_midi(seed))
    (tmp_path / "midi" / "6.mid").write_bytes(b"nothing")
    cfg = Cfg(USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=tmp_path / "midi", DATA_ROOT=tmp_path / "data", WORKERS=1)
    LakhMIDI.extract(cfg)
    done = []

    def stop_after_three(files, cfg):
        for i, row in enumerate(real(files, cfg)):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(files[i])
            yield row

    real = LakhMIDI.convert_all
    monkeypatch.setattr(LakhMIDI, "convert_all", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        LakhMIDI.convert(cfg)
    journal = cfg.ABC_ROOT / "journal_0_of_1.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"file": "3.mi')  # the line that was being written
    monkeypatch.setattr(LakhMIDI, "convert_all", lambda files, cfg: (done.extend(files), real(files, cfg))[1])
    LakhMIDI.convert(cfg)
    assert sorted(done) == [f"{i}.mid" for i in range(7)]  # each once
    report = [json.loads(line) for line in (cfg.ABC_ROOT / "report.jsonl").read_text().splitlines()]
    assert [row["file"] for row in report] == done and report[-1] == {"file": "6.mid", "reason": "bad_header"}
    assert all(row["f1"] == 1 and (cfg.ABC_ROOT / row["abc"]).is_file() for row in report[:6])
    assert np.load(cfg.ABC_ROOT / "signatures.npy").shape == (6, LakhMIDI.NUM_PERM) and not journal.exists()
    few = Cfg(USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=tmp_path / "midi", DATA_ROOT=tmp_path / "data", WORKERS=1,
              MAX_ABC_CHARS=max(row["n_chars"] for row in report[:6]) - 1)
    LakhMIDI.convert(few)
    texts = sorted(path.name for path in cfg.ABC_ROOT.glob("*.abc"))
    rows = [json.loads(line) for line in (cfg.ABC_ROOT / "report.jsonl").read_text().splitlines()]
    assert texts == sorted(row["abc"] for row in rows if "abc" in row) and len(texts) < 6
