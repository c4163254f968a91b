#!/usr/bin/env bash
# pebble 5.2.3: in ProcessPool.map the time-out counts for a chunk, and the finished results of the chunk are
#     lost too.
# Expected: timeout=1.0 gives each item a second; items that were done are delivered.
# Happens: three items of .4 s in one chunk are over the limit together: one TimeoutError stands for all
#     three, none is delivered. With chunksize=1 all three come.
# Source: the docstring of ProcessPool.map says that the time-out applies to each chunk; the loss was seen in
#     the program.
# For a user: with large chunks one hanging file takes hundreds of good ones with it. We give the pool one
#     file a task.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check pebble==5.2.3
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import subprocess
import sys
from pathlib import Path

program = '''
import time
from concurrent.futures import TimeoutError
from importlib.metadata import version

from pebble import ProcessPool


def work(seconds):
    time.sleep(seconds)
    return seconds


if __name__ == "__main__":
    found = {}
    for chunksize in (3, 1):
        with ProcessPool(max_workers=1) as pool:
            found[chunksize] = []
            results = pool.map(work, [.4, .4, .4], timeout=1.0, chunksize=chunksize).result()
            while True:
                try:
                    found[chunksize].append(next(results))
                except StopIteration:
                    break
                except TimeoutError:
                    found[chunksize].append("time-out")
        print(f"pebble {version('pebble')}, chunksize {chunksize}: {found[chunksize]}")
    assert found == {3: ["time-out"], 1: [.4, .4, .4]}
'''
Path("work.py").write_text(program)
subprocess.run([sys.executable, "work.py"], check=True)
PY
