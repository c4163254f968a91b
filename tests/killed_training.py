"""python killed_training.py KNOBS_AS_JSON MODEL KILLS: trains a model, killed so many times with signal 9.

Each attempt is a fork of this process, which does nothing with torch but import it, and dies a little after
it has written a few lines of the log.
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

import LakhMIDI as study


def lines(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


def main(knobs, model, kills):
    study.run_recipe = lambda run, cfg: "one recipe"
    cfg, chance = study.Cfg(**json.loads(knobs)), random.Random(0)
    run = next(run for run in study.planned_runs(cfg) if run.name == model)
    log = run.path("log", cfg)
    for attempt in range(int(kills) + 1):
        before, wanted = lines(log), chance.randint(1, 12)
        if not (child := os.fork()):
            with tqdm(disable=True) as bar:
                study.train_model(run, study.read_vocab(cfg), cfg, bar)
            os._exit(0)
        if attempt < int(kills):
            while lines(log) < before + wanted:
                if os.waitpid(child, os.WNOHANG)[0]:
                    sys.exit("it ended before it was killed")
                time.sleep(0.001)
            time.sleep(chance.random() / 100)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    sys.exit(status != 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
