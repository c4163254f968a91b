#!/usr/bin/env bash
# A program change in another track than its notes is lost by symusic 0.6.0, pretty_midi 0.2.11 and
#     miditoolkit 1.0.1.
# Expected: a program change holds for its MIDI channel, whichever track it stands in; that is how
#     midirenderer 0.1.3, a synthesizer, plays the file, and every sequencer.
# Happens: all three readers say program 0 (piano). Controllers (the pedal, volume) of a track without notes
#     are gone too.
# Source: seen in the programs; the MIDI standard has programs by channel, tracks are but a way to store them.
# For a user: in 2.5 % of web files some instrument becomes a piano. Our own reader takes programs by channel,
#     over all tracks.
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
from importlib.metadata import version
from pathlib import Path

import midirenderer
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


def readings(file):
    """The program of the only instrument, by each reader."""
    return {"symusic": symusic.Score.from_midi(file).tracks[0].program,
            "pretty_midi": int(pretty_midi.PrettyMIDI(io.BytesIO(file)).instruments[0].program),
            "miditoolkit": int(miditoolkit.MidiFile(file=io.BytesIO(file)).instruments[0].program)}


soundfont = (Path(pretty_midi.__file__).parent / "TimGM6mb.sf2").read_bytes()
organ = [mido.Message("program_change", program=16), mido.Message("control_change", control=64, value=127)]
files = {"same track": save(organ + note(60, 960)), "another track": save(organ, note(60, 960)),
         "none": save(note(60, 960))}
print(", ".join(f"{name} {version(name)}" for name in ("symusic", "pretty_midi", "miditoolkit", "midirenderer")))
programs, sounds = {}, {}
for name, file in files.items():
    programs[name] = readings(file)
    sounds[name] = bytes(midirenderer.render_wave_from(soundfont, file))
    pedal = [len(track.controls) for track in symusic.Score.from_midi(file).tracks]
    print(f"program 16 in {name}: programs read {programs[name]}, controllers in symusic {pedal}")
alike = sounds["another track"] == sounds["same track"], sounds["another track"] == sounds["none"]
print("sound of another track equals that of the same track, of none:", alike)
assert set(programs["same track"].values()) == {16} and set(programs["another track"].values()) == {0}
assert alike == (True, False)
PY
