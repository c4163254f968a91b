#!/usr/bin/env bash
# abcjs 6.7.2 plays a second layer (&) late by half a quarter for each triplet of eighths that came before it.
# Expected: both layers of a bar begin with the bar, as in abc2midi 5.02 and lytk 0.6.4.
# Happens: the first layer is right, the second starts .5 late after one triplet and 1.0 late after two.
# Source: seen in the program; layers are section 7.4 of the ABC standard 2.1.
# For a user: of files with triplets and polyphony, most drift apart in a browser. Our converter gives such
#     bars before a layer a second layer of rests.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    symusic==0.6.0 numpy==2.4.6 mido==1.3.3 lytk==0.6.4
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


print(abc2midi("X:1\nL:1/8\nK:C\nC\n")[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
print("lytk", version("lytk"), "and", ABCJS + "; onset of the second layer's only note, which is 4 by the text")
late = []
for bar in ("c8", "(3cde c2 c4", "(3cde (3cde c4"):
    text = f"X:1\nM:4/4\nL:1/8\nK:C\n{bar}|c8&g8|\n"
    onsets = [next(row[0] for row in rows if row[1] == 79)
              for rows in (abc2midi(text)[1], lytk_notes(text), abcjs(text))]
    print(f"{bar}|c8&g8|", dict(zip(("abc2midi", "lytk", "abcjs"), onsets)))
    assert onsets[:2] == [4, 4]
    late.append(onsets[2] - 4)
assert late == [0, .5, 1]
PY
