#!/usr/bin/env bash
# torch 2.13.0's torch.compile leaves a model with an nn.LSTM as it is, all of it, and says nothing.
# Expected: what can't be compiled is left out, the rest (the embedding, the head) is compiled, or a warning
#     comes.
# Happens: not one graph is made, not even of the linear layer behind the LSTM; the same with nn.GRU. With
#     fullgraph=True it is an error.
# Source: torch's own message (TORCH_LOGS) "Dynamo does not support RNN, GRU, or LSTM", config.allow_rnn is
#     experimental.
# For a user: "compiled" LSTMs are compared with compiled Transformers. We compile Transformers only, and
#     leave LSTMs to cuDNN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import warnings

import torch
import torch._dynamo


class Model(torch.nn.Module):
    """A recurrent or linear layer and a head."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(8, 8)

    def forward(self, inputs):
        hidden = self.layer(inputs)
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)


def graphs(layer):
    """How many graphs torch.compile makes of a model."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(Model(layer), backend=backend)(torch.randn(3, 2, 8))
    return len(made), len(caught)


print("torch", torch.__version__)
layers = torch.nn.Linear(8, 8), torch.nn.LSTM(8, 8), torch.nn.GRU(8, 8)
found = {type(layer).__name__: graphs(layer) for layer in layers}
print("graphs and warnings:", found)
assert found == {"Linear": (1, 0), "LSTM": (0, 0), "GRU": (0, 0)}
PY
