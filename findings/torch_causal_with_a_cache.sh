#!/usr/bin/env bash
# torch 2.13.0: is_causal=True with a cache of keys lets the newest query see the oldest key only.
# Expected: one new query after five cached keys sees them all; nothing after it exists.
# Happens: the mask is aligned at the upper left, so query 0 sees key 0 alone, and the attention is the first
#     value.
# Source: the documentation of scaled_dot_product_attention shows it as code (tril with diagonal 0).
# For a user: cached sampling that disagrees with training and still writes plausible music. We pass is_causal
#     only where queries and keys are equal in number, and a mask else.
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
from torch.nn.functional import scaled_dot_product_attention as attention

torch.manual_seed(0)
keys, values, query = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 1, 8)
causal, full = attention(query, keys, values, is_causal=True), attention(query, keys, values)
lower_right = torch.ones(1, 5, dtype=torch.bool).tril(4)
print("torch", torch.__version__)
same = torch.allclose(causal, values[:, :, :1]), torch.allclose(causal, full)
print("causal attention of one query is the first value:", same[0], "and that over all keys:", same[1])
masked = torch.allclose(attention(query, keys, values, lower_right), full)
print("with a mask aligned at the lower right it is:", masked)
assert same == (True, False) and masked
PY
