"""python killed_training.py KNOBS KILLS: trains a model of each family whole, and killed so many times.

Prints what became of both as JSON. Each attempt is a fork of this process, which does nothing with torch but
import it. It kills itself by signal 9 a few steps after its start: before a step, or just before a checkpoint
takes its name.
"""
import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # optimizers import it: once here instead of in every fork

import LakhMIDI as study

STUDY = {"STUDY": "smoke", "DEVICE": "cpu", "SEQ_LEN": 16, "BATCH_TOKENS": 64, "SAVE_EVERY_S": 0.0,
         "MODELS": ("gpt_8w", "lstm_10w"), "TRAIN_TOKENS_TARGET": 64 * 100}


def killing(function, calls):
    """`function`, but the process dies when it is called for the `calls`-th time."""
    def counted(*args, **named):
        counted.left -= 1
        if counted.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **named)
    counted.left = calls
    return counted


def attempt(run, cfg, places, steps=0):
    """Trains in a fork, which dies after some steps if they are given; returns its exit status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    restore = study.Training.restore

    def noted(self):
        found = restore(self)
        with open(places, "a", encoding="utf-8") as out:
            out.write(f"{self.step}\n")
        return found
    study.Training.restore = noted
    if steps % 2:
        study.Windows.chosen = killing(study.Windows.chosen, steps)
    elif steps:
        study.os.replace = killing(os.replace, steps)
    vocab = study.read_vocab(cfg)
    windows = study.Windows(study.read_training(vocab, cfg)[0], vocab, cfg.SEQ_LEN)
    study.train_model(run, windows, vocab, cfg)
    os._exit(0)


def main(knobs, kills):
    study.tokenize.identity = lambda cfg: "one corpus"
    chance, outcome, knobs = random.Random(0), {}, json.loads(knobs)
    for n in (0, int(kills)):
        cfg = study.Cfg(**STUDY, **knobs | {"SAVE_DIR": Path(knobs["SAVE_DIR"], f"killed {n} times")})
        for run in study.planned_runs(cfg):
            places = Path(cfg.SAVE_DIR, f"{run.name}.places")
            places.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(n):
                if os.WTERMSIG(attempt(run, cfg, places, chance.randint(8, 16))) != signal.SIGKILL:
                    sys.exit("it ended before it was killed")
            if attempt(run, cfg, places):
                sys.exit("it failed")
            record = study.finished(run, cfg)
            weights = torch.load(run.path("model.pt", cfg))["model"]
            outcome.setdefault(run.size.family, []).append({
                "places": list(study.read_jsonl(places)), "train_loss": record["curve"]["train_loss"],
                "val_loss": [row["val_loss"] for row in record["rows"]],
                "weights": {name: w.view(torch.int32).tolist() for name, w in weights.items()}})
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
