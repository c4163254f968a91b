#!/usr/bin/env bash
# lytk 0.6.4 forgets a pick-up: of a bar of 1/4 before bars of 3/4 it keeps the 3/4 only.
# Expected: a MIDI file whose metre is 1/4 for one beat, then 3/4, which is how notation programs write a
#     pick-up, has its bar lines at beats 1, 4, 7, as in music21 10.5.1 and pretty_midi.
# Happens: in its ABC and in its Humdrum the metre is 3/4 from the start and bar lines stand at 3 and 6: each
#     bar is shifted.
# Source: seen in the program. A change of metre after a whole bar is kept.
# For a user: a correct waltz becomes an offbeat one. Folk tunes come to our converter with a rest that fills
#     the first bar, which lytk keeps.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check \
    lytk==0.6.4 mido==1.3.3 music21==10.5.1 numpy==2.4.6 pretty_midi==0.2.11.post0
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import io
import re
from importlib.metadata import version

import lytk
import mido
import music21
import pretty_midi


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


def metre(numerator, denominator):
    return [mido.MetaMessage("time_signature", numerator=numerator, denominator=denominator)]


two_bars = note(60) + note(62) + note(64) + note(65) + note(67) + note(69)
pickup = save(metre(1, 4) + note(67) + metre(3, 4) + two_bars)
score = lytk.from_midi_bytes(pickup)
abc, humdrum = lytk.to_abc(score), lytk.to_humdrum(score)
print(", ".join(f"{name} {version(name)}" for name in ("lytk", "music21", "pretty_midi")))
print("lytk, ABC:", abc.splitlines())
print("lytk, Humdrum:", humdrum.split("\n"))
stream = music21.converter.parseData(pickup, format="midi")
bars = [float(measure.offset) for measure in stream.parts[0].getElementsByClass("Measure")]
downbeats = (pretty_midi.PrettyMIDI(io.BytesIO(pickup)).get_downbeats() * 2).round(2).tolist()
print("bar lines at beats: music21", bars, "pretty_midi", downbeats)
assert bars[:3] == [0, 1, 4] and downbeats[:3] == [0, 1, 4]
assert "1/4" not in re.findall(r"M:?(\d/\d)", abc + humdrum) and "M:3/4" in abc
notes_before_the_first_bar_line = len(re.findall(r"[A-G]2", abc.split("|")[0]))
assert notes_before_the_first_bar_line == 3
PY
