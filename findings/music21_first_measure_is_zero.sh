#!/usr/bin/env bash
# music21 10.5.1 numbers the first bar of an ABC tune 0, whether or not it is a pick-up.
# Expected: measure 0 means a pick-up, measure 1 a whole first bar.
# Happens: "C4|D4|E4|" in 4/4 has measures 0, 1, 2 like "C|D4|E4|"; only paddingLeft tells them apart.
# Source: seen in the program; of the 12,978 tunes of the books in its corpus, 97.9 % have a measure 0, while
#     68 % begin with a short bar.
# For a user: "has a measure 0" is no test for a pick-up, and bar numbers are one too small. Our pick-ups are
#     measured: the length of the first bar.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check music21==10.5.1
cd "$work"
"$packages/venv/bin/python" - <<'PY'
from importlib.metadata import version

import music21

HEADER = "X:1\nM:4/4\nL:1/4\nK:C\n"
print("music21", version("music21"))
numbers, padding = [], []
for music in ("C4|D4|E4|", "C|D4|E4|", "z3C|D4|E4|"):
    score = music21.converter.parse(HEADER + music + "\n", format="abc")
    measures = list(score.parts[0].getElementsByClass("Measure"))
    numbers.append([measure.number for measure in measures])
    padding.append(float(measures[0].paddingLeft))
    print(f"{music} measures {numbers[-1]}, paddingLeft of the first {padding[-1]}")
assert numbers == [[0, 1, 2]] * 3 and padding == [0, 3, 0]
PY
