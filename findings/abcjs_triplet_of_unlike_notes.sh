#!/usr/bin/env bash
# abcjs 6.7.2 gives the last note of a triplet of unlike lengths a wrong length.
# Expected: (3c2de is two thirds of its parts: 2/3, 1/3, 1/3 quarter with L:1/8, as abc2midi 5.02 and lytk
#     0.6.4 play it.
# Happens: the third note of (3c2de lasts a whole quarter instead of a third, that of (3cd2e lasts nothing;
#     what follows is early or late. Triplets of three equal notes, and (3::2 (two notes in the time of
#     three), are right.
# Source: seen in the program; the ABC standard 2.1, section 4.13, has a tuplet of unlike notes as an example.
# For a user: swung figures and dotted triplets shift a voice against the others. Our converter writes the
#     longest of three unlike notes as two tied ones, (3::4, which all play alike.
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
print("lytk", version("lytk"), "and", ABCJS + "; (onset, pitch, length)")
alike = {}
for figure in ("(3cde", "(3c2de", "(3cd2e", "(3::2c2d"):
    text = f"X:1\nM:4/4\nL:1/8\nK:C\n{figure} g2 a4|\n"
    found = [[tuple(round(number, 1) for number in row[:3]) for row in rows]
             for rows in (abc2midi(text)[1], lytk_notes(text), abcjs(text))]
    print(figure, *(f"    {who}: {rows}" for who, rows in zip(("abc2midi", "lytk", "abcjs"), found)), sep="\n")
    assert found[0] == found[1]
    alike[figure] = found[0] == found[2]
assert alike == {"(3cde": True, "(3c2de": False, "(3cd2e": False, "(3::2c2d": True}
PY
