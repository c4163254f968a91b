"""results.jsonl: the last row of each benchmark, and of each part of one. Figures over time are in LOG.md."""
import json
import os
from pathlib import Path

PATH = Path(__file__).with_name("results.jsonl")


def keep(bench, part="", **figures):
    """Writes a row in the place of the one with the same `bench` and `part`, or at the end."""
    lines = PATH.read_text("utf-8").splitlines() if PATH.exists() else []
    rows = {(row["bench"], row.get("part", "")): row for row in map(json.loads, lines)}
    rows[bench, part] = {"bench": bench} | ({"part": part} if part else {}) | figures
    beside = PATH.with_suffix(".part")
    beside.write_text("".join(json.dumps(row, default=float) + "\n" for row in rows.values()), "utf-8")
    os.replace(beside, PATH)
