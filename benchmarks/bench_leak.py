"""What a split that leaks does to the loss: the same models trained on a split by file and on one by work.

    python benchmarks/bench_leak.py folder --MODELS gpt_450K --TRAIN_TOKENS_TARGET 4000000

The folder keeps the data and both runs: what is there is not made again. All flags of LakhMIDI.py may follow.
The splits hold out different tunes; the cleanest figure is that within the split by file, of the held-out
tunes that have a version in training against those that have none. Prints a table and appends a line to
benchmarks/results.jsonl.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

import LakhMIDI as study


def held_out_losses(checkpoint, cfg):
    """Rows of {tunes, loss ...} of one model: all held-out tunes, and by whether training has a version."""
    model, vocab, _ = study.load(checkpoint, cfg.DEVICE)
    tokens = study.read_tokens("val", vocab, cfg)
    losses = study.token_losses(model, tokens, cfg)
    tunes = list(study.read_jsonl(cfg.tokens_root / "tunes.jsonl"))
    trained = {tune["group"] for tune in tunes if tune["split"] == "train"}
    total, chars, leaked = [], [], []
    for tune in tunes:
        end = tune["start"] + tune["chars"] + 1  # the loss at i is that of token i + 1, the last an end token
        if tune["split"] == "val" and end <= len(losses):
            total.append(losses[tune["start"]:end].sum(dtype=np.float64))
            chars.append(tune["chars"] + 1)
            leaked.append(tune["group"] in trained)
    total, chars, leaked = np.array(total), np.array(chars), np.array(leaked)
    rows = []
    parts = {"all": leaked | True, "with a version in training": leaked, "with none": ~leaked}
    for name, mask in parts.items():
        if mask.any():
            loss = total[mask].sum() / chars[mask].sum()
            spread = ((total[mask] - loss * chars[mask]) ** 2).sum() ** 0.5 / chars[mask].sum()
            rows.append({"split": cfg.SPLIT_BY, "model": checkpoint.stem, "held-out tunes": name,
                         "tunes": int(mask.sum()), "loss": round(loss, 4), "error": round(spread, 4)})
    return rows


def main(folder, *flags):
    rows = []
    for by in ("file", "work"):
        own = [*flags, "--DATA_ROOT", f"{folder}/data", "--SAVE_DIR", f"{folder}/runs_{by}", "--SPLIT_BY", by]
        if study.main([*own, "--to", "train"]):
            return 1
        cfg, _ = study.parse_flags(own)
        for checkpoint in sorted(Path(cfg.SAVE_DIR).glob("*.pt")):
            rows += held_out_losses(checkpoint, cfg)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))
    with open(Path(__file__).parent / "results.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps({"benchmark": "leak", "flags": flags, "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
