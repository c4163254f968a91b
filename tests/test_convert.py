"""MIDI to ABC and back: fidelity on made-up music, the text as abc2midi hears it, harmful files."""
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
from LakhMIDI import (
    Cfg,
    Reader,
    Rejected,
    abc_to_midi,
    complete_lines,
    convert_all,
    midi_to_abc,
    note_f1,
    read_abc,
    read_score,
    run_abc2midi,
    shorten_lines,
)

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


def one_voice(notes):
    return notes._replace(voice=np.zeros(len(notes.pitch), int))


def heard(text):
    """What abc2midi makes of a text as it stands: (Notes without voices, programs)."""
    score = read_score(run_abc2midi(text.encode())[0])
    return one_voice(score.notes), {program for program, drum in score.voices if not drum}


def music(text):
    """The lines of a text below its header."""
    return [line for line in text.splitlines() if line.endswith("|")]


def scale(beats=16, start=0, pitch=72):
    return [(start + i, 1, pitch + (0, 2, 4, 5, 7, 9, 11)[i % 7]) for i in range(beats)]


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
    assert note_f1(tune.notes, again.notes, 1e-6, durations=True) == 1 and again.voices == tune.voices
    assert [metre[1:] for metre in again.metres] == [(4, 4), (3, 4), (6, 8)]
    assert [round(qpm) for _, qpm in again.tempos] == [90, 102, 140, 70]  # 102: the mean of a bar
    assert set(abc) < set(map(chr, range(32, 127))) | {"\n"} and "(3" in abc


def test_the_text_is_what_section_4_says_it_is():
    voices = [(0, False, [(0, 4, 62), (0, 2, 78), (2, 3, 81)]),
              (0, False, [(0, .33, 55), (.34, .33, 59), (.65, .33, 62), (1, 3, 55)])]
    triplets = [(8 + i / 3, 1 / 3, 74 + i % 3) for i in range(24)]
    text = midi_to_abc(midi_file([*voices, (0, False, triplets)]), Cfg(MIN_NOTES=1))
    assert "[V:1]f4a4-&D8|[V:2](3GBdG6|" in text and "[V:1]a2z6|" in text
    assert "%%MIDI chordattack 0" not in text  # there is no chord
    assert text.startswith("X:1\nL:1/8\nM:4/4\nQ:1/4=120\nK:") and "[V:3](3=d^de(3=d^de" in text


def test_every_line_has_every_voice_and_the_shorter_form_is_the_same_music():
    text = midi_to_abc(everything(), Cfg())
    short = shorten_lines(text)
    assert all(line.count("[V:") == 20 for line in music(text))
    assert len(short) < 0.8 * len(text) and complete_lines(short) == text == complete_lines(text)
    for mine, other in zip(read_abc(short).notes, read_abc(text).notes, strict=True):
        assert (mine == other).all()
    alone = midi_to_abc(midi_file([(0, False, scale())]), Cfg())
    assert "V:" not in alone and shorten_lines(alone) == alone == complete_lines(alone)


def test_abc2midi_hears_the_text_as_it_stands():
    data = everything()
    notes, programs = heard(midi_to_abc(data, Cfg()))
    score = read_score(data)
    assert note_f1(one_voice(score.notes), notes, 1 / 100) > 0.999
    assert programs == {program for program, drum in score.voices if not drum}


def test_where_abc2midi_has_no_room_for_all_layers_chords_end_early():
    def file(voices):
        notes = [(i, 2.5, 50 + i) for i in range(0, 16, 2)]
        return midi_file([(n, False, notes) for n in range(voices)])
    notes, _ = heard(midi_to_abc(file(30), Cfg()))
    assert note_f1(one_voice(read_score(file(30)).notes), notes, 1 / 100) == 1
    with pytest.raises(Rejected, match="too_many_voices"):
        midi_to_abc(file(39), Cfg())


def test_drums_have_one_layer_and_no_key():
    drums = [(i / 2, 2, 42) for i in range(32)] + [(i, .1, 36) for i in range(16)]
    text = midi_to_abc(midi_file([(0, False, scale()), (0, True, drums)]), Cfg())
    assert "&" not in text and text.count("K:") == 1 and "%%MIDI channel 10" in text
    assert note_f1(read_score(midi_file([(0, True, drums)])).notes, read_abc(text).notes) > .7


