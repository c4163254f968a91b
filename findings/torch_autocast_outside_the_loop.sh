#!/usr/bin/env bash
# torch 2.13.0: an autocast block around the training loop freezes the weights, even one with enabled=False.
# Expected: an outer block changes nothing for a loop whose forward passes stand in autocast blocks of their
#     own.
# Happens: autocast keeps its bfloat16 copies of the weights until the outermost block ends. So every step
#     computes with the weights of step 0: the optimiser moves the weights, and the loss stays the same to the
#     last digit.
# Source: seen in the program; torch's documentation wants the block around the forward pass only.
# For a user: a training that looks healthy in all but its loss; no warning. Ours has one block a forward pass
#     and none around it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import contextlib

import torch


def losses(outer):
    """The first losses of a small regression under an outer block that is absent (None), on or off."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(8, 1), torch.randn(64, 8)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=.1), []
    block = contextlib.nullcontext() if outer is None else torch.autocast("cpu", torch.bfloat16, enabled=outer)
    with block:
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = ((model(inputs).float() - inputs.sum(1, keepdim=True)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(round(loss.item(), 4))
    return found


print("torch", torch.__version__)
found = {outer: losses(outer) for outer in (None, True, False)}
for outer, row in found.items():
    print(f"outer block {outer}: losses {row}")
assert found[None][-1] < .5 * found[None][0], "it does not learn even without an outer block"
assert len(set(found[True])) == len(set(found[False])) == 1, "an outer block is harmless now"
PY
