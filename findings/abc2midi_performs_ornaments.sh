#!/usr/bin/env bash
# abc2midi 5.02 performs signs that a score only shows: the notes of its MIDI file are not those of the text.
# Expected of a converter: .C4 is a half note, TD4 is a half note, HC4 is a half note, with L:1/8.
# Happens: a staccato dot halves the note, a trill becomes sixteen notes of 1/8 quarter, a fermata makes the
#     note twice as long and so shifts its voice against the others, a chord name adds an accompaniment of
#     five notes.
# Source: the documentation of abcMIDI describes that it plays them; -NGUI and -NGRA leave out accompaniment
#     and grace notes.
# For a user: 9 % of the tunes that music21 brings have dots, 5 % trills, 3 % chord names, 1 % fermatas. They
#     are taken out of the text before the program sees it.
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


HEADER = "X:1\nM:4/4\nL:1/8\nK:C\n"
print(abc2midi(HEADER + "C8|\n")[0].splitlines()[0], "(inside symusic", version("symusic") + ")")
found = {}
CASES = {"plain": "C4D4|", "staccato": ".C4D4|", "trill": "TC4D4|", "fermata": "HC4D4|",
         "chord name": '"G7"C4D4|'}
for name, music in CASES.items():
    rows = abc2midi(HEADER + music + "\n")[1]
    found[name] = len(rows), rows[0][2], max(row[0] for row in rows if row[1] == 62)
    print(f"{name} ({music}): (notes, length of the first, onset of D) {found[name]}")
assert found["plain"] == (2, 2, 2) and found["staccato"] == (2, 1, 2) and found["fermata"] == (2, 4, 4)
assert found["trill"][0] == 17 and found["chord name"][0] > 2
PY
