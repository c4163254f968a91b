#!/usr/bin/env bash
# Three writers put the sixteenth part of a score on channel 1, with its own program.
# Expected: parts beyond the 15 channels are refused, or share a channel with a part of the same program.
# Happens: symusic 0.6.0, pretty_midi 0.2.11 and miditoolkit 1.0.1 begin again at channel 1: part 16 sets its
#     program there at time 0, and in a synthesizer part 1 plays with it as well. Read back by the same
#     library the file looks right, since each track has its program.
# Source: seen in the programs; MIDI has 16 channels, one of which is for drums.
# For a user: a large score loses its first instrument, in silence (9 of 796 web files). We write MIDI
#     ourselves: parts of one program share a channel.
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
from importlib.metadata import version

import miditoolkit
import mido
import pretty_midi
import symusic

score, pretty, toolkit = symusic.Score(480), pretty_midi.PrettyMIDI(), miditoolkit.MidiFile()
for i in range(16):
    score.tracks.append(symusic.Track(program=i))
    score.tracks[-1].notes.append(symusic.Note(0, 480, 60 + i, 80))
    pretty.instruments.append(pretty_midi.Instrument(i))
    pretty.instruments[-1].notes.append(pretty_midi.Note(80, 60 + i, 0, 1))
    toolkit.instruments.append(miditoolkit.Instrument(i))
    toolkit.instruments[-1].notes.append(miditoolkit.Note(80, 60 + i, 0, 480))
score.dump_midi("symusic.mid")
pretty.write("pretty_midi.mid")
toolkit.dump("miditoolkit.mid")

print("mido", version("mido"))
for name in ("symusic", "pretty_midi", "miditoolkit"):
    events = [event for track in mido.MidiFile(f"{name}.mid").tracks for event in track if not event.is_meta]
    on_channel_1 = [event.program for event in events if event.type == "program_change" and event.channel == 0]
    pitches = sorted({event.note for event in events if event.type == "note_on" and event.channel == 0})
    print(f"{name} {version(name)}: programs set on channel 1 {on_channel_1}, pitches there {pitches}")
    assert on_channel_1 == [0, 15] and pitches == [60, 75]
read_back = [track.program for track in symusic.Score("symusic.mid").tracks]
print("symusic reads its own file back as programs", read_back)
assert read_back == list(range(16))
PY
