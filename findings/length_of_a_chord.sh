#!/usr/bin/env bash
# A chord whose notes have a length and that has one itself: [C2E2]2 with L:1/4 is two quarters, or four.
# Expected: the lengths are multiplied: the ABC standard 2.1, section 4.17, makes [C2E2G2]3 the same as
#     [CEG]6.
# Happens: abcjs 6.7.2, lytk 0.6.4 and music21 10.5.1 multiply, abc2midi 5.02 and verovio 6.4.1 leave out the
#     outer one; verovio does so even where it is the only one.
# Source: the section named above, and the programs.
# For a user: foreign ABC that uses both comes out too short through abc2midi, without a warning. Our texts
#     put the length behind the bracket only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    symusic==0.6.0 numpy==2.4.6 mido==1.3.3 lytk==0.6.4 music21==10.5.1 verovio==6.4.1
[ -d "$packages/node_modules/abcjs" ] ||
    npm install --silent --no-audit --no-fund --prefix "$packages" abcjs@6.7.2
cd "$work"
PACKAGES=$packages "$packages/venv/bin/python" - <<'PY'
import base64
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import lytk
import mido
import music21
import symusic
import verovio

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


def verovio_notes(text):
    """The notes of the MIDI file that verovio renders of an ABC text."""
    toolkit = verovio.toolkit()
    toolkit.setInputFrom("abc")
    toolkit.loadData(text)
    Path("verovio.mid").write_bytes(base64.b64decode(toolkit.renderToMIDI()))
    return notes("verovio.mid")


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


print(abc2midi("X:1\nL:1/8\nK:C\nC\n")[0].splitlines()[0], "(inside symusic", version("symusic") + "),",
      ABCJS + ",",      ", ".join(f"{name} {version(name)}" for name in ("lytk", "music21", "verovio")))
lengths = {}
for chord in ("[C2E2]2", "[CE]4"):
    text = f"X:1\nM:4/4\nL:1/4\n%%MIDI chordattack 0\nK:C\n{chord}|\n"
    rows = {"abcjs": abcjs(text), "lytk": lytk_notes(text), "music21": music21_notes(text),
            "abc2midi": abc2midi(text)[1], "verovio": verovio_notes(text)}
    lengths[chord] = [round(each[0][2]) for each in rows.values()]
    print(chord, "quarters:", dict(zip(rows, lengths[chord])))
assert lengths == {"[C2E2]2": [4, 4, 4, 2, 2], "[CE]4": [4, 4, 4, 4, 1]}
PY
