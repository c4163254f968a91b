#!/usr/bin/env bash
# torch 2.13.0: to go through a DataLoader, even unshuffled and without workers, draws from the global
#     generator.
# Expected: a look at the validation loss does not change the training.
# Happens: each iter(DataLoader) takes a random number as a base seed; dropout and the shuffling of the
#     training set differ from there on.
# Source: pytorch/pytorch issues 11062 (2018, open) and 122697 (expected behaviour, pass a generator).
# For a user: two runs with the same seed and other evaluation intervals are other runs, and a resumed run is
#     not the one that was interrupted. Our batches are a function of seed and step.
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


def next_draw(look, generator=None):
    torch.manual_seed(0)
    validation = torch.utils.data.DataLoader(range(10), generator=generator)
    if look:
        list(validation)
    return torch.rand(1).item()


print("torch", torch.__version__)
found = {"no look": next_draw(False), "one look": next_draw(True),
         "one look, own generator": next_draw(True, torch.Generator().manual_seed(1))}
print("the next random number of the training:", found)
assert found["no look"] == found["one look, own generator"] != found["one look"]
PY