def test_accidentals_do_not_depend_on_the_reader():
    """A letter that a bar has in two forms is marked each time: no memory of accidentals can change it."""
    notes = [(i / 4, 0.25, 60 + 7 * i % 12) for i in range(64)]
    for bar in music(midi_to_abc(midi_file([(0, False, notes)]), Cfg())):
        forms = {}
        for mark, letter in re.findall("([_^=]*)([A-Ga-g])", bar):
            forms.setdefault(letter.upper(), set()).add(mark)
        assert len(set.union(*forms.values())) > 1
        assert all("" not in marks for marks in forms.values() if len(marks) > 1)


def test_bars_are_those_of_the_file():
    """A pick-up, a change inside a bar, two changes at one tick; constant 1/4, as POP909 has it, is 4/4."""
    def lines(*metres):
        return music(midi_to_abc(midi_file([(0, False, scale(16))], metres), Cfg()))
    assert lines((0, 1, 4), (1, 4, 4))[:2] == ["c|", "[M:4/4]defg|"]
    assert lines((0, 4, 4), (6, 3, 4))[1:3] == ["[M:2/4]ga|", "[M:3/4]bcd|"]
    assert lines((0, 4, 4), (8, 2, 4), (8, 3, 4))[2] == "[M:3/4]def|"
    assert lines((0, 1, 4)) == lines((0, 4, 4)) and len(lines()) == 4


def test_a_change_of_metre_stands_in_every_voice_and_new_layer():
    voices = [(0, False, scale(24)), (0, False, [*scale(8, 0), *scale(4, 19), (20, 4, 84)])]
    text = midi_to_abc(midi_file(voices, ((0, 4, 4), (12, 3, 4)), ((0, 90), (12, 60))), Cfg())
    assert "[V:1][M:3/4][Q:1/4=60]" in text and "|[V:2][M:3/4]z3|" in text and "&[M:3/4]" in text
    both = read_score(midi_file([(0, False, [*voices[0][2], *voices[1][2]])])).notes
    assert note_f1(both, heard(text)[0]) == 1


def test_time_is_that_of_the_file():
    def tempos(*changes, beats=16):
        text = midi_to_abc(midi_file([(0, False, scale(beats))], tempos=changes), Cfg())
        return re.findall(r"Q:(\S+?)[]\n]", text), read_score(abc_to_midi(text))
    assert tempos((0, 12.5))[0] == ["1/8=25"] and tempos((0, 60), (0, 90))[0] == ["1/4=90"]
    written, score = tempos((0, 100), (16, 102.9), beats=400)  # never 3 % off, yet 6 seconds in the end
    ends = [np.interp(400, *LakhMIDI.clock(found)) for found in (score.tempos, [(0, 100), (16, 102.9)])]
    assert abs(ends[0] - ends[1]) < 0.5 and len(written) < 5


