"""Seconds and memory from a made-up dump of The Session to token files.

    python benchmarks/bench_thesession.py [settings] [folder to write in]

Prints what the stages say and appends a line to benchmarks/results.jsonl.
"""
import csv
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


def make_dump(path, n):
    """Tunes of one setting or several, of 32 bars each, with quotation marks, entities and commas."""
    rng, tune = random.Random(0), 0
    with open(path, "w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow("tune_id setting_id name type meter mode abc date username composer".split())
        for setting in range(1, n + 1):
            tune += rng.random() < 0.45
            bars = ["".join(rng.choices("ABcdefg", k=8)) for _ in range(32)]
            music = "|:" + "\n".join('"G"' + "|".join(bars[i:i + 4]) + "|" for i in range(0, 32, 4))
            table.writerow([tune, setting, "Tom &amp; Jerry", "reel", "4/4", "Gmajor", music, "2020-01-01"])


def main(n=60_000, folder=None):
    seconds = {}
    with tempfile.TemporaryDirectory(dir=folder) as root:
        dump = Path(root, "tunes.csv")
        make_dump(dump, int(n))
        cfg = study.Cfg(DATASET=dump, DATA_ROOT=Path(root, "data"), WORKERS=1)
        for stage in study.STAGES[:3]:
            began = time.perf_counter()
            stage(cfg)
            seconds[stage.__name__] = round(time.perf_counter() - began, 1)
        row = {"benchmark": "thesession", "cores": os.cpu_count(), "settings": int(n), "seconds": seconds,
               "dump_MB": dump.stat().st_size / 1e6,
               "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print(row)
    with open(Path(__file__).parent / "results.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
