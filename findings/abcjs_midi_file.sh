#!/usr/bin/env bash
# abcjs 6.7.2 writes another piece into its MIDI file than it plays in the page.
# Expected: getMidiFile gives the instruments and the tempo of the sound in the browser.
# Happens: every program change goes to channel 1, while the notes have channels of their own, so all but one
#     instrument is lost; and in 2/2 the quarter notes of Q:1/4=120 last a second instead of a half.
# Source: seen in the program; the sequence that the page plays (setUpAudio) is right in both.
# For a user: do not judge a text, nor share music, by the MIDI file that the page offers. Our measure of what
#     a browser plays is taken from the sequence.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check mido==1.3.3
[ -d "$packages/node_modules/abcjs" ] ||
    npm install --silent --no-audit --no-fund --prefix "$packages" abcjs@6.7.2
cd "$work"
PACKAGES=$packages "$packages/venv/bin/python" - <<'PY'
import base64
import io
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import mido

PACKAGES = os.environ["PACKAGES"]

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


FILE = """
const abcjs = require("abcjs"), text = require("fs").readFileSync(0, "utf8");
const [file] = [abcjs.synth.getMidiFile(text, {midiOutputType: "binary"})].flat();
process.stdout.write(Buffer.from(file).toString("base64"));
"""


def midi_file(text):
    run = subprocess.run(["node", "-e", FILE], input=text, capture_output=True, text=True, check=True,
                         cwd=PACKAGES)
    return mido.MidiFile(file=io.BytesIO(base64.b64decode(run.stdout)))


TEXT = """X:1
M:METRE
L:1/4
Q:1/4=120
K:C
V:1
%%MIDI program 40
V:2
%%MIDI program 70
[V:1]CDEF|
[V:2]cdef|
"""
print(ABCJS + ", mido", version("mido"))
events = [event for track in midi_file(TEXT.replace("METRE", "4/4")).tracks for event in track
          if not event.is_meta]
programs = [(event.channel + 1, event.program) for event in events if event.type == "program_change"]
channels = sorted({event.channel + 1 for event in events if event.type == "note_on"})
print("programs in the file as (channel, program):", programs, "channels with notes:", channels)
print("programs in the sequence:", sorted({row[3] for row in abcjs(TEXT.replace("METRE", "4/4"))}))
seconds = {metre: round(midi_file(TEXT.replace("METRE", metre)).length, 2) for metre in ("4/4", "2/2")}
print("seconds of four quarter notes at Q:1/4=120:", seconds)
assert programs == [(1, 40), (1, 70)] and channels == [1, 2] and seconds == {"4/4": 2.0, "2/2": 4.0}
PY
