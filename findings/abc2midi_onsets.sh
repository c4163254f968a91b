#!/usr/bin/env bash
# abc2midi 5.02 starts every note one tick late, and the notes of a chord ten ticks apart.
# Expected: at 480 ticks a quarter note, the notes of [CEG] start together, at a multiple of 480.
# Happens: they start at ticks 1, 11 and 21. With %%MIDI chordattack 0 in the header they start together, at
#     tick 1.
# Source: seen in the program; the directive is in the documentation of abcMIDI.
# For a user: whoever compares abc2midi's MIDI with the text needs a tolerance, and whoever feeds it to a
#     model gets arpeggios. Our texts carry the directive where they have chords; foreign ABC is moved back by
#     the tick.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check symusic==0.6.0 numpy==2.4.6 mido==1.3.3
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import subprocess
from importlib.metadata import version
from pathlib import Path

import mido
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


onsets = {}
for name, line in (("plain", ""), ("with the directive", "%%MIDI chordattack 0\n")):
    said, _ = abc2midi(f"X:1\nM:4/4\nL:1/4\n{line}K:C\n[CEG]4|C4|\n")
    midi = mido.MidiFile("tune.mid")
    onsets[name], tick = [], 0
    for event in midi.tracks[-1]:
        tick += event.time
        if event.type == "note_on" and event.velocity:
            onsets[name].append(tick)
print(said.splitlines()[0], "(inside symusic", version("symusic") + ")")
print("ticks a quarter note:", midi.ticks_per_beat)
print("onsets of [CEG]4|C4| in ticks:", onsets)
assert midi.ticks_per_beat == 480
assert onsets == {"plain": [1, 11, 21, 1921], "with the directive": [1, 1, 1, 1921]}
PY
