#!/usr/bin/env bash
# music21 10.5.1 ignores fields in brackets: [K:], [L:] and [V:] change nothing.
# Expected: a field in brackets works like one on a line of its own, as in abc2midi 5.02 and lytk 0.6.4.
# Happens: the notes behind [K:D] stay in C, those behind [L:1/8] keep their old unit, and the lines of two
#     voices that begin with [V:1] and [V:2] are read as one part, one line after the other.
# Source: seen in the program; the ABC standard 2.1, section 3.2, allows these fields inside a line.
# For a user: music of several voices with [V:] before each bar becomes one line, as long as all voices
#     together. We judge and engrave by other programs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    symusic==0.6.0 numpy==2.4.6 mido==1.3.3 lytk==0.6.4 music21==10.5.1
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import subprocess
from importlib.metadata import version
from pathlib import Path

import lytk
import mido
import music21
import symusic


def notes(path):
    """The notes of a MIDI file as (onset, pitch, length, channel); times in quarter notes."""
    found, midi = [], mido.MidiFile(path)
    for track in midi.tracks:
        tick, started = 0, {}
        for event in track:
            tick += event.time
            if event.type == "note_on" and event.velocity:
                started.setdefault((event.channel, event.note), []).append(tick)
            elif event.type in ("note_on", "note_off") and started.get((event.channel, event.note)):
                start = started[event.channel, event.note].pop(0)
                onset, length = start / midi.ticks_per_beat, (tick - start) / midi.ticks_per_beat
                found.append((round(onset, 2), event.note, round(length, 2), event.channel + 1))
    return sorted(found)


program = Path("abc2midi")  # the wheel's copy need not be executable
program.write_bytes((Path(symusic.__file__).parent / "bin/abc2midi").read_bytes())
program.chmod(0o755)


def abc2midi(text):
    """What abc2midi says about a text, and the notes of the file that it writes."""
    Path("tune.abc").write_text(text)
    run = subprocess.run(["./abc2midi", "tune.abc", "-o", "tune.mid"], capture_output=True, text=True)
    return run.stdout, notes("tune.mid")


def lytk_notes(text):
    """The notes that lytk reads in an ABC text, by way of its own MIDI file."""
    Path("lytk.mid").write_bytes(bytes(lytk.to_midi_bytes(lytk.from_abc_string(text))))
    return notes("lytk.mid")


def music21_notes(text):
    """The notes that music21 reads in an ABC text."""
    score = music21.converter.parse(text, format="abc")
    return sorted((round(float(note.offset), 2), pitch.midi, round(float(note.quarterLength), 2), 1)
                  for part in score.parts for note in part.flatten().notes for pitch in note.pitches)


HEADER = "X:1\nM:4/4\nL:1/4\nK:C\n"
TEXTS = {
    "[K:D]": HEADER + "C4|[K:D]C4|\n",
    "[L:1/8]": HEADER + "C4|[L:1/8]C8|\n",
    "[V:1] and [V:2]": HEADER + "V:1\nV:2\n[V:1]C4|\n[V:2]c4|\n[V:1]D4|\n[V:2]d4|\n",
}
print(abc2midi(HEADER + "C4|\n")[0].splitlines()[0], "(inside symusic", version("symusic") + "),",
      ", ".join(f"{name} {version(name)}" for name in ("lytk", "music21")))
found = {}
for name, text in TEXTS.items():
    found[name] = [[row[:3] for row in rows]
                   for rows in (abc2midi(text)[1], lytk_notes(text), music21_notes(text))]
    print(name)
    for who, rows in zip(("abc2midi", "lytk", "music21"), found[name]):
        print(f"    {who}: {rows}")
    assert found[name][0] == found[name][1] != found[name][2]
assert found["[K:D]"][2] == [(0, 60, 4), (4, 60, 4)]
assert [row[0] for row in found["[V:1] and [V:2]"][2]] == [0, 4, 8, 12]
PY
