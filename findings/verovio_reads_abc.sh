#!/usr/bin/env bash
# verovio 6.4.1 reads ABC, but tuplets of quarters lose their ratio and tied chords their length.
# Expected: (3CDE with L:1/4 fills two quarters; ^F4-|[FA]4| holds for a second bar of four quarters.
# Happens: the three notes last a quarter each; the chord lasts one quarter. A triplet of eighths, which has a
#     beam, is right. Nothing is said.
# Source: seen in the program.
# For a user: an engraved page whose bars do not add up. We engrave by way of MIDI and Humdrum.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check verovio==6.4.1 mido==1.3.3
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import base64
from importlib.metadata import version
from pathlib import Path

import mido
import verovio


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


def verovio_notes(text):
    """The notes of the MIDI file that verovio renders of an ABC text."""
    toolkit = verovio.toolkit()
    toolkit.setInputFrom("abc")
    toolkit.loadData(text)
    Path("verovio.mid").write_bytes(base64.b64decode(toolkit.renderToMIDI()))
    return notes("verovio.mid")


print("verovio", version("verovio"))
CASES = {
    "triplet of quarters": ("1/4", "(3CDE F2|", [0, 1, 2, 3]),
    "triplet of eighths": ("1/8", "(3CDE F2 G4|", [0, .33, .67, 1, 2]),
}
for name, (unit, music, wanted) in CASES.items():
    onsets = [row[0] for row in verovio_notes(f"X:1\nM:4/4\nL:{unit}\nK:C\n{music}\n")]
    print(f"{name} ({music}, L:{unit}): onsets {onsets}")
    assert onsets == wanted
chord = verovio_notes("X:1\nM:4/4\nL:1/4\nK:C\n^F4-|[FA]4|\n")
print("^F4-|[FA]4|, L:1/4: (onset, pitch, length)", [row[:3] for row in chord])
assert [round(row[2]) for row in chord] == [5, 1]
PY
