#!/usr/bin/env bash
# abcjs 6.7.2 hands a line's music out by place, not by the name of its voice.
# Expected: [V:3] belongs to voice 3, whether or not voice 2 is written in that line.
# Happens: after one line without voice 2, a rest made up for in the next, voice 3 goes on with the instrument
#     of voice 2 and a bar late. Leaving out the last voices is harmless. abc2midi 5.02 goes by name.
# Source: paulrosen/abcjs issue 1085 (2025, open): the author says that each line is expected to have all the
#     voices.
# For a user: a text that leaves out silent voices, which is shorter, sounds wrong in every browser. Our texts
#     have every voice in every line, a silent one as Z.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check symusic==0.6.0 numpy==2.4.6 mido==1.3.3
[ -d "$packages/node_modules/abcjs" ] ||
    npm install --silent --no-audit --no-fund --prefix "$packages" abcjs@6.7.2
cd "$work"
PACKAGES=$packages "$packages/venv/bin/python" - <<'PY'
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

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


HEADER = """X:1
M:4/4
L:1/4
K:C
V:1
%%MIDI program 0
V:2
%%MIDI program 40
V:3
%%MIDI program 70
"""
START = HEADER + "[V:1]CCCC|\n[V:2]EEEE|\n[V:3]GGGG|\n[V:1]CCCC|\n"
left_out = START + "[V:3]GGGG|\n[V:1]CCCC|\n[V:2]Z|EEEE|\n[V:3]GGGG|\n"  # the rest is made up for in line 3
complete = START + "[V:2]Z|\n[V:3]GGGG|\n[V:1]CCCC|\n[V:2]EEEE|\n[V:3]GGGG|\n"

print(abc2midi(complete)[0].splitlines()[0], "(inside symusic", version("symusic") + "),", ABCJS)
heard = {}
for name, text in (("voice 2 left out of line 2", left_out), ("voice 2 rests in line 2", complete)):
    bars = sorted({(onset // 4, pitch) for onset, pitch, *_ in abc2midi(text)[1]})
    heard[name] = sorted({(onset // 4, pitch, program) for onset, pitch, _, program in abcjs(text)})
    print(f"{name}\n    abc2midi (bar, pitch): {bars}\n    abcjs (bar, pitch, program): {heard[name]}")
    assert bars == [(0, 60), (0, 64), (0, 67), (1, 60), (1, 67), (2, 60), (2, 64), (2, 67)]

wrong, right = heard.values()
assert right == [(bar, pitch, program) for bar in range(3)
                 for pitch, program in ((60, 0), (64, 40), (67, 70)) if (bar, pitch) != (1, 64)]
assert wrong != right, "abcjs now goes by the names of voices"
PY
