#!/usr/bin/env bash
# abc2midi 5.02 can't read a note of a third: C/3 becomes a fifth of its length, and the program still ends
#     well.
# Expected: C/3 D/3 E/3 with L:1/4 fill a quarter, as in abcjs 6.7.2, lytk 0.6.4 and music21 10.5.1.
# Happens: abc2midi says "3 b is not a power of 2", gives each note some .07 quarters, writes the file, and
#     its exit status is 0. verovio 6.4.1 says the same and gives each note a whole quarter.
# Source: seen in the programs.
# For a user: music converted by writing fractions is right in the browser and wrong in MIDI. Our converter
#     writes powers of two below the line only, and triplets by (3.
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


TEXT = "X:1\nM:4/4\nL:1/4\nK:C\nC/3 D/3 E/3 F3|\n"
said, rows = abc2midi(TEXT)
print(said.splitlines()[0], "(inside symusic", version("symusic") + "),", ABCJS + ",",
      ", ".join(f"{name} {version(name)}" for name in ("lytk", "music21")))
status = subprocess.run(["./abc2midi", "tune.abc", "-o", "tune.mid"], capture_output=True).returncode
found = {"abc2midi": rows, "abcjs": abcjs(TEXT), "lytk": lytk_notes(TEXT), "music21": music21_notes(TEXT)}
onsets = {name: [round(row[0], 2) for row in each] for name, each in found.items()}
print("onsets of C/3 D/3 E/3 F3:", onsets, "\nabc2midi says:", said.splitlines()[2:3], "exit status", status)
assert onsets["abcjs"] == onsets["lytk"] == onsets["music21"] == [0, .33, .67, 1]
assert onsets["abc2midi"][3] < .25 and "not a power of 2" in said and status == 0
PY
