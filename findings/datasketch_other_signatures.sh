#!/usr/bin/env bash
# datasketch 2.0.0 gives the same set another signature than 1.6.5.
# Expected: num_perm and seed name a signature, so stored ones can be compared after an upgrade.
# Happens: all values differ; MinHash(scheme="legacy") of 2.0.0 gives those of 1.6.5. Signatures of the two
#     versions look alike in shape and type, and have a similarity near 0.
# Source: seen in the programs.
# For a user: a stored index answers "no duplicates" for everything, without an error. The version is pinned
#     in requirements.txt.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check datasketch==2.0.0 numpy==2.4.6 scipy==1.17.1
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import datasketch
from datasketch import MinHash


def signature(**options):
    found = MinHash(num_perm=64, **options)
    found.update_batch([b"%d" % i for i in range(100)])
    return found.hashvalues.tolist()


assert version("datasketch") == "2.0.0"
old_folder = Path("old").resolve()
subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
                "--target", old_folder, "datasketch==1.6.5"], check=True)
program = f"""
import sys
sys.path.insert(0, {str(old_folder)!r})
import datasketch
assert datasketch.__file__.startswith(sys.path[0])
found = datasketch.MinHash(num_perm=64)
found.update_batch([b"%d" % i for i in range(100)])
print(found.hashvalues.tolist())
"""
old = json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)
new, legacy = signature(), signature(scheme="legacy")
print("datasketch 1.6.5:", old[:3], "\ndatasketch 2.0.0:", new[:3], "\n2.0.0, legacy:  ", legacy[:3])
alike = sum(a == b for a, b in zip(old, new))
print(f"equal values of 64: 1.6.5 and 2.0.0 {alike}, 1.6.5 and legacy {sum(a == b for a, b in zip(old, legacy))}")
assert alike < 3 and old == legacy
PY
