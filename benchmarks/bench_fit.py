"""How well exponents are recovered, and when they are refused: python benchmarks/bench_fit.py [--tables 200].

Simulated tables of five sizes over two decades with a known exponent. Error and coverage of fit_power_law
against what is usually done; coverage of the bootstrap of fit_parametric_loss over runs and over points; how
often tables that follow no power law are given an exponent. No data needed. Prints three tables.

    python benchmarks/bench_fit.py chess.csv xlstm.csv

fits public curves instead and prints law, ruler and persistence for the largest model of each family: CSVs
with columns N, L and, if there are several, D and family. Losses of characters of chess and of xLSTM are in
github.com/shikaiqiu/supercollapse and github.com/NX-AI/xlstm_scaling_laws.
"""

import argparse
import csv
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from results import keep
from scipy import optimize, stats

sys.path.insert(0, str(Path(__file__).parents[1]))
import LakhMIDI as study

SIZES = np.geomspace(8e5, 1e8, 5)
ALPHA, SHARE = 0.35, 0.8  # the exponent, and the offset as a share of the loss at the largest size
NOISES = (0.002, 0.005, 0.01)


def ours(N, L):
    fit = study.fit_power_law(N, L)["alpha"]
    return (
        fit["value"],
        -np.inf if fit["lo"] is None else fit["lo"],
        np.inf if fit["hi"] is None else fit["hi"],
    )


def curve_fit(N, L):
    """scipy's default start, interval by the delta method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            p, cov = optimize.curve_fit(lambda n, a, alpha, c: a * n**-alpha + c, N, L)
        except RuntimeError:  # no convergence
            return np.nan, np.nan, np.nan
    half = stats.t.ppf(0.975, len(N) - 3) * np.sqrt(cov[1, 1]) if np.isfinite(cov[1, 1]) else np.nan
    return p[1], p[1] - half, p[1] + half


def line(x, y):
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, max(len(x) - 2, 1)) * fit.stderr
    return -fit.slope, -fit.slope - half, -fit.slope + half


def smallest_loss(N, L):
    keep = L > L.min()
    return line(np.log(N[keep]), np.log(L[keep] - L.min()))


def pure_power(N, L):
    return line(np.log(N), np.log(L))


METHODS = {
    "fit_power_law": ours,
    "curve_fit, default start": curve_fit,
    "c = min(y)": smallest_loss,
    "c = 0": pure_power,
}


HEAD = "noise", "method", "median", "|error|", "covered", "bounded", "time"


def power_laws(tables):
    rows, rng = [], np.random.default_rng(0)
    L = 0.4 * (SHARE + (1 - SHARE) * (SIZES / SIZES[-1]) ** -ALPHA)
    for noise in NOISES:
        draws = L * np.exp(noise * rng.normal(size=(tables, 5)))
        for name, method in METHODS.items():
            began = time.perf_counter()
            alpha, lo, hi = np.array([method(SIZES, draw) for draw in draws]).T
            rows.append(
                {
                    "noise": noise,
                    "method": name,
                    "median_alpha": float(np.nanmedian(alpha)),
                    "median_error": float(np.median(np.nan_to_num(np.abs(alpha / ALPHA - 1), nan=np.inf))),
                    "coverage": float(np.mean((lo <= ALPHA) & (ALPHA <= hi))),
                    "bounded": float((np.isfinite(lo) & np.isfinite(hi)).mean()),
                    "seconds": (time.perf_counter() - began) / tables,
                }
            )
    return rows


def surface(seed, noise=0.004):
    """Eight runs with three branches each; nearly all of the noise is the run's."""
    rng, run = np.random.default_rng(seed), np.repeat(np.arange(8), 3)
    N, D = np.geomspace(1e6, 1e8, 8)[run], np.tile(np.geomspace(2.5e7, 1e8, 3), 8)
    spread = noise * (0.95 * rng.normal(size=8)[run] + 0.3 * rng.normal(size=24))
    return N, D, (0.35 + 40 * N**-0.4 + 300 * D**-0.45) * np.exp(spread), run


def bootstraps(tables):
    inside, began = {"runs": 0, "points": 0}, time.perf_counter()
    for seed in range(tables):
        N, D, L, run = surface(seed)
        for kind, names in (("runs", run), ("points", np.arange(24))):
            _, lo, hi = study.fit_surface(N, D, L, names, 100).interval(lambda p: p[..., 3])
            inside[kind] += bool(lo <= 0.4 <= hi)
    seconds = (time.perf_counter() - began) / (200 * tables)
    return {kind: count / tables for kind, count in inside.items()}, seconds


