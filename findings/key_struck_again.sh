#!/usr/bin/env bash
# A key that is struck again while it sounds: two notes of which length? Three readers and a synthesizer
#     disagree.
# Expected: one answer to on at 0, on at 240, off at 480, off at 960 ticks, all of one key and channel.
# Happens: symusic 0.6.0 and miditoolkit 1.0.1 let the first off end the first note: 0-480 and 240-960. In
#     pretty_midi 0.2.11 the first off ends both: 0-480 and 240-480. midirenderer 0.1.3 is silent after 480,
#     as pretty_midi says.
# Source: seen in the programs; the MIDI standard leaves it open.
# For a user: 56 % of web files have such notes. A score that is right by one reader is wrong by another, and
#     "equal notes" do not sound equal. We have one rule for reading, score, text and sound.
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


def event(kind, time):
    return mido.Message(kind, note=60, velocity=100 if kind == "note_on" else 0, time=time)


struck_again = save([mido.Message("program_change", program=16), event("note_on", 0), event("note_on", 240),
                     event("note_off", 240), event("note_off", 480),
                     mido.MetaMessage("marker", text="end", time=480)])
print(", ".join(f"{name} {version(name)}" for name in ("symusic", "pretty_midi", "miditoolkit", "midirenderer")))
pretty = pretty_midi.PrettyMIDI(io.BytesIO(struck_again))
toolkit = miditoolkit.MidiFile(file=io.BytesIO(struck_again))
found = {
    "symusic": [(n.start, n.end) for n in symusic.Score.from_midi(struck_again).tracks[0].notes],
    "miditoolkit": [(n.start, n.end) for n in toolkit.instruments[0].notes],
    "pretty_midi": [(int(pretty.time_to_tick(n.start)), int(pretty.time_to_tick(n.end)))
                    for n in pretty.instruments[0].notes],
}
print("(start, end) in ticks:", found)
assert found["symusic"] == found["miditoolkit"] == [(0, 480), (240, 960)]
assert found["pretty_midi"] == [(0, 480), (240, 480)]

soundfont = (Path(pretty_midi.__file__).parent / "TimGM6mb.sf2").read_bytes()
with wave.open(io.BytesIO(bytes(midirenderer.render_wave_from(soundfont, struck_again)))) as sound:
    rate = sound.getframerate()
    samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).reshape(-1, 2)
level = [round(float(samples[int(at * rate):int((at + .1) * rate)].std())) for at in (.3, .85)]
print("loudness of an organ at .3 s (both keys down) and at .85 s (before the second off):", level)
assert level[1] < .05 * level[0], "the synthesizer now lets the second note sound on"
PY
