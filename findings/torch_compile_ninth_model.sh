#!/usr/bin/env bash
# torch 2.13.0's torch.compile keeps its graphs with the code of a class, not with the model: the ninth size
#     runs uncompiled.
# Expected: each model that is given to torch.compile is compiled.
# Happens: eight models of one class with other widths take eight graphs; the ninth and later ones run as
#     plain Python, after one line in the log. torch._dynamo.reset() before each model compiles all.
# Source: the limit is torch._dynamo.config.recompile_limit; that models share it was seen in the program.
# For a user: in a ladder of sizes the largest models are the slow ones, and the speed of a run depends on the
#     runs before. We reset the compiler before each model.
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
import torch._dynamo


class Model(torch.nn.Module):
    """One layer of some width."""

    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, inputs):
        return torch.tanh(self.layer(inputs))


def compiled(reset):
    """Whether the model of each width was compiled, in a ladder of ten."""
    made, answer = [], []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for width in range(8, 88, 8):
        if reset:
            torch._dynamo.reset()
        before = len(made)
        torch.compile(Model(width), backend=backend, dynamic=False)(torch.randn(2, width))
        answer.append(len(made) > before)
    return answer


print("torch", torch.__version__, "recompile_limit", torch._dynamo.config.recompile_limit)
found = {reset: compiled(reset) for reset in (False, True)}
for reset, row in found.items():
    print(f"reset before each model {reset}: compiled {row}")
assert found[False] == [True] * 8 + [False] * 2 and all(found[True])
PY
