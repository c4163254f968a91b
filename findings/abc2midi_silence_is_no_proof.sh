#!/usr/bin/env bash
# abc2midi 5.02 says nothing about the first bar, about what follows the last bar line, and about texts
#     without any.
# Expected: a bar that does not add up is reported, wherever it stands.
# Happens: a first bar of 2 quarters or 9, a rest of music after the last bar line, and a tune without bar
#     lines pass in silence; the same short bar is reported in the middle, and before | at the end, but not
#     before |].
# Source: seen in the program. A short first bar may be a pick-up; a long one can't be.
# For a user: "abc2midi does not complain" is weak evidence that a generated tune is right. Our reader
#     measures every bar, abc2midi is asked for the notes.
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


CASES = {
    "short bar in the middle": ("CDEF|CDE|CDEF|", True),
    "short bar at the end": ("CDEF|CDE|", True),
    "short bar before |]": ("CDEF|CDE|]", False),
    "first bar too short": ("CD|CDEF|CDEF|", False),
    "first bar too long": ("CDEFGABcd|CDEF|CDEF|", False),
    "music after the last bar line": ("CDEF|CDEF|CDEFGABcd", False),
    "no bar line at all": ("CDEFGABcdefgabc'd'e'f'", False),
}
print(abc2midi("X:1\nL:1/4\nK:C\nC\n")[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
for name, (music, blamed) in CASES.items():
    said = abc2midi(f"X:1\nM:4/4\nL:1/4\nK:C\n{music}\n")[0]
    complaints = [line for line in said.splitlines() if "Warning" in line or "Error" in line]
    print(f"{name} ({music}):", complaints or "silence")
    assert bool(complaints) == blamed, "this has changed"
PY
