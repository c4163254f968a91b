"""Does the memorisation meter catch training tunes that are passed off as samples?

    python benchmarks/bench_copies.py DATA_ROOT [--tunes 500] [--chars 1200]

Training tunes, transposed by a fifth and cut like samples, are passed off as samples. Appends one line to
results.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import LakhMIDI as study


def melodies(tunes, cfg, chars, shift=0):
    found = []
    for tune in tunes:
        text = study.read_abc_file({"abc": f"{tune['file']}.abc"}, cfg)
        parsed = study.read_abc(text if len(text) <= chars else study.whole_bars(text[:chars]))
        notes = parsed.notes._replace(pitch=parsed.notes.pitch + shift)
        found.append(study.melody(notes, np.array([drum for _, drum in parsed.voices])))
    return found


def share(tunes, runs, limit):
    """Share of the tunes that the meter takes for copies."""
    return float(
        np.mean(
            [
                study.is_copy({"longest_run": run, "melody_notes": np.count_nonzero(steps) + 1}, limit)
                for steps, run in zip(tunes, runs, strict=True)
            ]
        )
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data_root")
    parser.add_argument("--tunes", type=int, default=500)
    parser.add_argument("--chars", type=int, default=1_200)
    flags = parser.parse_args()
    cfg = study.Cfg(DATA_ROOT=flags.data_root)
    rows = list(study.read_jsonl(cfg.tokens_root / "tunes.jsonl"))
    corpus = study.training_melodies(cfg)
    real = melodies([row for row in rows if row["split"] == "test"][: flags.tunes], cfg, flags.chars)
    copies = melodies(
        [row for row in rows if row["split"] == "train"][: flags.tunes], cfg, flags.chars, shift=7
    )
    real_runs = study.longest_runs(real, corpus)
    copied_runs = study.longest_runs(copies, corpus)
    limit = float(np.quantile(real_runs, 0.95))
    result = {
        "bench": "copies",
        "steps_in_corpus": len(corpus),
        "real": len(real),
        "real_median": float(np.median(real_runs)),
        "real_95": limit,
        "copies": len(copies),
        "caught": share(copies, copied_runs, limit),
        "real_taken_for_copies": share(real, real_runs, limit),
        "caught_by_length_alone": float(np.mean(copied_runs > limit)),
    }
    for name, value in result.items():
        print(f"{name:32s} {value}")
    with open(Path(__file__).with_name("results.jsonl"), "a", encoding="utf-8") as results:
        results.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