def chunks(data):
    """[(tag, body)] of a MIDI file."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at + 4:at + 8], "big")
        found.append((data[at:at + 4], data[at + 8:at + 8 + size]))
        at += 8 + size
    return found


def joined(parts):
    return b"".join(tag + len(body).to_bytes(4, "big") + body for tag, body in parts)


def test_what_other_readers_lose_is_read():
    data = midi_file([(0, False, scale())])
    (_, head), first, second = chunks(data)
    expected, n = read_score(data).notes, len(scale())
    body = second[1]
    at = body.index(b"\x90") - 1  # the delta before the first note
    program = b"\0\xc0\x28\0\xff\x2f\0"
    cases = {"cut": data[:-1], "header": joined([(b"MThd", head + b"1234"), first, second]),
             "alien": joined([(b"MThd", head), (b"JUNK", b"abc"), first, second]),
             "damaged": joined([(b"MThd", head), first, second, (b"MTrk", b"\0\xff\5\4la l\0p\1\2")]),
             "sysex": joined([(b"MThd", head), first, (b"MTrk", body[:at] + b"\0\xf7\3abc" + body[at:])]),
             "program": joined([(b"MThd", head), (b"MTrk", program), second])}
    for name, case in cases.items():
        score = read_score(case)
        assert note_f1(expected, score.notes, 0) > (.96 if name == "cut" else .999), name
        assert score.voices == [(0, False)], name
    moved = joined([(b"MThd", head), (b"MTrk", program), (b"MTrk", body[at:])])
    assert read_score(moved).voices == [(40, False)] and len(read_score(moved).notes.pitch) == n


def test_a_note_ends_where_its_key_is_struck_again_and_lasts_a_beat_without_an_end():
    def ends(*events):
        track = mido.MidiTrack([mido.Message("note_on", note=60, velocity=80 * on, time=time)
                                for time, on in events])
        midi, file = mido.MidiFile(ticks_per_beat=TICKS, tracks=[track]), io.BytesIO()
        midi.save(file=file)
        notes = read_score(file.getvalue()).notes
        return list(zip((notes.onset * TICKS).tolist(), (notes.duration * TICKS).tolist(), strict=True))
    assert ends((0, 1), (100, 1), (10, 0), (90, 0)) == [(0, 100), (100, 100)]
    assert ends((0, 1), (100, 1), (100, 1)) == [(0, 100), (100, 100), (200, TICKS)]
    assert ends((0, 1), (100, 0), (50, 0), (50, 1), (30, 0)) == [(0, 100), (200, 30)]


def test_long_silence_is_short_and_a_hung_note_costs_nothing():
    text = midi_to_abc(midi_file([(0, False, scale(8) + scale(8, 2000)), (0, False, scale(8))]), Cfg())
    assert "[V:1]Z498|[V:2]Z498|" in text and len(music(text)) == 5
    assert read_abc(text).n_bars == 502 and read_abc(text).faults == []
    assert len(midi_to_abc(midi_file([(0, False, [*scale(), (0, 9_000, 40)])]), Cfg())) < 400


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
        read_score(abc_to_midi(garbage))
        complete_lines(shorten_lines(garbage))
    for garbage in ["X:1\nK:C\n" + "C99999999" * 50, "[V:1]Z9999|c|" * 30, "M:9999/1\n(9:9999:9999c",
                    "L:1/99999\nK:C\n^^^c,,,,,,,,,,,,|", "Q:1/4=999999999999\nK:C\nc|",
                    "Z9999|\n" * 99 + "c|", "[V:1\nc|",
                    "L:0/0\nM:0/0\nQ:0/0=0\nK:H\nc/0", "K:C\n[V:1]" + "[" * 5000]:
        read_score(abc_to_midi(garbage))


GOOD = "X:1\nL:1/4\nM:4/4\nK:C\nV:1\nV:2\n[V:1]cdef|[V:2]Z|\n[V:1]c4-|[V:2]G4|\n[V:1]c4|[V:2]Z|\n"


@pytest.mark.parametrize("wrong, reason", [
    ("cde|", "bar_length"), ("cdefg|", "bar_length"), ("cdef", "no_bar_line"), ("c3[df|", "open_bracket"),
    ("cdef-|", "open_tie"), ("cd(3ef|", "open_tuplet"), ("c?def|", "bad_char"), ("Z2|", "silent_bars"),
    ("[M:3/4]cde|", "metre"), ("[M:3/9]cdef|", "bad_field"), ("[cdef|", "open_bracket"),
    ("c4&z3|", "bar_length")])
def test_faults_are_named_with_bar_and_voice(wrong, reason):
    assert read_abc(GOOD).faults == []
    faults = read_abc(GOOD.replace("cdef|", wrong)).faults
    assert (7, 0, reason) in {(fault.line, fault.bar, fault.reason) for fault in faults}
    faults = read_abc(GOOD.replace("G4|", "G3|")).faults
    assert faults == [(8, 1, "2", "bar_length")]


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
    (make_midi(1).replace(b"\x90", b"\xf4", 1), "bad_bytes"),
    (make_midi(2, bars=0), "no_notes"), (midi_file([(0, False, [(0, 1, 60)])]), "too_few_notes"),
    (midi_file([(0, False, [(i * 30_000, 1, 60) for i in range(9)])]), "too_long"),
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
        assert read_abc(row["abc"]).faults == []  # bars add up, whatever the file was
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
    journal = cfg.ABC_ROOT / "journal.jsonl"
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
