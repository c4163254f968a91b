#!/usr/bin/env bash
# scipy 1.17.1's curve_fit finds an exponent of some thousands for a scaling law, with warnings only.
# Expected: L = a N^-alpha + c through five exact points of alpha = .35 is found, or the fit fails.
# Happens: from the default start (1, 1, 1) it returns alpha in the thousands and c = the mean of the losses:
#     N^-alpha is 0 in floating point and its gradient too. The covariance is infinite, with a warning.
# Source: seen in the program; a published table of character models gives alpha = 5,033.
# For a user: a script that ignores warnings prints an exponent. We search alpha in one dimension, solve for a
#     and c, and take the residuals of log L.
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
from scipy.optimize import curve_fit

sizes = np.array([801152, 4176720, 18643240, 55444740, 99209472.])
tables = {"exact law, alpha .35": 30 * sizes ** -.35 + .4,
          "published losses": np.array([.5633, .4595, .4280, .4132, .4088])}
print("scipy", version("scipy"))
for name, losses in tables.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (a, alpha, c), covariance = curve_fit(lambda n, a, alpha, c: a * n ** -alpha + c, sizes, losses)
    print(f"{name}: alpha {alpha:.0f}, c {c:.4f} (mean loss {losses.mean():.4f}), variance {covariance[1, 1]}",
          sorted({str(warning.message) for warning in caught}))
    assert alpha > 1000 and np.isinf(covariance).all()
PY
