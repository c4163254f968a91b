#!/usr/bin/env bash
# A note without a note-off disappears in symusic 0.6.0, pretty_midi 0.2.11 and miditoolkit 1.0.1, without a
#     word.
# Expected: the note lasts to the end of the track, as a synthesizer plays it, or is reported.
# Happens: it is not in the score. The same for a note whose note-off stands in another track of the same
#     channel.
# Source: seen in the programs.
# For a user: drum machines that never send a note-off read as silence; 10 % of web files have such notes, and
#     a comparison of two readers can't find them, since both lose them. Our own reader keeps and counts them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    symusic==0.6.0 numpy==2.4.6 mido==1.3.3 pretty_midi==0.2.11.post0 miditoolkit==1.0.1 midirenderer==0.1.3
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import io
import wave
from importlib.metadata import version
from pathlib import Path

import midirenderer
import miditoolkit
import mido
import pretty_midi
import symusic
import numpy as np


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


def pitches(file):
    return {"symusic": [n.pitch for track in symusic.Score.from_midi(file).tracks for n in track.notes],
            "pretty_midi": [n.pitch for part in pretty_midi.PrettyMIDI(io.BytesIO(file)).instruments
                            for n in part.notes],
            "miditoolkit": [n.pitch for part in miditoolkit.MidiFile(file=io.BytesIO(file)).instruments
                            for n in part.notes]}


start, end = mido.Message("note_on", note=72, velocity=100), mido.Message("note_off", note=72, time=960)
files = {"note-off in its track": save(note(60) + [start, end]), "no note-off": save(note(60) + [start]),
         "note-off in another track": save(note(60) + [start], [end])}
print(", ".join(f"{name} {version(name)}" for name in ("symusic", "pretty_midi", "miditoolkit", "midirenderer")))
found = {name: pitches(file) for name, file in files.items()}
for name, rows in found.items():
    print(f"{name}: {rows}")
assert all(rows == [60, 72] for rows in found["note-off in its track"].values())
assert all(rows == [60] for name in list(found)[1:] for rows in found[name].values())

soundfont = (Path(pretty_midi.__file__).parent / "TimGM6mb.sf2").read_bytes()
hung = save(note(60) + [start, mido.MetaMessage("marker", text="end", time=960)])
with wave.open(io.BytesIO(bytes(midirenderer.render_wave_from(soundfont, hung)))) as sound:
    rate, samples = sound.getframerate(), np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
loudness = float(np.abs(samples[-rate // 2:].astype(float)).max())
print("loudest sample of the last quarter second in midirenderer:", loudness)
assert loudness > 100, "the synthesizer no longer plays it"
PY
