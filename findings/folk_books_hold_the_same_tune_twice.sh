#!/usr/bin/env bash
# The folk books inside music21 10.5.1 hold the same tune several times, under other titles and in other
#     metres.
# Expected: 12,978 tunes are as many pieces, so a random tenth is a fair test set.
# Happens: 109 tunes are letter for letter another one (metre, unit, key and notes; titles and fields left
#     out); 100 texts of notes occur more than once, some of them in other metres or keys. Versions that
#     differ by some notes are more.
# Source: counted in the files that the wheel installs (Essen, O'Neill, Ryan and others).
# For a user: a split by file trains on what it tests. We group near-duplicates before the split: 12,760 tunes
#     are 11,218 works, and 23 % of the held-out characters would have had a version in training.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check music21==10.5.1
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import collections
import re
from importlib.metadata import version
from pathlib import Path

import music21

corpus = Path(music21.__file__).parent / "corpus"
tunes = collections.defaultdict(list)
count = 0
for path in sorted(corpus.rglob("*.abc")):
    for text in re.split(r"(?m)^(?=X:)", path.read_text("latin-1"))[1:]:
        count += 1
        lines = text.splitlines()
        fields = {line[0]: line[2:].strip() for line in reversed(lines) if re.match(r"[A-Z]:", line)}
        music = "".join(line.split("%")[0] for line in lines if not re.match(r"[A-Za-z]:(?!\|)|%", line))
        music = re.sub(r'"[^"]*"|\s', "", music)  # without chord names and spaces
        if len(music) > 40:
            tunes[music].append((fields.get("T"), tuple(fields.get(name) for name in "MLK")))
print("music21", version("music21") + ",", count, "tunes of", len(tunes), "different texts of notes")
again = [rows for rows in tunes.values() if len(rows) > 1]
copies = sum(n - 1 for rows in again for n in collections.Counter(header for _, header in rows).values())
print("texts of notes that occur more than once:", len(again), "copies with the same metre, unit and key:", copies)
for rows in again[:3]:
    print("   ", [f"{title} ({', '.join(header)})" for title, header in rows])
assert count == 12978 and len(again) == 100 and copies == 109
PY
