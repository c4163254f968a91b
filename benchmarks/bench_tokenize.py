"""Speed and memory of writing token files, on made-up tunes of several lengths: is it the text or the files that cost?

    python benchmarks/bench_tokenize.py [folder to write in] [characters per corpus]

CPU time is that of one process; the grouping of works is not part of it (bench_works.py times that). Prints a table and
appends a line to benchmarks/results.jsonl.
"""
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import LakhMIDI as study

LENGTHS = (300, 1_000, 3_000, 10_000, 30_000)  # characters per tune: a folk tune ... a long file of Lakh
ALPHABET = "ABCDEFGabcdefg0123456789/,'|[]&:-z^_=\n"


def make_corpus(root, length, total):
    rng = random.Random(length)
    text = "".join(rng.choices(ALPHABET, k=total + length))
    (root / "abc").mkdir(parents=True)
    tunes = []
    for i in range(total // length):
        start = rng.randrange(total)
        (root / "abc" / f"{i}.abc").write_text(text[start:start + length])
        tunes.append({"file": f"{i}", "abc": f"{i}.abc", "group": f"{i}", "n_notes": 1, "seconds": 1.0})
    return tunes


def cpu_seconds(work):
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def only_read(tunes, cfg):
    """What any program must do: each file opened and read twice (vocabulary, tokens)."""
    for _ in range(2):
        for tune in tunes:
            with open(f"{cfg.abc_root}/{tune['abc']}", "rb") as file:
                file.read()


def main(folder=None, total=20_000_000):
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for length in LENGTHS:
            cfg = study.Cfg(DATA_ROOT=Path(root, str(length)))
            tunes = make_corpus(Path(cfg.DATA_ROOT), length, int(total))
            only_read(tunes, cfg)  # from the disk into the cache of the system
            files, _ = cpu_seconds(lambda tunes=tunes, cfg=cfg: only_read(tunes, cfg))
            vocab_s, vocab = cpu_seconds(lambda tunes=tunes, cfg=cfg: study.build_vocab(tunes, cfg))
            write_s, _ = cpu_seconds(lambda tunes=tunes, cfg=cfg, v=vocab: study.write_tokens("train", tunes, v, cfg))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            megabytes = len(tunes) * length / 1e6
            rows.append({"chars_per_tune": length, "tunes": len(tunes), "MB_per_s": megabytes / (vocab_s + write_s),
                         "files_alone_MB_per_s": megabytes / files, "peak_MB": peak})
    print("characters per tune   tunes   MB/s   opening and reading alone, MB/s   peak MB")
    for row in rows:
        print(f"{row['chars_per_tune']:19,} {row['tunes']:7,} {row['MB_per_s']:6.1f} {row['files_alone_MB_per_s']:33.1f}"
              f" {row['peak_MB']:9.0f}")
    with open(Path(__file__).parent / "results.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps({"benchmark": "tokenize", "cores": os.cpu_count(), "rows": rows}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
