#!/usr/bin/env bash
# A change of metre holds only for the voice in which it stands: abc2midi 5.02, abcjs 6.7.2 and lytk 0.6.4
#     agree.
# Expected by whoever thinks of a score: [M:3/4] in the first voice changes the bars of all voices.
# Happens: voice 2, silent with Z| in that bar, rests for a bar of the old metre and is a quarter late from
#     there on, in all three programs. With [M:3/4] in voice 2 as well (and z3 for Z, because of abcjs) it is
#     right.
# Source: the ABC standard 2.1 leaves the scope of fields in music of several voices open (section 7).
# For a user: writing the metre once lets the other voices drift through the rest of the piece. In our texts
#     every voice writes a change of [M:] itself.
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


START = "X:1\nM:4/4\nL:1/4\nK:C\nV:1\nV:2\n[V:1]CDEF|\n[V:2]cdef|\n"
TEXTS = {
    "[M:] in voice 1 only": START + "[V:1][M:3/4]CDE|\n[V:2]Z|\n[V:1]CDE|\n[V:2]cde|\n",
    "[M:] in both voices": START + "[V:1][M:3/4]CDE|\n[V:2][M:3/4]z3|\n[V:1]CDE|\n[V:2]cde|\n",
}
print(abc2midi(START)[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
print("lytk", version("lytk"), "and", ABCJS + "; onset of voice 2's second entry, which is 7 in a score")
entries = {}
for name, text in TEXTS.items():
    entries[name] = [sorted(row[0] for row in rows if row[1] >= 72)[4]
                     for rows in (abc2midi(text)[1], lytk_notes(text), abcjs(text))]
    print(name, dict(zip(("abc2midi", "lytk", "abcjs"), entries[name])))
assert entries == {"[M:] in voice 1 only": [8, 8, 8], "[M:] in both voices": [7, 7, 7]}
PY
