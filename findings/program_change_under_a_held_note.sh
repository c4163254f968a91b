#!/usr/bin/env bash
# A note that is held while the program changes: symusic 0.6.0 gives it the old program, two other readers the
#     new one.
# Expected: one answer. A sounding note keeps its instrument: a program change holds for the notes that start
#     after it.
# Happens: symusic has note 60 in a track of program 0 and the next note in one of program 40; pretty_midi
#     0.2.11 and miditoolkit 1.0.1 look at the program where the note ends and have both in program 40.
# Source: seen in the programs.
# For a user: instruments of the same file differ between two readers, so a comparison of programs depends on
#     the reader. Ours takes the program at the note's start.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    symusic==0.6.0 numpy==2.4.6 mido==1.3.3 pretty_midi==0.2.11.post0 miditoolkit==1.0.1
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import io
from importlib.metadata import version

import miditoolkit
import mido
import pretty_midi
import symusic


def save(*tracks):
    """A MIDI file of 480 ticks a quarter note, as bytes."""
    midi = mido.MidiFile(type=1, ticks_per_beat=480)
    midi.tracks.extend(mido.MidiTrack(track) for track in tracks)
    stream = io.BytesIO()
    midi.save(file=stream)
    return stream.getvalue()


def note(pitch, ticks=480, channel=0):
    return [mido.Message("note_on", note=pitch, velocity=100, channel=channel),
            mido.Message("note_off", note=pitch, channel=channel, time=ticks)]


file = save([mido.Message("note_on", note=60, velocity=100), mido.Message("program_change", program=40, time=240),
             mido.Message("note_off", note=60, time=240)] + note(62))
print(", ".join(f"{name} {version(name)}" for name in ("symusic", "pretty_midi", "miditoolkit")))
found = {
    "symusic": {n.pitch: track.program for track in symusic.Score.from_midi(file).tracks for n in track.notes},
    "pretty_midi": {n.pitch: int(part.program)
                    for part in pretty_midi.PrettyMIDI(io.BytesIO(file)).instruments for n in part.notes},
    "miditoolkit": {n.pitch: int(part.program)
                    for part in miditoolkit.MidiFile(file=io.BytesIO(file)).instruments for n in part.notes},
}
print("pitch: program", found)
assert found == {"symusic": {60: 0, 62: 40}, "pretty_midi": {60: 40, 62: 40}, "miditoolkit": {60: 40, 62: 40}}
PY
