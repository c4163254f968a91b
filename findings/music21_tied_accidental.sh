#!/usr/bin/env bash
# music21 10.5.1 ties an F sharp to an F.
# Expected: in ^F4-|F4| the sharp lasts as long as the tie, over the bar line; abc2midi 5.02, lytk 0.6.4 and
#     abcjs 6.7.2 play one F sharp of eight quarters.
# Happens: music21 reads an F sharp with the start of a tie and an F with its end: two notes of unlike pitch,
#     tied.
# Source: cuthbertLab/music21 issue 386 names it as what remains to be done (2019).
# For a user: notes that were never played, in any corpus that is read from ABC by music21. We use neither its
#     reader as a judge nor for the folk books that it brings; these go through abc2midi.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    symusic==0.6.0 numpy==2.4.6 mido==1.3.3 lytk==0.6.4 music21==10.5.1
[ -d "$packages/node_modules/abcjs" ] ||
    npm install --silent --no-audit --no-fund --prefix "$packages" abcjs@6.7.2
cd "$work"
PACKAGES=$packages "$packages/venv/bin/python" - <<'PY'
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import lytk
import mido
import music21
import symusic

PACKAGES = os.environ["PACKAGES"]


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


ABCJS = "abcjs " + json.loads(Path(PACKAGES, "node_modules/abcjs/package.json").read_text())["version"]
PLAY = """
const abcjs = require("abcjs"), text = require("fs").readFileSync(0, "utf8");
const tracks = abcjs.parseOnly(text)[0].setUpAudio({chordsOff: true}).tracks;
console.log(JSON.stringify(tracks.flatMap(track => track.filter(event => event.cmd == "note"))));
"""


def abcjs(text):
    """The notes that abcjs hands to its synthesizer as (onset, pitch, length, program)."""
    run = subprocess.run(["node", "-e", PLAY], input=text, capture_output=True, text=True, check=True,
                         cwd=PACKAGES)
    return sorted((round(4 * event["start"], 2), event["pitch"], round(4 * event["duration"], 2),
                   event.get("instrument", 0)) for event in json.loads(run.stdout))


TEXT = "X:1\nM:4/4\nL:1/4\nK:C\n^F4-|F4|F4|\n"
print(abc2midi(TEXT)[0].splitlines()[0], "(inside symusic", version("symusic") + "),", ABCJS + ",",
      ", ".join(f"{name} {version(name)}" for name in ("lytk", "music21")))
found = {"abc2midi": abc2midi(TEXT)[1], "abcjs": abcjs(TEXT), "lytk": lytk_notes(TEXT),
         "music21": music21_notes(TEXT)}
found = {name: [row[:3] for row in rows] for name, rows in found.items()}
print("(onset, pitch, length) of ^F4-|F4|F4|", *(f"    {name}: {rows}" for name, rows in found.items()), sep="\n")
score = music21.converter.parse(TEXT, format="abc")
ties = [(note.nameWithOctave, note.tie and note.tie.type) for note in score.parts[0].flatten().notes]
print("    ties in music21:", ties)
assert found["abc2midi"] == found["lytk"] == found["abcjs"] == [(0, 66, 8), (8, 65, 4)]
assert ties == [("F#4", "start"), ("F4", "stop"), ("F4", None)]
PY
