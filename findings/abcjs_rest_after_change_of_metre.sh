#!/usr/bin/env bash
# abcjs 6.7.2 gives a Z right behind [M:] the length of a bar of the old metre.
# Expected: Z rests for one bar of the metre that holds, as abc2midi 5.02 and lytk 0.6.4 have it.
# Happens: [M:3/4]Z| after bars of 4/4 rests four quarters, the voice is late from there on; Z in the next bar
#     is right.
# Source: seen in the program; the ABC standard 2.1, section 4.5, makes Z a bar of the current metre.
# For a user: a voice that is silent where the metre changes comes in too late in every browser. Our texts
#     write a rest of the bar's length (z3) there.
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


START = "X:1\nM:4/4\nL:1/4\nK:C\nV:1\nV:2\n[V:1]CDEF|\n[V:2]Z|\n"
TEXTS = {
    "[M:3/4]Z|": START + "[V:1][M:3/4]CDE|\n[V:2][M:3/4]Z|\n[V:1]CDE|\n[V:2]cde|\n",
    "[M:3/4]z3|": START + "[V:1][M:3/4]CDE|\n[V:2][M:3/4]z3|\n[V:1]CDE|\n[V:2]cde|\n",
}

print(abc2midi(TEXTS["[M:3/4]Z|"])[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
print("lytk", version("lytk"), "and", ABCJS + "; onsets of voice 2, which are 7, 8, 9 by the text")
onsets = {}
for name, text in TEXTS.items():
    onsets[name] = [[row[0] for row in rows if row[1] >= 72]
                    for rows in (abc2midi(text)[1], lytk_notes(text), abcjs(text))]
    print(name, dict(zip(("abc2midi", "lytk", "abcjs"), onsets[name])))
assert onsets["[M:3/4]Z|"] == [[7, 8, 9], [7, 8, 9], [8, 9, 10]] and onsets["[M:3/4]z3|"] == [[7, 8, 9]] * 3
PY
