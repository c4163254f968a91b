#!/usr/bin/env bash
# miditok 3.1.0's REMI turns drums into piano, although its tokens say that they are drums.
# Expected: PitchDrum_38 is decoded as a drum.
# Happens: encoded as PitchDrum_38 and decoded at once, the note is pitch 38 of a piano; the violin's program
#     is lost as well. With use_programs=True both come back right.
# Source: seen in the program.
# For a user: a REMI baseline that is heard or compared note by note has no drums. A comparison with REMI
#     needs use_programs=True.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check miditok==3.1.0 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'
from importlib.metadata import version

import miditok
import symusic
import symusic

score = symusic.Score(480)
for track, pitch in ((symusic.Track(program=40), 60), (symusic.Track(is_drum=True), 38)):
    track.notes.append(symusic.Note(0, 480, pitch, 80))
    score.tracks.append(track)
print("miditok", version("miditok"))
found = {}
for programs in (False, True):
    tokenizer = miditok.REMI(miditok.TokenizerConfig(use_programs=True)) if programs else miditok.REMI()
    tokens = tokenizer(score)
    back = tokenizer.decode(tokens)
    found[programs] = sorted((track.program, track.is_drum, track.notes[0].pitch) for track in back.tracks)
    if not programs:
        print("tokens of the two tracks:", tokens)
        assert "PitchDrum_38" in str(tokens)
    print(f"use_programs={programs}: (program, drum, pitch) {found[programs]}")
assert found == {False: [(0, False, 38), (0, False, 60)], True: [(0, True, 38), (40, False, 60)]}
PY
