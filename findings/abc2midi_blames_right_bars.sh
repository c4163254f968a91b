#!/usr/bin/env bash
# abc2midi 5.02 complains of bars that are right.
# Expected: no warning for music that adds up.
# Happens: a triplet of unlike notes (3c2de is called an error of notation though it is played right; a
#     fermata doubles its note and so makes its own bar too long; a repeated part whose metre changes is
#     measured against its last metre.
# Source: seen in the program; the ABC standard 2.1, section 4.13, has tuplets of unlike notes.
# For a user: a judge that counts each complaint as an error rejects real music. Ours counts a complaint
#     unless our reader has measured that bar as right.
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
    "triplet of unlike notes": "(3c2de c2c4|c8|c8|",
    "fermata": "c8|Hc4 d4|c8|",
    "repeat with a change of metre": "|:c8|[M:3/4]d6:|",
}
print(abc2midi("X:1\nL:1/8\nK:C\nC\n")[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
for name, music in CASES.items():
    said, rows = abc2midi(f"X:1\nM:4/4\nL:1/8\nK:C\n{music}\n")
    complaints = [line for line in said.splitlines() if "Warning" in line or "Error" in line]
    print(f"{name} ({music}): {len(complaints)} complaints")
    print("   ", complaints[0] if complaints else "silence")
    print("    notes (onset, pitch, length):", [row[:3] for row in rows])
    assert complaints, "no longer blamed"
    if name == "fermata":
        assert (4, 72, 4) in [row[:3] for row in rows], "the fermata no longer doubles the note"
PY
