"""python killed_training.py KNOBS KILLS: trains all models whole, and killed so many times, for comparison.

KNOBS are those of Cfg as JSON; the models go to whole/ and killed/ below SAVE_DIR. Each attempt is a fork of
this process, which does nothing with torch but import it, killed by signal 9 a little after it has written a
few lines of its log. A line of starts.jsonl for each attempt says where it went on.
"""
import copy
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch._dynamo  # noqa: F401  optimizers import it: once here instead of in every fork
from tqdm import tqdm

import LakhMIDI as study


def start(run, cfg):
    if child := os.fork():
        return child
    restore = study.Trainer.restore

    def noted(self, kind):
        found = restore(self, kind)
        if kind == "resume":
            with open(Path(cfg.SAVE_DIR, "starts.jsonl"), "a", encoding="utf-8") as out:
                out.write(json.dumps([run.name, self.leg, self.step]) + "\n")
        return found

    study.Trainer.restore = noted
    with tqdm(disable=True) as bar:
        study.train_model(run, study.read_vocab(cfg), cfg, bar)
    os._exit(0)


def kill(child, log, chance):
    def lines():
        return log.read_bytes().count(b"\n") if log.exists() else 0

    enough = lines() + chance.randint(6, 13)
    while lines() < enough:
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("it ended before it was killed")
        time.sleep(0.001)
    time.sleep(chance.random() / 100)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(knobs, kills):
    study.run_recipe = lambda run, cfg: "one recipe"
    cfg, chance = study.Cfg(**json.loads(knobs)), random.Random(0)
    for folder, n in (("whole", 0), ("killed", int(kills))):
        mine = copy.copy(cfg)
        mine.SAVE_DIR = Path(cfg.SAVE_DIR, folder)
        Path(mine.SAVE_DIR).mkdir(parents=True)
        for run in study.planned_runs(mine):
            for _ in range(n):
                kill(start(run, mine), run.path("log", mine), chance)
            if os.waitpid(start(run, mine), 0)[1]:
                sys.exit("it failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
