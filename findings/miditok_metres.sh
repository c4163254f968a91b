#!/usr/bin/env bash
# miditok 3.1.0 turns 9/8, 7/8 and 2/2 into 4/4 without a word.
# Expected: a metre that the vocabulary lacks is refused, or a warning says so.
# Happens: with use_time_signatures=True the tokens of such files say TimeSig_4/4 and decode as 4/4; 3/4, 6/8
#     and 12/8 are kept. No warning is given.
# Source: seen in the program; the list of metres is time_signature_range of the configuration.
# For a user: slip jigs are cut into bars that they do not have, and any figure per bar is wrong. Our corpus
#     has 9/8, so a comparison with REMI needs a list of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check miditok==3.1.0 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import miditok
import symusic
import symusic

print("miditok", version("miditok"))
found = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for metre in ((3, 4), (6, 8), (12, 8), (9, 8), (7, 8), (2, 2)):
        score = symusic.Score(480)
        score.time_signatures.append(symusic.TimeSignature(0, *metre))
        score.tracks.append(symusic.Track())
        for i in range(12):
            score.tracks[0].notes.append(symusic.Note(i * 240, 240, 60 + i, 80))
        tokenizer = miditok.REMI(miditok.TokenizerConfig(use_time_signatures=True))
        back = tokenizer.decode(tokenizer(score))
        found["%d/%d" % metre] = ["%d/%d" % (sign.numerator, sign.denominator) for sign in back.time_signatures]
print("metre in the file and after a round trip:", found)
print("warnings:", [str(warning.message) for warning in caught if "ime sig" in str(warning.message)])
assert found == {"3/4": ["3/4"], "6/8": ["6/8"], "12/8": ["12/8"], "9/8": ["4/4"], "7/8": ["4/4"], "2/2": ["4/4"]}
PY
