"""Speed and memory of writing token files, on made-up tunes of several lengths.

    python benchmarks/bench_tokenize.py [--folder to write in] [--chars per corpus]

CPU time is that of one process, without the grouping of works (bench_works.py times that). Beside it stands
what opening and reading the files twice costs any program: is it the text or the files? And what the plan of
the windows costs, as a share of that. Prints a table.
"""
import argparse
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
from results import keep

import LakhMIDI as study

LENGTHS = (300, 1_000, 3_000, 10_000, 30_000)  # characters per tune: a folk tune ... a long file of Lakh
ALPHABET = "ABCDEFGabcdefg0123456789/,'|[]&:-z^_=\n"


def make_corpus(root, length, total):
    rng = random.Random(length)
    text = "".join(rng.choices(ALPHABET, k=1_000_000))
    (root / "abc").mkdir(parents=True)
    tunes = []
    for i in range(total // length):
        start = rng.randrange(len(text) - length)
        (root / "abc" / f"{i}.abc").write_text(text[start:start + length])
        tunes.append({"file": f"{i}", "abc": f"{i}.abc", "group": f"{i}", "n_notes": 1, "seconds": 1.0})
    return tunes


def cpu_seconds(work, *arguments):
    began = time.process_time()
    result = work(*arguments)
    return time.process_time() - began, result


def only_read(tunes, cfg):
    root = cfg.ABC_ROOT
    for _ in range(2):
        for tune in tunes:
            with open(f"{root}/{tune['abc']}", "rb") as file:
                file.read()


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", help="to write in")
    parser.add_argument("--chars", type=int, default=20_000_000, help="per corpus")
    args = parser.parse_args()
    rows = [{"chars_per_tune": 0, "peak_MB": peak_megabytes()}]
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        for length in LENGTHS:
            cfg = study.Cfg(DATA_ROOT=Path(root, str(length)))
            tunes = make_corpus(Path(cfg.DATA_ROOT), length, args.chars)
            only_read(tunes, cfg)  # from the disk into the cache of the system
            reading, _ = cpu_seconds(only_read, tunes, cfg)
            vocab_s, vocab = cpu_seconds(study.build_vocab, tunes, cfg)
            write_s, _ = cpu_seconds(study.write_tokens, "train", tunes, vocab, cfg)
            tokens = np.fromfile(cfg.tokens_root / "train.bin", vocab.dtype)
            plan_s, plan = cpu_seconds(study.plan_windows, tokens, vocab, 1_024)
            megabytes = len(tunes) * length / 1e6
            rows.append({"chars_per_tune": length, "tunes": len(tunes), "peak_MB": peak_megabytes(),
                         "MB_per_s": megabytes / (vocab_s + write_s),
                         "files_alone_MB_per_s": megabytes / reading, "bytes_a_window": plan.itemsize,
                         "plan_of_tokenizing_%": 100 * plan_s / (vocab_s + write_s)})
    print(" | ".join(rows[1]), "(peak_MB at the start:", f"{rows[0]['peak_MB']:.0f})")
    for row in rows[1:]:
        print(" | ".join(f"{value:,.1f}" for value in row.values()))
    keep("tokenize", cores=os.cpu_count(), rows=rows)


if __name__ == "__main__":
    main()
