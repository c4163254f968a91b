#!/usr/bin/env bash
# symusic 0.6.0's resample makes notes of length 0, and readers do not agree on these.
# Expected: a note that is shorter than half a step of the new grid lasts one step, or is reported.
# Happens: its length is 0; symusic and miditoolkit 1.0.1 keep such a note when the file is read again,
#     pretty_midi 0.2.11 drops it. resample(8, min_dur=1) keeps it audible.
# Source: seen in the program; min_dur is 0 if not given.
# For a user: in 89 of 796 web files some notes vanish at 8 steps a quarter. On our grid each note has one
#     step at least.
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


score = symusic.Score.from_midi(save(note(60, 20) + note(62, 940)))
print(", ".join(f"{name} {version(name)}" for name in ("symusic", "pretty_midi", "miditoolkit")))
lengths = {}
for name, options in (("resample(8)", {}), ("resample(8, min_dur=1)", {"min_dur": 1})):
    coarse = score.resample(8, **options)
    file = coarse.dumps_midi()
    lengths[name] = [n.duration for n in coarse.tracks[0].notes]
    kept = {"symusic": len(symusic.Score.from_midi(file).tracks[0].notes),
            "miditoolkit": len(miditoolkit.MidiFile(file=io.BytesIO(file)).instruments[0].notes),
            "pretty_midi": len(pretty_midi.PrettyMIDI(io.BytesIO(file)).instruments[0].notes)}
    print(f"{name}: lengths {lengths[name]}, notes that each reader finds {kept}")
    assert kept == {"symusic": 2, "miditoolkit": 2, "pretty_midi": 2 if options else 1}
assert lengths == {"resample(8)": [0, 16], "resample(8, min_dur=1)": [1, 16]}
PY
