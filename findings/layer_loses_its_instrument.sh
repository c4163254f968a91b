#!/usr/bin/env bash
# A second layer (&) of a voice loses the voice's instrument: to a piano in abc2midi 5.02 and in abcjs 6.7.2.
# Expected: both layers of C4&E4 under %%MIDI program 40 are violins, both layers of a drum voice are drums.
# Happens: abc2midi gives the second layer a channel on which no program was set; drums stay drums. With
#     %%MIDI channel 3 beside the program both layers are violins. abcjs sets program 0 for the second layer
#     in each case, so that drums become low piano notes as well.
# Source: seen in the programs; layers are section 7.4 of the ABC standard 2.1.
# For a user: in four of ten web files some notes turned into piano. Our texts give a voice a channel where it
#     has layers and a program (.6 % more characters), and drums have one layer.
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


def heard_in_abc2midi(text):
    """Which instrument plays which pitch: a program, or "drums"."""
    channels = {row[1]: row[3] for row in abc2midi(text)[1]}
    programs = {event.channel + 1: event.program for track in mido.MidiFile("tune.mid").tracks
                for event in track if event.type == "program_change"}
    return {pitch: "drums" if channel == 10 else programs.get(channel, 0) for pitch, channel in channels.items()}


def heard_in_abcjs(text):
    return {row[1]: "drums" if row[3] == 128 else row[3] for row in abcjs(text)}


HEADER = "X:1\nM:4/4\nL:1/4\nK:C\nV:1\n"
VOICES = {
    "program": "%%MIDI program 40\n",
    "program and channel": "%%MIDI channel 3\n%%MIDI program 40\n",
    "drums": "%%MIDI channel 10\n",
}
print(abc2midi(HEADER + "C4|\n")[0].splitlines()[0], "(inside symusic", version("symusic") + "),", ABCJS)
found = {}
for name, lines in VOICES.items():
    text = HEADER + lines + "[V:1]C4&E4|\n"
    found[name] = heard_in_abc2midi(text), heard_in_abcjs(text)
    print(f"{name}: (pitch: instrument) abc2midi {found[name][0]}, abcjs {found[name][1]}")
assert found == {
    "program": ({60: 40, 64: 0}, {60: 40, 64: 0}),
    "program and channel": ({60: 40, 64: 40}, {60: 40, 64: 0}),
    "drums": ({60: "drums", 64: "drums"}, {60: "drums", 64: 0}),
}
PY
