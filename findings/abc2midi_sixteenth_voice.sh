#!/usr/bin/env bash
# abc2midi 5.02 puts the sixteenth voice on channel 1, and drops the seventeenth.
# Expected: more voices than channels are refused, or share a channel with a voice of the same instrument.
# Happens: with a program for each voice, voice 16 shares channel 1 and sets its program there, so voice 1
#     changes its instrument too; the notes of voice 17 are missing. The exit status is 0; only the standard
#     output says "Channel limit exceeded".
# Source: seen in the program; MIDI has 16 channels, of which 10 is for drums.
# For a user: a text of an orchestra loses a voice without a failure. In our texts voices of one program share
#     a channel where there are more than 15 voices and layers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check symusic==0.6.0 numpy==2.4.6 mido==1.3.3
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import subprocess
from importlib.metadata import version
from pathlib import Path

import mido
import symusic


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


text = "X:1\nM:4/4\nL:1/4\nK:C\n" + "".join(f"V:{i}\n%%MIDI program {i}\nC4|\n" for i in range(1, 18))
said, rows = abc2midi(text)
print(said.splitlines()[0], "(inside symusic", version("symusic") + ")")
status = subprocess.run(["./abc2midi", "tune.abc", "-o", "tune.mid"], capture_output=True).returncode
channels = [row[3] for row in rows]
programs = [(event.channel + 1, event.program) for track in mido.MidiFile("tune.mid").tracks
            for event in track if event.type == "program_change"]
print("17 voices of one note each; notes in the file:", len(rows), "exit status:", status)
print("notes on channel 1:", channels.count(1), "programs set on channel 1:", [p for c, p in programs if c == 1])
print([line for line in said.splitlines() if "rror" in line])
assert len(rows) == 16 and status == 0
assert channels.count(1) == 2 and [p for c, p in programs if c == 1] == [1, 16]
PY
