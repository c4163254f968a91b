#!/usr/bin/env bash
# scipy 1.17.1's bootstrap by BCa, asked for 95 %, covers 73 % with three seeds.
# Expected: the interval that is called "bias-corrected and accelerated" covers some 95 % of normal samples of
#     any size.
# Happens: of three numbers there are but ten different resamples, and the interval is too short: 73 % in
#     1,000 tries, where Student's t covers 95 %.
# Source: seen in simulation.
# For a user: error bars of three seeds that are wrong in one of four cases. Our intervals of exponents come
#     from the F distribution; the bootstrap is for hundreds of tunes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${FINDINGS_PACKAGES:-$work}  # set it to keep the packages for the next script
mkdir -p "$packages" && packages=$(cd "$packages" && pwd)
[ -d "$packages/venv" ] || python3 -m venv "$packages/venv"
"$packages/venv/bin/pip" install -q --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
cd "$work"
"$packages/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import numpy as np
from scipy import stats

samples = np.random.default_rng(0).normal(size=(1000, 3))
rng, covered = np.random.default_rng(1), 0
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a degenerate resample now and then
    for sample in samples:
        result = stats.bootstrap((sample,), np.mean, n_resamples=999, method="BCa", rng=rng)
        interval = result.confidence_interval
        covered += interval.low <= 0 <= interval.high
half = stats.t.ppf(.975, 2) * samples.std(1, ddof=1) / 3 ** .5
student = float((np.abs(samples.mean(1)) <= half).mean())
print("scipy", version("scipy"))
print("share of 1,000 samples of three whose 95 % interval holds the true mean:",
      f"BCa {covered / 1000:.1%}, Student's t {student:.1%}")
assert covered < 800 and student > .93
PY
