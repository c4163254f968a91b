#!/usr/bin/env bash
# midirenderer 0.1.3 stops at the last event of the file, in the middle of the sound.
# Expected: the last notes ring out.
# Happens: the sound ends at the last note-off, at a fifth of its loudness: a click. A marker, a controller or
#     an end of track two seconds later lets it ring. It is also quiet: one piano note at velocity 100 peaks
#     at -25 dB.
# Source: seen in the program.
# For a user: every sample ends with a click, and is hard to hear. We put a marker two seconds after the last
#     note and scale the loudest sample to .8.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    midirenderer==0.1.3 pretty_midi==0.2.11.post0 mido==1.3.3 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import io
import wave
from importlib.metadata import version
from pathlib import Path

import midirenderer
import mido
import pretty_midi
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


def render(file):
    with wave.open(io.BytesIO(bytes(midirenderer.render_wave_from(soundfont, file)))) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (48000, 2, 2)
        return np.frombuffer(sound.readframes(sound.getnframes()), np.int16).reshape(-1, 2) / 32768


soundfont = (Path(pretty_midi.__file__).parent / "TimGM6mb.sf2").read_bytes()
print("midirenderer", version("midirenderer") + ", SoundFont of pretty_midi", version("pretty_midi"))
found = {}
for name, more in (("as it is", []), ("end of track later", [mido.MetaMessage("end_of_track", time=1920)])):
    sound = np.abs(render(save(note(60, 960) + more)))
    found[name] = len(sound) / 48000, float(sound.max()), float(sound[-200:].max())
    seconds, peak, last = found[name]
    print(f"{name}: {seconds} s, peak {20 * np.log10(peak):.1f} dB, last samples {last:.4f}")
(seconds, peak, last), (longer, _, rung_out) = found.values()
assert seconds == 1 and peak < .1 and last > .1 * peak
assert longer == 3 and rung_out < .001
PY
