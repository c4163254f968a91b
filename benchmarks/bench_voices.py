"""Music of several voices: what models of each size make of it, sampled and judged by the study's own stages.

    python LakhMIDI.py --to tokenize --DATA_ROOT DATA_ROOT --USE_LOCAL_MIDI True --LOCAL_MIDI_ROOT folder
    python benchmarks/bench_voices.py DATA_ROOT --USE_LOCAL_MIDI True --LOCAL_MIDI_ROOT folder \
        [--MODELS gpt_60K,gpt_400K] [--SEQ_LEN 512] [other knobs]

Prints a row for each model and kind of sample, real held-out tunes first. Bars right: share of the bars, in
every voice, that the reader measures as right; loops don't count. Tries: bars drawn for one that was kept.
From four sizes of a family on: two laws, by regression of the logarithm of the share of bars that are wrong
on the bits per note and on the logarithm of N, and where they lead to 5 % wrong, with 95 % intervals.
"""
import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
from results import keep
from scipy import stats

import LakhMIDI as study

KNOBS = {"SAMPLES": 100, "SAMPLE_CHARS": 2_200, "SHOWN": 0, "SEQ_LEN": 1_024, "BATCH_TOKENS": 4_096}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("data_root")
    args, rest = parser.parse_known_args()
    given = dict(zip((flag.removeprefix("--") for flag in rest[::2]), rest[1::2], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        knobs = {**KNOBS, "SAVE_DIR": folder, **given}
        flags = [text for name, value in knobs.items() for text in (f"--{name}", str(value))]
        source = ["--DATA_ROOT", args.data_root]
        if code := study.main(["--only", "train", *source, *flags]):
            sys.exit(code)
        if code := study.main(["--only", "evaluate", *source, *flags]):
            sys.exit(code)
        trained = study.read_json(Path(knobs["SAVE_DIR"], "scaling_results.json"))
        found = study.read_json(Path(knobs["SAVE_DIR"], "evaluation.json"))
    show(args.data_root, trained, found)
    keep("voices", args.data_root, knobs=given, models=found["models"], music=found["music"])


def show(corpus, trained, found):
    print(f"\n{corpus}: {trained['copies']:.1%} of the windows are copies and room left over")
    for row in found["models"]:
        twins = ", ".join(f"{name} {share['value']:.2f}" for name, share in row["likelier_than_twin"].items())
        print(f"{row['run']:12s} bits a note {row['bits_per_note']:.3f}, test loss {row['test_loss']:.4f}; "
              f"likelier than its twin: {twins}")
    print(" " * 24, "valid as far header bars right ended tries")
    for row in found["music"]:
        shares = [row[key]["value"] for key in ("valid", "valid_or_cut", "header")]
        tries = f"{row['tries']:.2f}" if row.get("tries") else ""
        print(f"{row['run'] + ' ' + row['kind']:24s} {shares[0]:5.0%} {shares[1]:6.0%} {shares[2]:6.0%} "
              f"{row['bars_right']:10.1%} {row['ended'] / row['n']:5.0%} {tries:>5s}  {row['first_fault']}")
    models = {row["run"]: row for row in found["models"]}
    for family in study.FAMILIES:
        rows = [row for row in found["music"]
                if row["kind"] == "unprompted" and row["run"].startswith(family)]
        if len(rows) > 3:
            wrong = [1 - row["bars_right"] for row in rows]
            size = [np.log(models[row["run"]]["n_fit"]) for row in rows]
            value, low, high = np.exp(reached(size, wrong))
            print(f"{family}: 5 % of the bars wrong at N = {value:.2g} [{low:.2g}, {high:.2g}]")
            value, low, high = reached([models[row["run"]]["bits_per_note"] for row in rows], wrong)
            print(f"{family}: 5 % of the bars wrong at {value:.2f} [{low:.2f}, {high:.2f}] bits a note")


def reached(x, wrong, goal=0.05, draws=10_000):
    """Where a straight line through log(wrong) over x comes to the goal: (value, low, high), the interval by
    draws of both of its coefficients from their t distribution."""
    x, y = np.array(x), np.log(wrong)
    line, middle, free = stats.linregress(x, y), x.mean(), len(x) - 2
    spread = np.sqrt(((y - line.intercept - line.slope * x)**2).sum() / free / len(x))
    t = stats.t.rvs(free, size=(2, draws), random_state=1)
    at = middle + (np.log(goal) - y.mean() - spread * t[0]) / (line.slope + line.stderr * t[1])
    return (np.log(goal) - line.intercept) / line.slope, *np.quantile(at, [0.025, 0.975])


if __name__ == "__main__":
    main()