def shapes(x, rng):
    """{name: losses at relative log sizes x that follow no power law}, and one that does."""
    return {
        "power law": SHARE + (1 - SHARE) * (100 ** (1 - x)) ** rng.uniform(0.2, 0.6),
        "flat": np.ones_like(x),
        "log-linear": 2 - x,
        "exponential": 1 + np.exp(-(100 ** (x - rng.uniform(0, 0.8)))),
        "step": np.where(x < rng.uniform(0.1, 0.9), 2.0, 1.4),
        "U": 1 + 2 * (x - 0.6) ** 2,
        "concave": 2 - x**2,
        "random": np.exp(0.3 * rng.normal(size=len(x))),
    }


def verdicts(tables):
    counts = {}
    for seed in range(tables):
        for noise in (0.0, *NOISES):
            rng = np.random.default_rng([seed, int(noise * 1e4)])
            x = np.linspace(0, 1, rng.integers(4, 13))
            for name, L in shapes(x, rng).items():
                fit = study.attempt(
                    study.fit_power_law, 1e6 * 100**x, L * np.exp(noise * rng.normal(size=len(x)))
                )
                row = counts.setdefault(
                    name, dict.fromkeys(("identified", "ridge", "not_identified", "refused"), 0)
                )
                row[fit["status"]] += 1
    return counts


def public_tables(paths):
    """Prints, for the CSV files of a user, what the laws say and how they predict the largest model."""
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = [{key.strip().lower(): value for key, value in row.items()} for row in table]
        for family in sorted({row.get("family", "") for row in rows}):
            mine = [row for row in rows if row.get("family", "") == family]
            N, L = (np.array([row[key] for row in mine], float) for key in ("n", "l"))
            fits = {"L(N)": (study.fit_power_law, (N, L))}
            if "d" in rows[0]:
                D = np.array([row["d"] for row in mine], float)
                whole = D == D.max()
                fits = {"L(N)": (study.fit_power_law, (N[whole], L[whole])),
                        "L(N, D)": (study.fit_parametric_loss, (N, D, L))}
            for name, (law, columns) in fits.items():
                fit = study.attempt(law, *columns)
                if fit["status"] == "refused":
                    print(f"{path} {family} {name}: {fit['reason']}")
                    continue
                errors = [fit["holdout"][key] for key in ("error", "ruler_error", "persistence_error")]
                shown = ["none" if error is None else f"{error:+.2%}" for error in errors]
                print(f"{path} {family} {name}: alpha {study.with_ends(fit['alpha'])}, {fit['status']}; the "
                      "largest: law {}, ruler {}, persistence {}".format(*shown))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tables", type=int, default=200, help="simulated tables per row")
    parser.add_argument("files", nargs="*", help="CSV files of public curves, fitted instead")
    args = parser.parse_args()
    if args.files:
        public_tables(args.files)
        return
    tables = args.tables
    rows = power_laws(tables)
    print(f"alpha = {ALPHA}, five sizes, one seed, {tables} tables; errors and times are relative")
    print("{:>6s}  {:26s}{:>9s}{:>9s}{:>9s}{:>9s}{:>8s}".format(*HEAD))
    for row in rows:
        base = next(r["seconds"] for r in rows if r["noise"] == row["noise"])
        cells = "{noise:6.1%}  {method:26s}{median_alpha:9.3g}{median_error:9.3g}"
        cells += "{coverage:9.1%}{bounded:9.1%}"
        print(cells.format(**row) + f"{row['seconds'] / base:8.3f}")
    covered, seconds = bootstraps(max(tables // 4, 2))
    print("\nL(N, D), interval of alpha: covers {runs:.1%} by run, {points:.1%} by point; ".format(**covered)
          + f"1,000 draws take {1000 * seconds / rows[0]['seconds']:.0f} times as long as fit_power_law\n")
    counts = verdicts(max(tables // 6, 1))
    print("{:12s}{:>12s}{:>8s}{:>16s}{:>9s}".format("table", *counts["flat"]))
    for name, row in counts.items():
        print("{:12s}{:12d}{:8d}{:16d}{:9d}".format(name, *row.values()))
    keep("fit", tables=tables, power_law=rows, bootstrap_coverage=covered, verdicts=counts)


if __name__ == "__main__":
    main()
