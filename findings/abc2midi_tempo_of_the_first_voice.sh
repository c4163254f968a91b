#!/usr/bin/env bash
# abc2midi 5.02 takes the tempo from the first voice only, and a [Q:] before [V:1] belongs to the voice of the
#     line above.
# Expected: [Q:1/4=60] at the start of a line changes the tempo of the piece, wherever the line's [V:1]
#     stands.
# Happens: in "[M:3/4][Q:1/4=60][V:1]..." both fields belong to voice 2, whose line ended above: the tempo is
#     dropped, the metre changes in voice 2 only. A [Q:] inside voice 2 is dropped as well. Behind [V:1] it is
#     right.
# Source: seen in the program; the exit status is 0 and nothing is said.
# For a user: seconds that are off by any factor in abc2midi, right elsewhere. Our texts write [Q:] behind
#     [V:1], where the first voice always stands.
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


START = "X:1\nM:4/4\nL:1/4\nQ:1/4=120\nK:C\nV:1\nV:2\n[V:1]CDEF|\n[V:2]cdef|\n"
TEXTS = {
    "[Q:] before [V:1]": START + "[Q:1/4=60][V:1]CDEF|\n[V:2]cdef|\n",
    "[Q:] in voice 2": START + "[V:1]CDEF|\n[V:2][Q:1/4=60]cdef|\n",
    "[Q:] behind [V:1]": START + "[V:1][Q:1/4=60]CDEF|\n[V:2]cdef|\n",
}
print(abc2midi(START)[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
found = {}
for name, text in TEXTS.items():
    said, _ = abc2midi(text)
    tempi = [round(mido.tempo2bpm(event.tempo)) for track in mido.MidiFile("tune.mid").tracks
             for event in track if event.type == "set_tempo"]
    found[name] = tempi
    print(f"{name}: tempi {tempi}", [line for line in said.splitlines() if "Warning" in line or "Error" in line])
assert found == {"[Q:] before [V:1]": [120], "[Q:] in voice 2": [120], "[Q:] behind [V:1]": [120, 60]}
PY
