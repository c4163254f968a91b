#!/usr/bin/env bash
# torch 2.13.0: the first 15 of 16 random numbers are not the 15 that the same seed gives.
# Expected: a generator is a stream: randn(15) is the beginning of randn(16).
# Happens: from 16 numbers on, another algorithm fills the tensor in blocks, so none of the 15 is the same;
#     below that 14 and 15 begin alike.
# Source: seen in the program, on a CPU; torch promises only equal results for equal calls.
# For a user: one more symbol in the vocabulary is another initial model, so two corpora or notations can't be
#     compared with "the same seed". We compare means over seeds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'

import torch


def draw(count):
    torch.manual_seed(0)
    return torch.randn(count)


print("torch", torch.__version__)
equal = {(short, long): int((draw(long)[:short] == draw(short)).sum())
         for short, long in ((14, 15), (15, 16), (17, 32))}
for (short, long), count in equal.items():
    print(f"of randn({short}), equal to the beginning of randn({long}): {count}")
assert equal[14, 15] == 14 and equal[15, 16] == 0 and equal[17, 32] < 17
PY
