#!/usr/bin/env bash
# music21 10.5.1 plays layers (&) one after the other, and gives rests of several bars (Z2) no time.
# Expected: C4&E4 sounds together, and after Z2| in 4/4 the next note starts at 8, as in abc2midi 5.02, abcjs
#     6.7.2 and lytk 0.6.4.
# Happens: E begins when C ends, so all that follows is a bar late; the note behind Z2| starts at 0.
# Source: seen in the program; sections 7.4 and 4.5 of the ABC standard 2.1. verovio 6.4.1 reads layers in the
#     same way.
# For a user: ABC with polyphony or silent bars falls apart without a warning. music21 is no judge of ours.
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


HEADER = "X:1\nM:4/4\nL:1/4\nK:C\n"
print(abc2midi(HEADER + "C4|\n")[0].splitlines()[0], "(inside symusic", version("symusic") + "),", ABCJS + ",",
      ", ".join(f"{name} {version(name)}" for name in ("lytk", "music21")))
found = {}
for music in ("C4&E4|G4|", "Z2|G4|"):
    text = HEADER + music + "\n"
    rows = abc2midi(text)[1], abcjs(text), lytk_notes(text), music21_notes(text)
    found[music] = [[row[:2] for row in each] for each in rows]
    print(music, "(onset, pitch)")
    for who, each in zip(("abc2midi", "abcjs", "lytk", "music21"), found[music]):
        print(f"    {who}: {each}")
assert found["C4&E4|G4|"] == [[(0, 60), (0, 64), (4, 67)]] * 3 + [[(0, 60), (4, 64), (8, 67)]]
assert found["Z2|G4|"] == [[(8, 67)]] * 3 + [[(0, 67)]]
PY
