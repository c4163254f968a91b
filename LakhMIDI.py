"""Lakh MIDI Scaling Study: how the loss of Transformers and LSTMs on symbolic music falls with their size.

MIDI files go in at the top; ABC notation, characters, two families of models, power laws with honest
intervals and new music come out at the bottom. The file reads in the order in which the study runs.

    python LakhMIDI.py                                   the whole study on bundled folk tunes
    python LakhMIDI.py --LMD_ZIP_PATH lmd_full.tar.gz    the same on the Lakh MIDI Dataset
    python LakhMIDI.py --status                          what is done, what is stale
    python LakhMIDI.py --from train --STUDY cpu          a part of it, with another knob (--help lists all)
    python LakhMIDI.py --plan 2h                         the best N and D for two hours, by the fitted laws
    python LakhMIDI.py --sample 8 --prompt mine.mid      new music by the best model

  stage      reads                     writes
  extract    ZIP, tar, folder, corpus  data_lakh/midi/, midi_index.json
  convert    midi_index.json           data_lakh/abc/, report.jsonl
  tokenize   report.jsonl, abc/        data_lakh/tokens/: train.bin val.bin test.bin vocab.json stats.json
  train      tokens/                   runs_lakh/: gpt_*.pt lstm_*.pt scaling_results.json
                                       training_curves.json
  fit        scaling_results.json      runs_lakh/: fits.json *_scaling.png
  evaluate   checkpoints, tokens/      runs_lakh/: evaluation.json best_samples/ samples/ samples.jsonl
  report     every JSON above          runs_lakh/report.html

A stage is a function of files: it is skipped while its knobs and inputs are what they were, and goes on
where it was stopped. Left out on purpose: velocities, lyrics, pitch bends and controllers, for which ABC has
no place.
"""
from __future__ import annotations

import argparse
import array
import ast
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import csv
import datetime
import difflib
import functools
import gc
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import math
import mimetypes
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# How long OpenMP's threads spin before they sleep. Not at all made the steps of small LSTMs 12 times slower
# on two idle cores, 100 times as long 1.8 times. Read only when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# scipy's arrays here are small: with threads of its own two fits side by side take 59 seconds, without 8.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jinja2
import numpy as np
import PIL.Image
import portalocker
import requests
import soundfile
import symusic
import torch
import torch.distributed as dist
import torch.nn.functional as F
import verovio
from datasketch import MinHash
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.figure import Figure
from pebble import ProcessExpired, ProcessPool
from scipy import optimize, stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from tqdm import tqdm

try:  # sound and scores, for which Linux on ARM has no wheels
    import lytk
    import midirenderer
except ImportError:
    lytk = midirenderer = None

# ============================================================================================================
# 1 Knobs: class Cfg
# ============================================================================================================


class UserError(ValueError):
    """Something the user can put right: main() prints the one line and exits with code 2."""


def need(condition, sentence):
    if not condition:
        raise UserError(sentence)


class Size(NamedTuple):
    """One row of a ladder: an architecture small enough to name in a word."""
    family: str  # "gpt" or "lstm"
    size: str  # its name within the family, about its number of parameters
    layers: int
    width: int  # model width d of a GPT, hidden size h of an LSTM
    heads: int = 1  # attention heads (GPT only)
    seeds: int = 1  # trainings, with seeds SEED, SEED + 1, ...; several where losses vary and cost little

    @property
    def name(self):
        return f"{self.family}_{self.size}"


class Study(NamedTuple):
    """What a study trains when the knobs leave it open."""
    tokens: int  # training characters per model
    batch_tokens: int  # characters per optimiser step
    seq_len: int  # characters per window
    ladder: tuple


# Attention heads are 32 wide or a little wider, 64 in the large models, 8 in the smoke study: 16 wide cost
# 1 to 4 % of the loss, and a third more time. The LSTM of each row is matched to the GPT of the same name in
# non-embedding parameters: 12 L d^2 against 8 L h^2.
STUDIES = {
    "smoke": Study(16_384, 1_024, 64, tuple(
        [Size("gpt", f"{d}w", 1, d, d // 8) for d in (8, 16, 24, 32)]
        + [Size("lstm", f"{h}w", 1, h) for h in (10, 20, 30, 39)])),
    "cpu": Study(1_200_000, 2_048, 256, (
        Size("gpt", "15K", 2, 24, 1, 5), Size("gpt", "25K", 2, 32, 1, 5), Size("gpt", "60K", 3, 40, 1),
        Size("gpt", "150K", 4, 56, 2), Size("gpt", "400K", 4, 92, 2), Size("gpt", "1M", 5, 128, 4),
        Size("lstm", "15K", 2, 29, 1, 3), Size("lstm", "25K", 2, 40, 1, 3), Size("lstm", "60K", 2, 60),
        Size("lstm", "150K", 2, 96), Size("lstm", "400K", 2, 160), Size("lstm", "1M", 2, 248))),
    "full": Study(100_000_000, 65_536, 1_024, (
        Size("gpt", "1M", 5, 128, 2), Size("gpt", "5M", 6, 256, 4), Size("gpt", "20M", 8, 448, 7),
        Size("gpt", "50M", 10, 640, 10), Size("gpt", "100M", 14, 768, 12),
        Size("lstm", "1M", 2, 256), Size("lstm", "5M", 2, 544), Size("lstm", "20M", 2, 1_104),
        Size("lstm", "50M", 2, 1_760))),
}


class KnobType(type):
    """Makes `Cfg.SEQLEN = 256` fail where it is written; `Cfg.SEQ_LEN = 256` changes later Cfg()."""
    def __setattr__(cls, name, value):
        super().__setattr__(name, checked_knob(cls, name, value))


class Cfg(metaclass=KnobType):
    """All knobs of the study. Edit them here, or `Cfg(SEQ_LEN=256)`, `Cfg.SEQ_LEN = 256`, `--SEQ_LEN 256`.

    A misspelt name or a value of another type raises UserError at once. Lower-case properties are derived
    from the knobs.
    """
    # --- data: set one of these; none of them: the folk tunes bundled with music21
    LMD_DOWNLOAD = ""  # full | matched | clean: fetch that part of the Lakh MIDI Dataset (1.8, 1.4, 0.2 GB)
    LMD_ZIP_PATH = ""  # a ZIP, tar or tar.gz of MIDI files, such as lmd_full.tar.gz
    USE_LOCAL_MIDI = False  # read the folder LOCAL_MIDI_ROOT in place instead of an archive
    LOCAL_MIDI_ROOT = ""  # a folder of MIDI files; it is never changed
    DATASET = ""  # thesession: ABC tunes of The Session; or the path of a tunes.csv or tunes.json like theirs
    MAX_MIDI_FILES = 0  # use at most so many files, chosen by a hash of their path; 0 = all
    # --- where things go
    DATA_ROOT = "data_lakh"  # everything made from the MIDI files
    MIDI_ROOT = ""  # extracted MIDI files; empty = DATA_ROOT/midi
    ABC_ROOT = ""  # converted ABC files; empty = DATA_ROOT/abc
    SAVE_DIR = "runs_lakh"  # checkpoints, figures, samples, report
    # --- conversion and tokens
    WORKERS = 0  # processes for work on files; 0 = one per core. In a torchrun shared among a machine's ranks
    CONVERT_TIMEOUT = 60.0  # seconds that one MIDI file may take before it is given up
    MAX_ABC_CHARS = 300_000  # a longer tune is rejected: a few loops would otherwise fill the corpus
    MIN_NOTES = 8  # a shorter tune is rejected
    VAL_FRAC = 0.0  # share of the characters for validation; 0 = 1 %, up to 10 % of a small corpus
    TEST_FRAC = 0.0  # share for the final test; 0 = as VAL_FRAC
    SPLIT_BY = "work"  # what stays on one side: work (all its versions) | file (leaks, as others do)
    EVAL_TOKENS = 2_000_000  # at most so many held-out characters, always the same, are behind a loss
    # --- study
    STUDY = "auto"  # smoke | cpu | full; auto = full on CUDA, else cpu
    MODELS = ()  # names ("gpt_1M", "lstm_1M") or rows ("gpt", "2M", 6, 160, 5); () = the study's ladder
    TRAIN_TOKENS_TARGET = 0  # training characters per model; 0 = the study's
    BATCH_TOKENS = 0  # characters per optimiser step; 0 = the study's
    SEQ_LEN = 0  # characters per window; 0 = the study's
    BUDGETS = (0.125, 0.25, 0.5, 1.0)  # shares of TRAIN_TOKENS_TARGET at which the loss is measured
    SEEDS = 1  # trainings per model at least, with seeds SEED, SEED + 1, ...; some of a study have more
    SEED = 1337  # everything random follows from it
    # --- optimiser
    LR = 0.01  # peak learning rate of the weight matrices (Muon)
    LR_ADAM = 0.01  # peak learning rate of all other weights (AdamW) at width 128, see make_optimizers
    BETAS = (0.9, 0.95)  # of AdamW
    WEIGHT_DECAY = 0.1  # decoupled, on the weight matrices
    CLIP_NORM = 1.0  # gradients are scaled down to this L2 norm
    WARMUP_FRAC = 0.02  # share of the steps in which the learning rate rises; in the last fifth it falls
    # --- machine
    DEVICE = "auto"  # cpu | cuda | auto; several GPUs: torchrun --nproc_per_node=4 LakhMIDI.py
    COMPILE = True  # torch.compile on CUDA
    MICRO_TOKENS = 0  # characters per forward pass, for memory; steps stay the same. 0 = by the model
    SAVE_EVERY_S = 60.0  # seconds between checkpoints of a model in training
    # --- evaluation
    SAMPLES = 0  # tunes of the best model that are judged, of each kind; 0 = 20 on a CPU, 500 on CUDA
    SHOWN = 4  # tunes of each kind in best_samples/, with sound and picture
    SAMPLE_CHARS = 0  # where a tune that goes on is cut at a bar line; 0 = 1,200, 4,000 on CUDA
    TEMPERATURE = 0.8  # of sampling
    BOOTSTRAP = 1_000  # draws behind the intervals of L(N, D) and of the metrics of music
    TOP_P = 0.95  # sample from the likeliest characters that hold this share of the probability

    def __init__(self, **knobs):
        given = {name: getattr(type(self), name) for name in knob_names(type(self))}
        given |= {name: checked_knob(type(self), name, value) for name, value in knobs.items()}
        vars(self).update(settled(given), given=given)
        vars(self).pop("source", None)

    def __setattr__(self, name, value):
        """Also settles anew what was left open: `cfg.STUDY = "smoke"` brings the study's SEQ_LEN."""
        self.__init__(**self.given | {name: value})

    @functools.cached_property
    def source(self):
        """What identifies the music of this study: looked at once, so that a run has one answer."""
        return source_id(self)

    @property
    def corpus(self):
        """The music of this study in words, once it has been read."""
        return read_json(self.DATA_ROOT / "midi_index.json", {}).get("corpus", "")

    def check(self):
        """Raises UserError for knobs that are each of the right type and make no sense together."""
        find_source(self)
        need(self.given["DATA_ROOT"] and self.given["SAVE_DIR"], "DATA_ROOT and SAVE_DIR each name a folder")
        need(self.DEVICE != "cuda" or (torch.cuda.is_available() and not gpu_fault()),
             gpu_fault() or "DEVICE is cuda, but torch sees no CUDA GPU; use cpu")
        for name, least in {"SEEDS": 1, "SEQ_LEN": 8, "BOOTSTRAP": 2, "EVAL_TOKENS": 2}.items():
            need(getattr(self, name) >= least, f"{name} must be at least {least}")
        need(self.BATCH_TOKENS % self.SEQ_LEN == 0,
             f"BATCH_TOKENS ({self.BATCH_TOKENS}) must be a multiple of SEQ_LEN ({self.SEQ_LEN})")
        need(self.VAL_FRAC + (self.TEST_FRAC or self.VAL_FRAC) <= 0.5,
             "VAL_FRAC + TEST_FRAC (0: as VAL_FRAC) must leave at least half of the data to train")
        need(0 < self.TOP_P <= 1 and self.CLIP_NORM > 0, "TOP_P must be in (0, 1], CLIP_NORM above 0")
        need({*map(type, self.BUDGETS + self.BETAS)} <= {int, float}, "BUDGETS and BETAS hold numbers")
        need(self.BUDGETS and min(self.BUDGETS) > 0 and max(self.BUDGETS) == 1,
             "BUDGETS are shares of the training tokens in (0, 1], the largest of them 1")
        need(all(low <= (1 - COOLDOWN) * high for low, high in itertools.pairwise(sorted(set(self.BUDGETS)))),
             f"each of BUDGETS must be at least {1 / (1 - COOLDOWN):g} times the one before")
        need(len(self.BETAS) == 2 and min(self.BETAS) >= 0 and max(self.BETAS) < 1,
             "BETAS are two numbers in [0, 1)")


CHOICES = {"DEVICE": ("auto", "cpu", "cuda"), "SPLIT_BY": ("work", "file"),
           "LMD_DOWNLOAD": ("", "full", "matched", "clean")}
ROOTS = ("MIDI_ROOT", "ABC_ROOT", "DATA_ROOT", "SAVE_DIR")


def knob_names(cls=Cfg):
    return [name for klass in reversed(cls.__mro__) for name in vars(klass) if name.isupper()]


def settled(given):
    """What a Cfg holds for the knobs as they were given: what was left open has its value, and what follows
    from them is there in lower case.
    """
    kept = read_json(Path(given["SAVE_DIR"], "manifests", "train.json"), {}).get("study", {})
    device, study = given["DEVICE"], given["STUDY"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if study == "auto":
        study = kept.get("STUDY", "full" if device == "cuda" else "cpu")
    need(study in STUDIES, f"STUDY is {study!r}; choose auto, {', '.join(STUDIES)}")
    linux = hasattr(os, "sched_getaffinity")  # which knows the cores that this process may use
    defaults = {
        "TRAIN_TOKENS_TARGET": STUDIES[study].tokens,
        "BATCH_TOKENS": STUDIES[study].batch_tokens,
        "SEQ_LEN": STUDIES[study].seq_len,
        "SAMPLES": kept.get("SAMPLES", 500 if device == "cuda" else 20),
        "SAMPLE_CHARS": kept.get("SAMPLE_CHARS", 4_000 if device == "cuda" else 1_200),
        "WORKERS": len(os.sched_getaffinity(0)) if linux else os.cpu_count(),
        "MIDI_ROOT": Path(given["DATA_ROOT"], "midi"),
        "ABC_ROOT": Path(given["DATA_ROOT"], "abc")}
    knobs = {name: value or defaults.get(name, value) for name, value in given.items()}
    knobs |= {"DEVICE": device, "STUDY": study, "MODELS": ladder(given["MODELS"], study)}
    if given["USE_LOCAL_MIDI"]:
        knobs["MIDI_ROOT"] = given["LOCAL_MIDI_ROOT"]
    knobs |= {name: Path(knobs[name]) for name in ROOTS}
    by_device = {name: knobs[name] for name in ("STUDY", "SAMPLES", "SAMPLE_CHARS")
                 if given[name] in ("auto", 0)}  # SAVE_DIR keeps it, and a laptop goes on with a GPU's
    return knobs | {
        "by_device": by_device,
        "tokens_root": knobs["DATA_ROOT"] / "tokens",
        "batch": knobs["BATCH_TOKENS"] // knobs["SEQ_LEN"]}  # windows per optimiser step


def ladder(models, study):
    """The models to train, small to large within each family, as a tuple of Size; none named: the study's."""
    studies = [*reversed(STUDIES.values()), STUDIES[study]]  # a name may stand in two
    known = {size.name: size for other in studies for size in other.ladder}
    sizes = []
    for model in models or STUDIES[study].ladder:
        row = known.get(model, ()) if isinstance(model, str) else model
        types = [*map(type, row)] if isinstance(row, (tuple, list)) else []
        named = types[:2] == [str, str] and set(types[2:]) == {int} and 4 <= len(types) <= 6
        need(named and row[0] in FAMILIES,
             f"MODELS: {model!r} is none of {', '.join(known)} and no row (family, size, layers, width, "
             f"heads of a GPT, trainings); families: {', '.join(FAMILIES)}")
        size = Size(*row)
        whole = min(size[2:]) > 0 and size.width % size.heads == 0
        need(whole and (FAMILIES[size.family].model.recurrent or size.width // size.heads % 2 == 0),
             f"MODELS: {model!r}: the width of a GPT is an even multiple of its heads")
        sizes.append(size)
    need(len({size.name for size in sizes}) == len(sizes), "MODELS holds the same model twice")
    return tuple(sizes)


def checked_knob(cls, name, value):
    """`value` as the type of the knob `name`; UserError if there is no such knob or it can't be that."""
    if name not in knob_names(cls):
        near = difflib.get_close_matches(name.upper(), knob_names(cls), 1)
        raise UserError(f"Cfg has no knob {name}; " + (f"did you mean {near[0]}?" if near else "see --help"))
    kind, options = type(getattr(cls, name)), CHOICES.get(name)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, np.generic):
        value = value.item()
    if (kind, type(value)) in ((float, int), (tuple, list)):
        value = kind(value)
    wanted = "True or False" if kind is bool else f"of type {kind.__name__}"
    need(type(value) is kind, f"{name} must be {wanted}, not {value!r}")
    need(kind not in (int, float) or 0 <= value < math.inf,
         f"{name} must be a finite number >= 0, not {value}")
    need(not options or value in options,
         f"{name} is {value!r}; choose {', '.join(filter(None, options or ()))}")
    return value


def knob_help():
    """{knob: its comment in class Cfg}, so that a knob is described in one place."""
    source = Path(__file__).read_text("utf-8").partition("\nclass Cfg(")[2].partition("def __init__")[0]
    return dict(re.findall(r"^    ([A-Z_]+) = .+?  # (.+)$", source, re.M))


# ============================================================================================================
# 2 Plumbing: files that are whole or absent, stages that know whether they are up to date, one run per folder
#
# A stage reads what earlier stages wrote and writes its outputs, then a manifest of both by what they hold.
# Names, dates and places are no part of it: a folder that is copied, moved or touched stays up to date, one
# changed byte does not. Contents are hashed once and remembered by inode, time of change and size, which
# makes --status on 178,000 files about as fast as listing them. What a killed run leaves half done has no
# manifest, and is done again or gone on with.
# ============================================================================================================


@contextlib.contextmanager
def told_for(path):
    """Makes an error of the file system one line that names a file, or `path` where the error has none."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        reason = error.strerror or error
        raise UserError(f"{error.filename or path}: {reason}; see to that and run again") from error


@contextlib.contextmanager
def atomic_path(path):
    """Yields a path beside `path` to write to, which takes its name when the block ends without an error."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with told_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path, text):
    with atomic_path(path) as partial:  # a name of a file may hold bytes that are no UTF-8
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1, allow_nan=False, default=json_default) + "\n")


def json_default(value):
    """numpy scalars and arrays, and paths, as JSON knows them."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def read_json(path, missing=None):
    """The content of a JSON file, or `missing` where there is none, or none of the type of `missing`."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return missing
    return data if missing is None or type(data) is type(missing) else missing


def read_jsonl(path):
    """The rows of a file one by one, but for a last line that was cut off."""
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.endswith("\n"))


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, default=json_default) + "\n" for row in rows))


def digest(data):
    """16 hexadecimal digits that change when anything in `data` (JSON-able) does."""
    text = json.dumps(data, sort_keys=True, default=json_default)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


say = tqdm.write  # a line for people that does not tear a progress bar apart


def progress(iterable=None, desc=None, total=None, unit="it", **options):
    """A tqdm bar that leaves a line now and then in a log file and moves freely before a person."""
    notebook = "ipykernel" in sys.modules  # where what goes to stderr looks like an error
    watched = sys.stderr.isatty() or notebook
    return tqdm(iterable, desc=desc, total=total, unit=unit, mininterval=0.2 if watched else 15, delay=1,
                leave=False, file=sys.stdout if notebook else None, **options)


def files_below(folder):
    """Yields (path relative to `folder`, os.stat_result, None for what is no file), a folder at a time.

    Links are followed and each folder is entered once. What desktops leave behind is left out.
    """
    entered, todo = set(), [""]
    while todo:
        base, inner = todo.pop(), []
        here = os.stat(os.path.join(folder, base))
        if (here.st_dev, here.st_ino) in entered:
            continue
        entered.add((here.st_dev, here.st_ino))
        with os.scandir(os.path.join(folder, base)) as entries:
            for entry in entries:
                if entry.is_dir():
                    inner.append(f"{base}{entry.name}/")
                elif entry.name not in (".DS_Store", "Thumbs.db", "desktop.ini"):
                    yield base + entry.name, entry.stat() if entry.is_file() else None
        todo += sorted(inner, reverse=True)


def content(path, memory, endings=""):
    """16 digits for what a file, or a folder in its files of some `endings`, holds; None if nothing is there.

    `memory` is the folder whose hashed.json remembers them.
    """
    if not os.path.exists(path):
        return None
    names, numbers = [], []
    for name, facts in files_below(path) if os.path.isdir(path) else [("", os.stat(path))]:
        if facts and (not name or name.lower().endswith(endings)):
            names.append(name)
            numbers += (facts.st_ino, facts.st_ctime_ns, facts.st_size)
    listed = "\0".join(names).encode("utf-8", "surrogatepass")
    key = hashlib.sha256(listed + array.array("Q", numbers).tobytes()).hexdigest()[:16]

    known = read_json(Path(memory, "hashed.json"), {})
    if key not in known:
        sums = [(name, file_digest(Path(path, name))[:16])
                for name in progress(sorted(names), "looking", unit="file")]
        known = dict([*known.items()][-500:])
        known[key] = digest(sums) if os.path.isdir(path) else sums[0][1]
        with contextlib.suppress(UserError):  # in a folder that is only read they are hashed each time
            write_json(Path(memory, "hashed.json"), known)
    return known[key]


def file_digest(path):
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def owned(cfg, root, shared=False):
    """Keeps a root folder for this run, from all others or (`shared`) from those that would write there.

    The system takes the lock back when this process ends, however it does. Its file names the process that
    keeps the folder for itself. Raises UserError if another run has it.
    """
    folder, hint = getattr(cfg, root), f"or set {root} to another folder"
    if shared and folder.exists() and not os.access(folder, os.W_OK):
        yield  # nobody writes there
        return
    with told_for(folder):
        Path(folder, "manifests").mkdir(parents=True, exist_ok=True)
        file = open(folder / "manifests" / f"{root}.lock", "a+b", buffering=0)
    with file:
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=file.close)  # or a worker that outlives us would keep the lock
        kind = portalocker.LOCK_SH if shared else portalocker.LOCK_EX
        try:
            portalocker.lock(file, kind | portalocker.LOCK_NB)
        except portalocker.LockException as error:
            need(isinstance(error, portalocker.AlreadyLocked), f"{folder} can't be locked ({error}); {hint}")
            file.seek(0)
            holder = file.read().decode() or "runs that read it"
            raise UserError(f"{folder} is in use by {holder}: wait for their end, {hint}") from error
        with told_for(file.name):
            file.truncate(0)
            if not shared:
                since = time.strftime("%Y-%m-%d %H:%M")
                file.write(f"process {os.getpid()} on {platform.node()} since {since}".encode())
        yield


@contextlib.contextmanager
def workers(cfg, begin=None, *what):
    """A pool of WORKERS processes, each of which calls begin(*what) first. An exception here, such as that of
    Ctrl-C, ends them at once."""
    with ProcessPool(cfg.WORKERS, initializer=start_worker, initargs=(begin, *what)) as pool:
        try:
            yield pool
        except BaseException:
            pool.stop()
            raise


def start_worker(begin, *what):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if begin:
        begin(*what)


class Stage:
    """A function of files: `body(cfg)` writes them and returns their paths. Skipped while it is up to date.

    Up to date means: the manifest names the recipe of today (`version`, the values of `knobs`, what the
    outputs of the stages in `reads` hold), and every output holds what is recorded there. Raise `version`
    when the code changes what it writes. Called with (cfg, force=False) it returns whether there was work to
    do. Among several processes it is rank 0 that does it, or `by_all` of them.
    """

    def __init__(self, body, version, knobs, reads=(), root="DATA_ROOT", by_all=False):
        functools.update_wrapper(self, body)
        self.body, self.version, self.knobs = body, version, knobs.split()
        self.reads, self.root, self.by_all = reads, root, by_all

    def __call__(self, cfg, force=False):
        return carry_out([self], cfg, force)

    def folder(self, cfg):
        return getattr(cfg, self.root) / "manifests"

    def manifest(self, cfg):
        """recipe, study, goes_on, outputs ({path: content}, None until it is finished); {} without one."""
        found = read_json(self.folder(cfg) / f"{self.__name__}.json", {})
        return found if "outputs" in found and found["recipe"]["stage"] == self.__name__ else {}

    def recipe(self, cfg):
        recipe = {"stage": self.__name__, "version": self.version,
                  "knobs": {knob: getattr(cfg, knob) for knob in self.knobs},
                  "inputs": {one.__name__: one.identity(cfg) for one in self.reads}}
        return json.loads(json.dumps(recipe, default=json_default))  # as the manifest will hold it

    def identity(self, cfg):
        """16 digits for what the outputs held when they were written, pictures left out."""
        outputs = self.manifest(cfg).get("outputs") or {}
        return digest({path: held for path, held in outputs.items() if not path.endswith(".png")})

    def status(self, cfg, outputs=True):
        """"up to date", or why not, where `outputs` need not be looked at as far as the recipes say."""
        found, today = self.manifest(cfg), self.recipe(cfg)
        if not found:
            return "not run"
        then = found["recipe"]
        if changed := [knob for knob, value in today["knobs"].items() if then["knobs"].get(knob) != value]:
            return f"stale: {', '.join(changed)} changed"
        if then["version"] != self.version:
            return "stale: newer code"
        if then != today or any(one.status(cfg, outputs=False) != "up to date" for one in self.reads):
            return "stale: an earlier stage changed"
        if not found["outputs"]:
            return "not finished"
        for place, held in found["outputs"].items() if outputs else ():
            root, *rest = place.split("/")
            path = Path(getattr(cfg, root), *rest)
            if content(path, self.folder(cfg)) != held:
                return f"stale: {path} {'changed' if path.exists() else 'is gone'}"
        return "up to date"

    def work(self, cfg, force):
        """Does what is left to do, in a folder that this run owns; returns whether there was anything."""
        name, first = self.__name__, ranks()[0] == 0
        for one in self.reads:
            need((state := one.status(cfg)) == "up to date",
                 f"{name} needs {one.__name__}, which is {state}; run with --to {name}")
        done = not force and self.status(cfg) == "up to date"
        wait_for_ranks()  # until all have looked; then one of them may write
        if done:
            if first:
                say(f"{name:9s} up to date")
            return False

        before, path, began = self.manifest(cfg), self.folder(cfg) / f"{name}.json", time.time()
        facts = {"recipe": self.recipe(cfg), "study": cfg.by_device}
        facts["goes_on"] = not force and before.get("recipe") == facts["recipe"] and not before["outputs"]
        if first:
            write_json(path, facts | {"outputs": None})
        with told_for(getattr(cfg, self.root)):
            outputs = self.body(cfg) if first or self.by_all else []
        if first:
            held = {}
            for output in outputs:  # named as ABC_ROOT/report.jsonl, wherever the root folders are
                root = next(root for root in ROOTS if output.is_relative_to(getattr(cfg, root)))
                place = Path(root, output.relative_to(getattr(cfg, root))).as_posix()
                held[place] = content(output, self.folder(cfg))
            write_json(path, facts | {"outputs": held, "seconds": round(time.time() - began, 1)})
            say(f"{name:9s} done in {time.time() - began:.0f} s")
        wait_for_ranks()
        return True


def stage(**facts):
    return lambda body: Stage(body, **facts)


def check_guard():
    """Raises UserError if worker processes, which may begin with the user's script, would start anew."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    script = getattr(sys.modules["__main__"], "__file__", None)
    guard = re.compile("^if __name__ == ['\"]__main__['\"]", re.M)
    need(method == "fork" or not script or guard.search(Path(script).read_text("utf-8", "replace")),
         f"in {script} put what runs the study below the line: if __name__ == \"__main__\":")


def carry_out(stages, cfg, force=False):
    """Does what is left of some stages, in order, as the only run that writes to their folders; returns
    whether there was anything. What is only read is shared with other runs.
    """
    cfg = type(cfg)(**cfg.given)  # which has not looked at its source yet
    cfg.check()
    check_guard()
    mine = stages if ranks()[0] == 0 else []  # the locks are rank 0's
    roots = {one.root for one in mine if force or one.status(cfg) != "up to date"}
    worked = False
    with owned(cfg, "SAVE_DIR") if "SAVE_DIR" in roots else contextlib.nullcontext():
        for root, group in itertools.groupby(stages, lambda one: one.root):
            alone = root == "DATA_ROOT" and root in roots
            with owned(cfg, "DATA_ROOT", shared=not alone) if roots else contextlib.nullcontext():
                worked |= any([one.work(cfg, force) for one in group])
    return worked


# ============================================================================================================
# 3 Acquire: ZIP, tar, folder, download or bundled corpus -> data_lakh/midi/, midi_index.json
# ============================================================================================================
# Whatever the source is, it is first a list of members: (name, why it is not to be read or "", what returns
# its bytes or raises Skip). Of these MAX_MIDI_FILES are chosen by their names and then read: the order of an
# archive decides nothing. It may come from anywhere: nothing is written outside MIDI_ROOT, no link or device
# is made, and what would swell beyond reason is refused.

LAKH_URL = "http://hog.ee.columbia.edu/craffel/lmd/"  # https is not served there, hence the checksums
LAKH = {  # https://colinraffel.com/projects/lmd/, in bytes: 1,768,163,879, 1,407,072,670 and 234,283,029
    "full": ("lmd_full.tar.gz", "6fcfe2ac49ca08f3f214cec86ab138d4fc4dabcd7f27f491a838dae6db45a12b"),
    "matched": ("lmd_matched.tar.gz", "621ff830aed771f469e5bfa13dc12a33c6ed69090adeda63d0b5c47783af0191"),
    "clean": ("clean_midi.tar.gz", "de1bb64cbc0cf35545a05b5c3e786aa6890cfa144edffc4b827ff41bf8c33dc5"),
}
# The dump of January 2020, under the plain Open Database License. Since October 2025 the licence forbids use
# with large language models: whether DATASET may name a newer dump for such a study is for its user to judge.
THESESSION_URL = ("https://raw.githubusercontent.com/adactio/TheSession-data/"
                  "6866ebe1be5bd5420fd9dc0e7d0424e4a014d74e/csv/tunes.csv")
FOLK = "the folk tunes bundled with music21"  # these books, in the public domain:
FOLK_BOOKS = ("airdsAirs", "essenFolksong", "oneills1850", "ryansMammoth")
MIDI_SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
# What no honest archive of MIDI files comes near (Lakh has 178,561 of them):
MAX_MEMBERS = 1_000_000
MAX_FILE_BYTES = 16 * 2**20
MAX_RATIO = 200  # unpacked to packed, of the whole archive
FREE_RATIO_BYTES = 256 * 2**20  # a few equal files pack so well that small archives may have any ratio
SPARE_DISK_BYTES = 256 * 2**20


class Skip(Exception):
    """Why one file is left out; its text is the reason that is counted."""


def find_source(cfg):
    """(the music of the study in words, what reads it, its path or None). Raises UserError if there is none.

    A reader takes (path, cfg), puts the files below MIDI_ROOT and returns the counts.
    """
    kinds = {"LMD_DOWNLOAD": (f"the Lakh MIDI Dataset ({cfg.LMD_DOWNLOAD})", read_archive, ""),
             "LMD_ZIP_PATH": (Path(cfg.LMD_ZIP_PATH).name, read_archive, cfg.LMD_ZIP_PATH),
             "USE_LOCAL_MIDI": (f"folder {cfg.LOCAL_MIDI_ROOT}", index_folder, cfg.LOCAL_MIDI_ROOT),
             "DATASET": (f"The Session ({cfg.DATASET})", read_dump, cfg.DATASET)}
    chosen = [knob for knob in kinds if getattr(cfg, knob)]
    need(len(chosen) <= 1, f"{' and '.join(chosen)} each name a source of music; set only one of them")
    need(cfg.USE_LOCAL_MIDI or not cfg.LOCAL_MIDI_ROOT,
         "LOCAL_MIDI_ROOT is read with USE_LOCAL_MIDI only: add --USE_LOCAL_MIDI True, or leave it out")
    if not chosen:
        return FOLK, lambda _, cfg: write_tunes(folk_tunes(), plain_text, cfg), None
    words, reader, given = kinds[chosen[0]]
    if cfg.LMD_DOWNLOAD or cfg.DATASET == "thesession":
        return words, reader, None
    path, index = Path(given), read_json(cfg.DATA_ROOT / "midi_index.json", {})
    if path.exists() or index.get("name") != path.absolute().name:  # else it was read to its end
        need(not cfg.USE_LOCAL_MIDI or (given and path.is_dir()), f"LOCAL_MIDI_ROOT is {given!r}, no folder")
        meant = difflib.get_close_matches(cfg.DATASET, ["thesession"])
        hint = "did you mean thesession?" if meant else "a folder is read by USE_LOCAL_MIDI, LOCAL_MIDI_ROOT"
        need(cfg.USE_LOCAL_MIDI or path.is_file(), f"{chosen[0]}: there is no file {path}; {hint}")
    return words, reader, path


def source_id(cfg):
    """A dict that tells the source from any other. Raises UserError if there is none."""
    path, index = find_source(cfg)[2], read_json(cfg.DATA_ROOT / "midi_index.json", {})
    if cfg.LMD_DOWNLOAD:
        return {"content": LAKH[cfg.LMD_DOWNLOAD][1][:16]}
    if cfg.DATASET == "thesession":
        return {"dump": THESESSION_URL}
    if path and path.exists():
        return {"content": content(path, cfg.DATA_ROOT / "manifests", MIDI_SUFFIXES)}
    if path:
        say(f"note      {path} is gone: whether it is what was read from it can't be checked any more")
    elif importlib.util.find_spec("music21"):
        return {package: importlib.metadata.version(package) for package in ("music21", "symusic")}
    need("source" in index, f"music21 is missing, which brings {FOLK}: install requirements.txt")
    return index["source"]


# --- names

def is_midi(name):
    return name.lower().endswith(MIDI_SUFFIXES)


def name_fault(name):
    """Why a file of that name is not read, or ""."""
    if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")):
        return "an archive in the source; unpack it and read the folder"
    if not is_midi(name):
        return f"not {', '.join(MIDI_SUFFIXES)}"
    if "/._" in f"/{name}":
        return "resource fork of macOS"  # which packs ._a.mid with every a.mid
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in re.split(r"[/\\]", name))
    return "name too long" if len(name) > 400 or longest > 230 else ""  # of 255 bytes; suffixes are to come


def size_fault(size):
    """Why a file of that many bytes is not read, or ""."""
    return "empty" if not size else f"larger than {MAX_FILE_BYTES >> 20} MiB" if size > MAX_FILE_BYTES else ""


def choose(members, limit):
    """(the members to use, in their order, a Counter of why others are not); of more than `limit` (0: no
    limit) those whose names have the lowest hashes, an order of neither the archive nor the file system.
    """
    faults = [name_fault(name) or fault for name, fault, _ in members]
    skipped = Counter(filter(None, faults))
    usable = [member for member, fault in zip(members, faults, strict=True) if not fault]
    if limit and len(usable) > limit:
        skipped["over MAX_MIDI_FILES"] = len(usable) - limit
        ranks = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name, _, _ in usable]
        lowest = sorted(range(len(usable)), key=ranks.__getitem__)[:limit]
        usable = [usable[place] for place in sorted(lowest)]
    return usable, skipped


UNSAFE = re.compile(r"[/\\]|.:|(.*[/\\])?\.\.[/\\]", re.S)  # leads out of the folder
# Reserved and control characters, bytes that are no UTF-8 (to tarfile: surrogates), a final dot or blank.
UNPORTABLE = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]|[. ]\Z')


def portable_path(name, taken):
    """A relative path for every file system, unlike all in the set `taken` even where case does not count."""
    parts = [UNPORTABLE.sub("_", part) for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    folders = [folder + "_" * is_midi(folder) for folder in parts[:-1]]  # a.mid/b.mid must not bar a.mid
    stem, suffix = os.path.splitext("/".join([*folders, parts[-1]]))
    path, number = stem + suffix, len(taken)
    while (key := unicodedata.normalize("NFC", path).casefold()) in taken:
        path, number = f"{stem}-{number}{suffix}", number + 1
    taken.add(key)
    return path


# --- archives

# What reading one may raise.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError,
           NotImplementedError, OverflowError, RecursionError, UnicodeError)


class ShortHeaders(tarfile.TarInfo):
    """tarfile reads a header, such as a long name, whatever its size."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.type not in tarfile.REGULAR_TYPES and info.size > 2**20:
            raise tarfile.ReadError("a header of more than 1 MiB")
        return info


def check_bomb(path, unpacked, members):
    limit = FREE_RATIO_BYTES + MAX_RATIO * os.path.getsize(path)
    need(unpacked <= limit, f"{path} unpacks to more than {limit:,} bytes: refused as made to do harm")
    need(members <= MAX_MEMBERS, f"{path} holds more than {MAX_MEMBERS:,} files: refused as made to do harm")


def tar_members(path, tar):
    """Reads the archive to its end, which is where the checksum stands; a cut one must not pass for whole."""
    members, stream = [], tar.fileobj
    for info in progress(tar, "looking", unit="file"):
        check_bomb(path, tar.offset, len(members))
        fault = size_fault(info.size) if info.isreg() and not info.issparse() else "link or device"
        if not info.isdir():
            members.append((info.name, fault, lambda info=info: tar.extractfile(info).read()))
    stream.seek(tar.offset)
    if stream.read(tarfile.BLOCKSIZE).count(0) != tarfile.BLOCKSIZE:  # tarfile would take this for the end
        raise tarfile.ReadError("no end")
    while stream.read(2**20):
        check_bomb(path, stream.tell(), len(members))
    return members


def zip_members(path, archive):
    infos = [info for info in archive.infolist() if not info.is_dir()]
    check_bomb(path, sum(info.file_size for info in infos), len(infos))  # zipfile reads no more than declared
    bounded = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return [(info.filename, "encrypted" if info.flag_bits & 1 else
             "packed by another method than deflate" if info.compress_type not in bounded else
             size_fault(info.file_size), functools.partial(archive.read, info)) for info in infos]


def read_archive(path, cfg):
    """Writes the music of an archive, if none is named of Lakh's, and returns the counts. Raises UserError if
    it can't be read to its end.
    """
    if not path:
        name, sha256 = LAKH[cfg.LMD_DOWNLOAD]
        path = download(LAKH_URL + name, cfg.DATA_ROOT / "downloads" / name, sha256)
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) in (b"PK\3\4", b"PK\5\6")
        with zipfile.ZipFile(path) if zipped else tarfile.open(path, tarinfo=ShortHeaders) as archive:
            return write_files((zip_members if zipped else tar_members)(path, archive), cfg)
    except DAMAGED as error:
        reason = str(error).partition(":\n")[0]
        raise UserError(f"{path} is no ZIP or tar archive, or is cut off or damaged ({reason})") from error


# --- ABC from elsewhere: the bundled books, The Session, a tune that a user brings
#
# abc2midi turns it into MIDI, and the converter below that into our notation. But it performs: ornaments,
# hornpipes and chord names add what no one wrote (8 % of the bundled tunes change); JUNK takes them out. And
# it loses bar lines: a pick-up stands at tick 0 (68 % of the tunes), changes of metre come too early or are
# not set back in repeats. Only tempi come in time: one before each bar tells which was played when.

# (No pattern may take more than linear time: [^][] and {0,20} where * would do.)
KEPT = (r"(?:[KLMQV]:(?![|:]).*\n|P: ?(?:[A-Z]\d?[. ]*)+(?:%.*)?\n"  # lines that concern the notes
        r"|%%MIDI (?:program|channel|r?transpose|c|voice|drummap|nobarlines)\b.*\n)")
JUNK = re.compile(
    rf"(^{KEPT}|\[[KLMPQV]:[^][\n]*\])"  # stays; all below goes
    r"|^(?:[H-Zh-z+]:(?![|:])|[A-Ga-g]:(?=[^|:\n]*$)|%).*\n|\[[A-Za-z]:[^][\n]*\]"  # other fields
    r"|%.*|\"[^\"\n]*\"?|\{[^}\n]*\}?"  # comments, chord names, grace notes
    r"|!(?:[^\s|!]{0,20}[h-y.<>()][^\s|!]{0,20}|f+|\d)!|\+[a-z.]{0,20}[h-wy][a-z.]{0,20}\+"  # !trill!
    r"|[~.`\\$*!@;yH-WYh-w]", re.M)  # other ornaments, ! as a line break
SIGN = re.compile(  # a field, or a bar line with the number of its ending; between them is music
    rf"(^{KEPT}|\[[A-Z]:[^][\n]*\]"
    r"|(?:\[?\|[|:\]]*|:{1,4}\|[|:\]]*|(?<!\(\d)::)(?: ?\[?\d+(?:[,-]\d+)*)?|\[\d+(?:[,-]\d+)*)", re.M)
NO_NOTES = re.compile(  # a second, plainer opinion of what is no note
    r"^(?:[A-Za-z+]:(?![|:])|%).*|\"[^\"\n]*\"|\{[^{}\n]*\}|\[[A-Za-z]:[^][\n]*\]|%.*"
    r"|![^\s|!]{0,20}[h-y.][^\s|!]{0,20}!", re.M)
TAG = re.compile(  # HTML, but not the broken rhythm of a<b c>d
    r"<(?:!|/ ?\w|(?:br|hr|p|i|u|em|tt|pre|div|span|font|strong|html|head|body|table|tr|td)\b"
    r"|\w{1,9} [^<>|]*= ?[\"'])[^<>]*>\n?|^%%begin.*\n(?:(?!%%).*\n)*", re.I | re.M)
KEY = "[A-G][#b]?(?: ?(?:m|maj|min|dor|mix|phr|lyd|loc|aeo|ion)[a-z]*)?"  # of The Session: Gmajor
SHARED_LINE = re.compile(rf"^([KLM]: ?(?:\d+/\d+|C\|?|{KEY})) (?=.*\|)", re.M | re.I)  # K:G |:GABc|
QUOTES = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")  # as text programs have them
QUARTER = 480  # abc2midi's ticks
FIRST_MARK = 1_000  # quarter notes a minute in the mark of the first bar, one more in each that follows
MAX_BARS = 6_000  # beyond that marks can't be told apart: MIDI has tempi in microseconds


def plain_text(data):
    """Text, or bytes of it, without HTML and control characters, with each field on a line of its own."""
    if isinstance(data, bytes):
        data = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
    text = "\n".join([*re.sub("[ \t]+|\\\\r", " ", data).replace("\\n", "\n").splitlines(), ""])
    text = "".join(char for char in text if char == "\n" or char.isprintable())
    for _ in range(2):  # &amp;quot; happens. Without a semicolon it is music: &deg, a voice
        text = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text)
    text = TAG.sub("\n", text.translate(QUOTES))
    text = re.sub(r"^[A-Z]:.* K:.*", lambda line: re.sub(" (?=[A-Z]:)", "\n", line[0]), text, flags=re.M)
    return SHARED_LINE.sub(r"\1\n", text)


def metre_of(field):
    """'M:6/8', '[M:2+3/8]', 'M:C|' ... -> (numerator, denominator), (0, 4) for a free metre."""
    field = field[:80].replace("C|", "2/2").replace("C", "4/4")
    found = re.search(r"(\d[\d +]*)\)? */ *(\d+)", field)
    num, den = (sum(map(int, re.findall(r"\d+", found[1]))), int(found[2])) if found else (0, 4)
    return (num, den) if num < 100 and den in UNITS else (0, 4)


def count_notes(music):
    """The notes in some ABC, tied ones counted once."""
    music = NO_NOTES.sub("", music)
    tied = "".join(re.findall(r"(\[[^][|\n]*\]|[A-Ga-g])[,'\d/]*\)?\s?-", music))
    return len(re.findall("[A-Ga-g]", music)) - len(re.findall("[A-Ga-g]", tied))


def mark_bars(text):
    """Clean ABC -> (the same with a tempo of its own before each bar and at the end, the bars as they are
    written). The `seam` of a bar: it stands behind a repeat sign, a double bar or the beginning of an ending.
    """
    out, bars = ["X:1\n%%MIDI chordattack 0\n"], []
    metre, seam, ended = (4, 4), True, True
    for i, token in enumerate(SIGN.split(text)):
        letter = token.lstrip("[")[:1]
        if i % 2 == 0:
            if ended and re.search("[A-Ga-gxzXZ]", token):
                out.append(f" [Q:1/4={FIRST_MARK + len(bars)}]")
                ticks = metre[0] * 4 * QUARTER // metre[1]
                bars.append(SimpleNamespace(metre=metre, ticks=ticks, seam=seam, notes=0, turns=0))
                seam = ended = False
            if bars:
                bars[-1].notes += count_notes(token)
        elif letter == "M":
            metre = metre_of(token)
        elif letter not in "KLPQ%":  # a voice or a bar line
            ended = True
            seam = seam or (letter != "V" and token != "|")
        out.append(token)
    out.append(f" [Q:1/4={FIRST_MARK + len(bars)}]\n")
    return "".join(out), bars


def played_metre(bar, length, after):
    """The metre of a bar that was played for `length` ticks, the next one for `after` (0: there is none)."""
    silent = bar.ticks and not bar.notes and length % bar.ticks == 0  # Z4: four bars
    short = max(length, after) < 1.5 * QUARTER or (not after and length < bar.ticks)
    if bar.ticks and (silent or short):  # the converter has no metre for several short bars in a row
        return bar.metre
    for den in (bar.metre[1], 4, 8, 16, 32):
        num, left = divmod(length * den, 4 * QUARTER)
        if not left and 0 < length <= 16 * QUARTER:
            return num, den
    return bar.metre[0] or 4, bar.metre[1]


def with_bars(score, played):
    """What abc2midi made of marked ABC, [(tick, bar)] as played -> bytes of a MIDI file with the tune's own
    metres, and a rest before its pick-up. A short bar before a seam and the pick-up behind it are one bar.
    """
    bars, origin = [], played[0][0]  # bars: [start, length, bar]
    end = max(score.end(), score.tempos[-1].time)
    for (start, bar), (stop, _) in itertools.pairwise([*played, (end, None)]):
        length, before = stop - start, bars[-1] if bars else None
        if before and bar.seam and before[1] < before[2].ticks == before[1] + length:
            before[1] += length
        else:
            bars.append([start, length, bar])
    second = bars[1 % len(bars)][1]
    rest = max(0, min(second, bars[0][2].ticks or second) - bars[0][1])
    bars[0][0], bars[0][1] = origin - rest, bars[0][1] + rest

    tempos = [(change.time and change.time + rest - origin, round(change.qpm, 2)) for change in score.tempos]
    score = score.shift_time(rest - 1)  # abc2midi begins notes a tick late
    for changes in (score.key_signatures, score.time_signatures, score.tempos):
        changes.clear()
    score.tempos.extend([symusic.Tempo(tick, qpm) for tick, qpm in tempos if qpm < FIRST_MARK])
    metre = None
    for (start, length, bar), (_, after, _) in itertools.pairwise([*bars, (0, 0, None)]):
        before, metre = metre, played_metre(bar, length, after)
        if metre != before:
            score.time_signatures.append(symusic.TimeSignature(start + rest - origin, *metre))
    return score.dumps_midi()


def run_abc2midi(abc, timeout_s=20):
    """Bytes of one tune (books crash abc2midi) -> (those of a MIDI file, what it said). Raises Skip."""
    program = os.environ["SYMUSIC_ABC2MIDI"]  # which symusic brings
    with tempfile.TemporaryDirectory() as folder:
        midi = Path(folder, "tune.mid")
        try:
            done = subprocess.run([program, "-", "-o", midi], input=abc, timeout=timeout_s,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise Skip("abc2midi timed out") from None
        if done.returncode or not midi.exists():
            raise Skip("abc2midi failed")
        return midi.read_bytes(), done.stdout.decode("utf-8", "replace")


def foreign_abc_to_midi(text):
    """A tune in anyone's ABC -> bytes of a MIDI file: its notes as they are written, its bars as they are
    played. Raises Skip.
    """
    head, *rest = re.split(r"^(K:.*\n)\s*", plain_text(text), maxsplit=1, flags=re.M)
    if not rest:
        raise Skip("no K: field")
    music = re.split(r"\n\s*\n", rest[1], maxsplit=1)[0] + "\n"  # an empty line ends a tune
    fields = "".join(re.findall(f"^{KEPT}", head, re.M)) + rest[0]
    marked, bars = mark_bars(fields + re.sub(r"\n\s+", "\n", JUNK.sub(r"\1", music)))
    notes = sum(bar.notes for bar in bars)
    if not notes or len(bars) > MAX_BARS:
        raise Skip(f"more than {MAX_BARS:,} bars" if notes else "no music")

    score = symusic.Score.from_midi(run_abc2midi(marked.encode())[0])
    marks = {tempo.time: 60_000_000 // max(1, tempo.mspq) - FIRST_MARK for tempo in score.tempos}
    played = [(tick, bars[mark]) for tick, mark in sorted(marks.items()) if 0 <= mark < len(bars)]
    for _, bar in played:
        bar.turns += 1
    expected = sum(bar.notes * max(1, bar.turns) for bar in bars)
    if not played or score.note_num() < 0.9 * expected * count_notes(music) / notes:
        raise Skip("notes lost")
    return with_bars(score, played)


def read_foreign(path):
    """Bytes of a MIDI file for what a user brings: a MIDI file as it is, of an ABC file the first tune."""
    path, kinds = Path(path), (".abc", *MIDI_SUFFIXES)
    need(path.suffix.lower() in kinds, f"{path} can't be read; {', '.join(kinds)} can")
    need(path.is_file(), f"there is no file {path}")
    need(path.stat().st_size <= MAX_FILE_BYTES, f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    if path.suffix.lower() != ".abc":
        return path.read_bytes()
    parts = re.split("^(?=X:)", plain_text(path.read_bytes()), flags=re.M)
    tunes = [part for part in parts if re.search("^K:", part, re.M)]
    if len(tunes) > 1:
        say(f"prompt    {path} holds {len(tunes)} tunes; the first one is taken")
    try:
        return foreign_abc_to_midi("".join(tunes[:1]))
    except Skip as reason:
        raise UserError(f"{path} can't be read as a tune: {reason}") from reason


def write_tunes(tunes, text_of, cfg):
    """Writes the music of [(name, what `text_of` makes ABC of)]; returns the counts."""
    members = [(name, "", lambda source=source: foreign_abc_to_midi(text_of(source)))
               for name, source in tunes]
    pool = ThreadPool(2 * cfg.WORKERS)  # they mostly wait
    try:
        return write_files(members, cfg, pool.imap)
    finally:
        pool.terminate()
        pool.join()  # after Ctrl-C too: what they began leaves no files


def folk_tunes():
    """[(name, bytes)] of the tunes of the books bundled with music21."""
    corpus = Path(importlib.util.find_spec("music21").origin).parent / "corpus"  # an import takes seconds
    tunes = {}
    for book in (path for folder in FOLK_BOOKS for path in (corpus / folder).glob("*.abc")):
        for tune in re.split(rb"^(?=X:)", book.read_bytes(), flags=re.M)[1:]:
            number = int(re.match(rb"X:\s*(\d+)", tune)[1])
            tunes[f"{book.parent.name}/{book.stem}_{number:04d}.mid"] = tune
    return list(tunes.items())


# --- The Session: the dump at https://github.com/adactio/TheSession-data, or what its pages answer as JSON

TYPE_METRES = {"jig": "6/8", "slip jig": "9/8", "slide": "12/8", "polka": "2/4", "waltz": "3/4",
               "mazurka": "3/4", "three-two": "3/2"}  # its pages give no metre; all other types are in 4/4
COLUMNS = {"tune": "tune_id", "setting": "setting_id", "id": "setting_id", "key": "mode"}  # other names


def dump_rows(path):
    """The rows of a tunes.csv or tunes.json, one for each setting (version of a tune), as dicts."""
    text = Path(path).read_text("utf-8-sig", "replace")
    if text.lstrip()[:1] in ("[", "{"):
        try:
            tunes = json.loads(text)
            tunes = tunes.get("tunes", [tunes]) if isinstance(tunes, dict) else tunes
            rows = [{"tune_id": tune.get("id"), "meter": TYPE_METRES.get(tune.get("type"), "4/4")} | row
                    for tune in tunes for row in tune.get("settings", [tune])]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged, cut off or no tunes.json ({error})") from error
    else:
        backslash = re.search(r'\\"(?![",\r\n])', text)  # some write a quotation mark so, others double it
        csv.field_size_limit(2**31 - 1)  # a quotation mark that is never closed takes the rest for a field
        rows = csv.DictReader(io.StringIO(text), escapechar="\\" if backslash else None)
        need("abc" in (rows.fieldnames or ()), f"{path} is no tunes.csv or tunes.json of The Session")
    return [{COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]


def setting_abc(row):
    """The ABC of a setting with its header; raises Skip for what is none."""
    metre, mode, music = (plain_text(str(row.get(name) or "")).strip() for name in ("meter", "mode", "abc"))
    if not row.get("tune_id") or not row.get("setting_id"):
        raise Skip("no tune_id or setting_id")
    if None in row:
        raise Skip("more fields than columns")
    head = f"M:{metre}\nK:{mode.capitalize()}\n"
    if not re.fullmatch(rf"M:\d\d?/\d\d?\nK:{KEY}\n", head):
        raise Skip("no key or metre")
    return f"X:1\nL:1/8\n{head}" + re.sub(r"\n\s*\n", "\n", music) + "\n"


def read_dump(path, cfg):
    """Writes the music of a dump, if none is named of one of 2020; returns the counts, and how new it is."""
    rows = dump_rows(path or download(THESESSION_URL, cfg.DATA_ROOT / "downloads" / "thesession.csv"))
    newest = max((str(row.get("date") or "")[:10] for row in rows), default="")
    tunes = [(f"{row.get('tune_id') or 0}/{row.get('setting_id') or 0}.mid", row) for row in rows]
    counts = write_tunes(tunes, setting_abc, cfg)
    return counts | {"corpus": f"The Session, settings until {newest}", "dump": {"newest": newest}}


# --- download

def download(url, path, sha256="", pauses=(2, 10, 30)):
    """Fetches `url` to `path`, unless it is there; returns `path`. Goes on where another attempt broke off,
    after so many seconds of pause. Raises UserError for a file that can't be had or has another checksum.
    """
    path, waits = Path(path), list(pauses)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        try:
            fetch_rest(url, part)
        except requests.RequestException as error:
            code = getattr(error.response, "status_code", 500)
            reason = "no connection, or it broke off" if error.response is None else f"status {code}"
            need(waits and code >= 500, f"can't download {url}: {reason}; what has come is kept")
            time.sleep(waits.pop(0))
            continue
        found = file_digest(part)
        if sha256 and found != sha256:
            part.unlink()
            raise UserError(f"{url} is not the known file: its SHA-256 is {found}; run again to retry")
        os.replace(part, path)
    return path


def fetch_rest(url, part):
    """One request for what `part` lacks: no file that the study fetches ever gets a newer version."""
    have = part.stat().st_size if part.exists() else 0
    asked = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}  # not the lengths of packed bytes
    with requests.get(url, headers=asked, stream=True, timeout=30) as reply:
        if reply.status_code == 416:  # nothing is left to send
            return
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0
        length = int(reply.headers.get("Content-Length", 0))
        need(shutil.disk_usage(part.parent).free > length + SPARE_DISK_BYTES, f"no space for {part}")
        bar = progress(None, part.stem, have + length or None, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as out:
            for chunk in reply.iter_content(2**16):  # what is less than a chunk gets lost with the connection
                bar.update(out.write(chunk))


# --- the stage

def read_member(member):
    """(bytes of a member, "") or (b"", why there are none)."""
    try:
        return member[2](), ""
    except (Skip, *DAMAGED) as error:
        return b"", str(error) if isinstance(error, Skip) else "damaged in the archive"


def write_files(members, cfg, apply=map):
    """Writes the music among `members` below MIDI_ROOT, at most MAX_MIDI_FILES; returns the counts. `apply`
    reads them. Raises UserError for a folder filled by others.

    No fsync, no renaming: what a killed run left half written is in no index, and is written again.
    """
    root, taken, files = cfg.MIDI_ROOT, set(), []
    need(cfg.ABC_ROOT.resolve() != root.resolve(), "MIDI_ROOT and ABC_ROOT are one folder; set one of them")
    marker = root / ".extracted_by_LakhMIDI"  # all beside it is ours to replace
    need(not root.exists() or marker.exists() or not any(root.iterdir()),
         f"{root} holds other files; set MIDI_ROOT to an empty folder, or read them with USE_LOCAL_MIDI")
    members = [(name, "unsafe path" if UNSAFE.match(name) else fault, read) for name, fault, read in members]
    chosen, skipped = choose(members, cfg.MAX_MIDI_FILES)
    read = progress(apply(read_member, chosen), "extract", len(chosen), "file")
    for (name, _, _), (data, fault) in zip(chosen, read, strict=True):
        if fault := fault or size_fault(len(data)):
            skipped[fault] += 1
            continue
        path = root / portable_path(name, taken)
        with told_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            need(shutil.disk_usage(root).free > SPARE_DISK_BYTES, f"the disk of {root} is full")
            path.unlink(missing_ok=True)  # rather than written into: it may be a link
            path.write_bytes(data)
        files.append(path.relative_to(root).as_posix())
    return {"files": sorted(files), "skipped": dict(skipped), "seen": len(members)}


def index_folder(root, cfg):
    """The counts of LOCAL_MIDI_ROOT, which is only read."""
    for knob in ("DATA_ROOT", "ABC_ROOT", "SAVE_DIR"):
        need(not getattr(cfg, knob).resolve().is_relative_to(root.resolve()),
             f"{knob} is inside LOCAL_MIDI_ROOT, where nothing is written; move one of them")
    members = [(name, size_fault(facts.st_size) if facts else "broken link or device", None)
               for name, facts in files_below(root)]
    chosen, skipped = choose(members, cfg.MAX_MIDI_FILES)
    return {"files": sorted(name for name, _, _ in chosen), "skipped": dict(skipped), "seen": len(members)}


@stage(version=3, knobs="source MAX_MIDI_FILES")
def extract(cfg):
    """Puts the music files of the source into MIDI_ROOT; midi_index.json says which of those there to use."""
    index, (words, reader, path) = cfg.DATA_ROOT / "midi_index.json", find_source(cfg)
    index.unlink(missing_ok=True)
    name = path and path.absolute().name
    counts = {"corpus": words, "source": cfg.source, "name": name} | reader(path, cfg)
    files, skipped = counts["files"], counts["skipped"]
    need(files, f"no music files in {words}; skipped: {skipped or 'nothing'}")
    say(f"extract   {len(files):,} of {counts['seen']:,} files; skipped: {skipped or 'none'}")
    write_json(index, counts)
    return [index] if cfg.USE_LOCAL_MIDI else [index, cfg.MIDI_ROOT]


# ============================================================================================================
# 4 Convert: data_lakh/midi/ -> data_lakh/abc/, report.jsonl
# ============================================================================================================
# MIDI file -> notes in beats -> ticks on a grid -> whole chords in layers -> pieces within a bar -> text, and
# back. A beat is a quarter note whatever the metre says; a line of text is a bar of all voices. One bar of
# two voices, the first with a held D under a melody, the second with a triplet that is a little late:
#
#   notes     voice 0: D4 at beat 0 for 4, F#5 at 0 for 2, A5 at 2 for 3; voice 1: G3 0, B3 .34, D4 .65, ...
#   ticks     48 a beat: D4 0-192, F#5 0-96, A5 96-240; G3 0-16, B3 16-32, D4 32-48, G3 48-192
#   chords    notes of a voice with equal start and end; each keeps its layer as long as it sounds
#   layers    voice 0: [F#5 0-96] [A5 96-240] in one, [D4 0-192] in another
#   pieces    A5 is cut at the bar line: 96-192, tied to 192-240; silence within a bar becomes rests
#   text      [V:1]f4a4-&D8|[V:2](3GBdG6&z8|       L:1/8; V:2 is read an octave lower; its &z8 is for abcjs
#
# Comments between the lines count down how many are to come, see count_down.
#
# What decides the rest is that programs differ (findings/README.md has what each does). So only whole chords
# are tied, a layer is not left while it sounds, one L: and one K: serve all voices, drums have one layer,
# every voice stands in every line, and each writes a change of metre itself. abc2midi, a player in C, then
# hears .999 of the notes of web files (.964 before), and abcjs, a player in browsers, plays 98 % of the files
# as abc2midi does (17 % before). An accidental is written wherever the key lacks it, and where a bar has a
# letter in two forms both are marked: so it does not matter how long a reader lets accidentals last.

BEAT = 48  # ticks per beat: the grids of 1/16 beat (3 ticks), 1/8 (6) and of triplets (1/6, 8) are all exact
MAX_BEATS = 2**16
MAX_NOTES = 300_000
MAX_CELLS = 2**20  # voices times bars
LETTERS = "CDEFGAB"
NATURAL = (0, 2, 4, 5, 7, 9, 11)  # semitones of C D E F G A B
MARKS = {-2: "__", -1: "_", 0: "=", 1: "^", 2: "^^"}
KEYS = ("Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#")  # signatures -5 ... 6
MINOR = ("Bbm", "Fm", "Cm", "Gm", "Dm", "Am", "Em", "Bm", "F#m", "C#m", "G#m", "D#m")
# Krumhansl & Kessler 1982, probe-tone ratings of the twelve pitch classes from the tonic up
MAJOR_PROFILE = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR_PROFILE = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
UNITS = (1, 2, 4, 8, 16, 32)  # denominators of L: and M:
LAYERS = 6  # chords of a voice that may sound at once
MAX_PARTS = 38  # voices and layers together: abc2midi has no room for more
HANG = 16  # beats that a note may sound beyond the last onset of the file


class Rejected(Exception):
    """A MIDI file that becomes no text. `reason` is a short slug that is counted, the message adds detail."""
    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Notes(NamedTuple):
    """Notes as four arrays of one length N. Times are in beats, that is quarter notes."""
    voice: np.ndarray
    onset: np.ndarray
    duration: np.ndarray
    pitch: np.ndarray


class Fault(NamedTuple):
    """Something in a text that does not add up. Lines count from 1, bars from 0."""
    line: int
    bar: int
    voice: str
    reason: str


class Tune(NamedTuple):
    """What read_score found in a MIDI file or read_abc in a text. Of changes at one beat the last counts."""
    notes: Notes
    voices: list  # (program 0-127, is_drum) of each; in a file a track's notes on one channel and program
    metres: list  # (beat, numerator, denominator)
    tempos: list  # (beat, quarter notes per minute)
    key: str = ""  # this and what follows: of texts only
    n_bars: int = 0
    faults: tuple | list = ()
    open_end: bool = False  # the text stops inside a bar or under a tie


# --- 1. MIDI in
# Our own reader, since those we know lose music: symusic drops notes that never end (10 % of web files have
# some), takes a program only from the track of its notes (2.5 % lack one) and refuses files that lack their
# last byte.

def read_number(data, at):
    """A number of variable length -> (its last 28 bits, place behind it)."""
    value = 0
    while data[at] > 127:
        value = value << 7 | data[at] & 127
        at += 1
    return (value << 7 | data[at]) & 0xFFFFFFF, at + 1


def read_track(track):
    """Bytes of a track -> (tick, status and two data bytes of each event, all in one list; (tick, type, data)
    of each meta event; whether it is whole)."""
    events, metas, at, tick, running = [], [], 0, 0, 0
    with contextlib.suppress(IndexError):
        while at < len(track):
            delta, at = track[at], at + 1
            if delta > 127:
                delta, at = read_number(track, at - 1)
            tick, status = tick + delta, running
            if track[at] > 127:
                status, at = track[at], at + 1
            if 0x80 <= status < 0xF0:
                running, size = status, 1 if 0xC0 <= status < 0xE0 else 2
                events += tick, status, track[at], track[at + size - 1]
                at += size
            elif status in (0xF0, 0xF7, 0xFF):
                if status == 0xFF and track[at] == 0x2F:  # end of track
                    return events, metas, True
                size, start = read_number(track, at + (status == 0xFF))
                if status == 0xFF and start + size <= len(track):
                    metas.append((tick, track[at], track[start:start + size]))
                at = start + size
            else:
                break
        return events, metas, at == len(track)
    return events, metas, False


def read_events(data):
    """Bytes from MThd on -> (columns track, tick, status, two data bytes; meta events).

    A damaged track is left out if it has but texts, else the file is refused: what follows is unknown. The
    last one is read as far as it goes if the file lacks a tenth of its bytes at most.
    """
    tracks, metas, at = [], [], 8 + int.from_bytes(data[4:8])
    while data[at:at + 4].isalnum() and at + 8 <= len(data):
        start, stop = at + 8, at + 8 + int.from_bytes(data[at + 4:at + 8])
        if stop > len(data) * 1.1:
            raise Rejected("bad_bytes", "a track is cut off")
        is_track, at = data[at:at + 4] == b"MTrk", stop
        events, texts, whole = read_track(data[start:stop]) if is_track else ([], [], True)
        if events and not whole and stop <= len(data):
            raise Rejected("bad_bytes", "a track of music is damaged")
        metas += texts if whole or stop > len(data) else []
        tracks.append(np.array(events, int).reshape(-1, 4))
    if not tracks:
        raise Rejected("bad_bytes", "no track")
    number = np.repeat(np.arange(len(tracks)), [len(events) for events in tracks])
    tick, status, key, value = np.concatenate(tracks).T
    return number, tick, status, np.minimum(key, 127), np.minimum(value, 127), metas


def note_ends(group, tick, strike, beat):
    """Strikes and releases of keys, by track and time -> (place of each strike, tick where its note ends).

    One rule for all that follows: a note ends with its release, at the latest where its key is struck again.
    Where it was struck while it sounded, the first release is that of the note before. A note without an end
    lasts a beat.
    """
    order = np.argsort(group, kind="stable")
    group, tick, strike = group[order], tick[order], strike[order]
    first = np.flatnonzero(strike)
    again = np.append(group[first[1:]] == group[first[:-1]], False)[:len(first)]
    stop = np.searchsorted(group, group[first], "right")
    stop[:-1] = np.where(again[:-1], first[1:], stop[:-1])
    releases = stop - first - 1
    owed = np.append(False, again[:-1] & (releases[:-1] == 0))[:len(first)]
    released = tick[first + np.minimum(releases, 1 + owed)]
    struck = np.where(again, tick[np.minimum(stop, len(tick) - 1)], tick[first] + beat)
    return order[first], np.where(releases > 0, released, struck)


def read_score(source):
    """Bytes or path of a MIDI file, bare or RIFF-wrapped -> Tune. Raises Rejected."""
    data = bytes(source) if isinstance(source, (bytes, bytearray)) else Path(source).read_bytes()
    data = data[max(0, data.find(b"MThd")):]
    beat = int.from_bytes(data[12:14])  # in ticks
    if data[:4] != b"MThd" or not 0 < beat < 0x8000:
        raise Rejected("bad_header", "no MThd chunk, or no ticks per quarter note")
    track, tick, status, key, value, metas = read_events(data)
    kind, channel = status >> 4, status & 15

    # Program changes hold for their channel from then on, in whichever track they stand; drums have none.
    change = np.flatnonzero((kind == 0xC) & (channel != 9))
    change = change[np.lexsort((change, tick[change], channel[change]))]
    when, programs = np.append(-1, channel[change] << 40 | tick[change]), np.append(0, key[change])

    keys = np.flatnonzero(kind >> 1 == 4)  # 8: released; 9: struck, or released if the velocity is 0
    strike = ((kind == 9) & (value > 0))[keys]
    if np.count_nonzero(strike) > MAX_NOTES:
        raise Rejected("too_many_notes", f"{np.count_nonzero(strike)}")
    struck, end = note_ends((track << 11 | channel << 7 | key)[keys], tick[keys], strike, beat)
    track, onset, channel, pitch = (column[keys[struck]] for column in (track, tick, channel, key))
    end = np.minimum(end, onset.max(initial=0) + HANG * beat)
    last = np.searchsorted(when, channel << 40 | onset, "right") - 1
    program = np.where(when[last] >> 40 == channel, programs[last], 0)
    sounds, voice = np.unique(track << 11 | channel << 7 | program, return_inverse=True)
    notes = merge_duplicates(Notes(voice, onset / beat, (end - onset) / beat, pitch))
    voices = [(sound & 127, sound >> 7 & 15 == 9) for sound in sounds.tolist()]
    metres = [(tick / beat, data[0], 2 ** min(data[1], 9)) for tick, kind, data in metas
              if kind == 0x58 and len(data) > 1]
    tempos = [(tick / beat, 6e7 / max(1, int.from_bytes(data))) for tick, kind, data in metas
              if kind == 0x51 and len(data) == 3]
    return Tune(notes, voices, metres, tempos)


def merge_duplicates(notes):
    """Notes sorted by voice, pitch and onset; of equal ones (a ninth of web files) the longest."""
    order = np.lexsort((notes.onset, notes.voice * 128 + notes.pitch))
    voice, onset, duration, pitch = (column[order] for column in notes)
    first = np.flatnonzero(run_starts(voice * 128 + pitch, onset))
    return Notes(voice[first], onset[first], np.maximum.reduceat(duration, first), pitch[first])


def run_starts(*columns):
    """(N,) bool: where any of the columns differs from the row before; true of the first row."""
    differs = functools.reduce(np.logical_or, [column[1:] != column[:-1] for column in columns])
    return np.append(True, differs)[:len(columns[0])]


# --- 2. bars and time

def is_metre(num, den):
    """Whether a time signature makes sense."""
    return den in UNITS and 1 / 8 <= 4 * num / den <= 16


def bar_lines(changes, end):
    """Metres [(beat, numerator, denominator)], length in ticks -> (ticks of bar lines, {bar: metre}).

    A change inside a bar cuts it there, to 1/8 beat: so notation programs write a pick-up. Bars under 1.5
    beats are believed only where there is one of them: most of POP909 says 1/4 throughout and is in 4/4.
    """
    metres = {round(beat * BEAT): (num, den) for beat, num, den in changes
              if is_metre(num, den) and beat * BEAT < end}
    starts = []
    for start, stop in itertools.pairwise([*sorted(metres), end]):
        num, den = metres[start]
        if 4 * num / den >= 1.5 or stop - start == 4 * BEAT * num // den:
            starts.append(start)
    if not starts or starts[0] > BEAT // 8:
        starts, metres[0] = [0, *starts], (4, 4)

    lines, written = [0], {}
    for start, stop in itertools.pairwise([*starts, math.inf]):
        while lines[-1] < min(stop - BEAT // 8, end):
            num, den = metres[start]
            left = stop - lines[-1]
            if left < 4 * BEAT * num // den - BEAT // 8:
                num, den = round(left / BEAT * 8), 32
                while num % 2 == 0 and den > 4:
                    num, den = num // 2, den // 2
            if [*written.values()][-1:] != [(num, den)]:
                written[len(lines) - 1] = num, den
            lines.append(lines[-1] + 4 * BEAT * num // den)
    return np.array(lines), written


def clock(tempos):
    """[(beat, qpm)] -> (beats, seconds at them) for np.interp."""
    at = {0: 120, **{beat: qpm for beat, qpm in tempos if beat < MAX_BEATS}, 2 * MAX_BEATS: 120}
    beat, qpm = np.array(sorted(at.items())).T
    return beat, np.cumsum([0, *np.diff(beat) * 60 / qpm[:-1]])


def tempo_fields(seconds, bars):
    """Seconds at the bar lines, their ticks -> {bar: "[Q:1/4=90]"}.

    A bar has its mean tempo. Changes below 3 % are not written, as listeners do not notice them, until the
    clock is off by .25 s; then comes a tempo that makes up for it within 16 bars.
    """
    beats, seconds = (bars / BEAT).tolist(), seconds.tolist()
    fields, tempo, now = {}, 1e-9, 0.0
    for bar in range(len(bars) - 1):
        length = beats[bar + 1] - beats[bar]
        mean, wanted = 60 * length / (seconds[bar + 1] - seconds[bar]), None
        if abs(mean / tempo - 1) > 0.03:
            wanted = mean
        elif abs(now + 60 * length / tempo - seconds[bar + 1]) > 0.25:
            there = min(bar + 16, len(bars) - 1)
            wanted = 60 * (beats[there] - beats[bar]) / max(seconds[there] - now, 1e-3)
        if wanted:
            unit = 4 if wanted >= 40 else 8
            count = max(1, round(wanted * unit / 4))
            tempo = count * 4 / unit
            fields[bar] = f"[Q:1/{unit}={count}]"
        now += 60 * length / tempo
    return fields


# --- 3. ticks on a grid

class Grid(NamedTuple):
    """Where time is cut, in ticks. A beat begins at each bar line and every BEAT ticks after it."""
    step: int
    beats: np.ndarray  # (beats + 1,) beginnings of beats, and the last bar line
    triplet: np.ndarray  # (voices, beats + 1) bool: beats on the grid of 1/6

    def beat(self, ticks):
        """Number of the beat that a tick is in."""
        return np.searchsorted(self.beats, ticks, "right") - 1

    def steps(self, voice, ticks):
        """How long a step is for a voice at these ticks."""
        return np.where(self.triplet[voice, self.beat(ticks)], 8, self.step)

    def quantise(self, voice, ticks):
        """Ticks with fractions -> ticks on the grid."""
        near = ticks + self.step / 2
        begin, step = self.beats[self.beat(near)], self.steps(voice, near)
        return begin + np.rint((ticks - begin) / step).astype(int) * step


def make_grid(notes, bars):
    """Notes by voice, pitch, onset and bar lines -> Grid: triplet beats lie nearer to the grid of 1/6."""
    key = notes.voice * 128 + notes.pitch
    strokes = [np.count_nonzero(run_starts(key, np.rint(notes.onset * n))) for n in (8, 16)]
    step = 3 if strokes[1] - strokes[0] > 0.006 * len(key) else 6  # 1/8 beat would merge too many
    on8, on6 = (np.abs(notes.onset - np.rint(notes.onset * n) / n) < 1 / 200 for n in (8, 6))
    exact = np.mean(on8 | on6) > 0.9  # seldom so if performed
    has_triplets = exact and 0.01 < np.mean(on6 & ~on8) < 0.7  # more: the beat is elsewhere

    beats = np.concatenate([*map(np.arange, bars[:-1], bars[1:], itertools.repeat(BEAT)), bars[-1:]])
    grid = Grid(step, beats, np.zeros((notes.voice.max() + 1, len(beats)), bool))
    ticks = notes.onset * BEAT
    beat = grid.beat(ticks + step / 2)
    off, off6 = (np.abs(ticks - beats[beat] - np.rint((ticks - beats[beat]) / n) * n) for n in (step, 8))
    gain = np.zeros(grid.triplet.shape)
    np.add.at(gain, (notes.voice, beat), off - off6)
    return grid._replace(triplet=has_triplets & (gain > 1 / 2) & (np.diff(beats, append=0) == BEAT))


def snap_ends(voice, start, end, duration):
    """Ends move to the next or last onset in their voice: fewer rests, lengths and layers.

    Only as far as the length stays within 1/8 beat or 20 % of `duration`, the true one in ticks.
    """
    span = 2 * MAX_BEATS * BEAT  # keeps the voices apart
    onsets = np.append(np.sort(voice * span + start), 2**60)
    after = np.searchsorted(onsets, voice * span + end)
    slack = np.maximum(BEAT / 8, duration / 5) + 1e-6
    for onset in (onsets[after - 1], onsets[after]):
        target = onset - voice * span
        end = np.where((np.abs(target - start - duration) <= slack) & (target > start), target, end)
    return end


def grid_notes(notes, grid):
    """Notes by voice, pitch, onset -> (voice, pitch, start, end) in ticks; a pitch never overlaps itself."""
    voice, onset, duration, pitch = notes
    key, start = voice * 128 + pitch, grid.quantise(voice, onset * BEAT)
    # On the grid of 1/16 a second stroke within one step moves to the next, still within 1/8 beat.
    start = start + 3 * (~run_starts(key, start) & (grid.steps(voice, start) == 3))
    end = np.maximum(grid.quantise(voice, (onset + duration) * BEAT), start + grid.steps(voice, start))
    first = np.flatnonzero(run_starts(key, start))  # a stroke per step
    end, duration = (np.maximum.reduceat(column, first) for column in (end, duration * BEAT))
    voice, pitch, start, key = (column[first] for column in (voice, pitch, start, key))
    end = snap_ends(voice, start, end, duration)
    struck = np.append(np.where(np.diff(key) == 0, start[1:], 2**60), 2**60)
    return voice, pitch, start, np.minimum(end, struck)


# --- 4. chords in layers, cut at bar lines

def find_chords(voice, pitch, start, end, n_voices):
    """Notes in ticks -> the chords (start, end, pitches) of each voice, by start and end."""
    order = np.lexsort((pitch, end, start, voice))
    voice, pitch, start, end = (column[order] for column in (voice, pitch, start, end))
    first, pitch = np.flatnonzero(run_starts(voice, start, end)), pitch.tolist()
    columns = [column.tolist() for column in (voice[first], start[first], end[first], first)]
    chords = [[] for _ in range(n_voices)]
    for voice, start, end, low, high in zip(*columns, [*columns[3][1:], len(pitch)], strict=True):
        chords[voice].append((start, end, pitch[low:high]))
    return chords


def find_layers(chords, most):
    """The chords of a voice -> its layers, at most so many: lists of chords one after another.

    A chord takes the layer that has just become silent and keeps it until it ends. Of chords that start
    together those beyond the last layer end with the one in it; where all sound, what would end first is cut.
    """
    layers, i, before, together = [[]], 0, -1, 0
    ends, quiet = [], 0  # of the layers used since all were silent, and where they will be so again
    for start, end, pitches in chords:
        together = together + 1 if start == before else 1
        before = start
        if together > most:
            layers[i][-1] = (start, layers[i][-1][1], sorted(layers[i][-1][2] + pitches))
            continue
        if start >= quiet:
            i, ends = 0, [end]
        elif silent := [stop for stop in ends if stop <= start]:
            i = ends.index(max(silent))
        elif len(ends) < most:
            i = len(ends)
            ends.append(end)
            layers += [[]] * (i == len(layers))
        else:
            _, i = min((ends[i], i) for i in range(most) if layers[i][-1][0] < start)
            layers[i][-1] = (layers[i][-1][0], start, layers[i][-1][2])
        ends[i] = end
        quiet = max(quiet, end)
        layers[i].append((start, end, pitches))
    return layers


def layers_that_fit(chords, drums):
    """Chords of each voice -> its layers, as many as abc2midi has room for. Drums have one: in abcjs another
    is no drum."""
    layers = [find_layers(own, 1 if drum else LAYERS) for own, drum in zip(chords, drums, strict=True)]
    while sum(map(len, layers)) > MAX_PARTS:
        i = max(range(len(layers)), key=lambda i: len(layers[i]))
        layers[i] = find_layers(chords[i], len(layers[i]) - 1)
    return layers


def cut_at_bars(layers, bars):
    """Layers of each voice, bar lines -> {(bar, voice, layer): [(start, end, pitches, whether it is tied)]};
    the silent layers below are empty.

    Below a bar with fewer layers than a later one has, in whichever voice, abcjs puts silence as long as its
    notes, and takes triplets for plain notes: bars with triplets get all the layers, if there is room.
    """
    lines = collections.defaultdict(list)
    for voice, own in enumerate(layers):
        for layer, chords in enumerate(own):
            for start, end, pitches in chords:
                bar = bisect.bisect(bars, start) - 1
                while end > bars[bar + 1]:
                    lines[bar, voice, layer].append((start, bars[bar + 1], pitches, True))
                    bar, start = bar + 1, bars[bar + 1]
                lines[bar, voice, layer].append((start, end, pitches, False))

    deepest = max(map(len, layers)) - 1
    triplets = [key for key, pieces in lines.items() if deepest and any([piece[0] % 3 for piece in pieces])]
    voices = {voice for _, voice, _ in triplets}
    if sum(deepest + 1 if voice in voices else len(own) for voice, own in enumerate(layers)) <= MAX_PARTS:
        for bar, voice, _ in triplets:
            lines[bar, voice, deepest]
    for bar, voice, layer in list(lines):
        for below in range(layer):
            lines[bar, voice, below]
    return lines


# --- 5. text

SCALES = np.array([[(7 * sharps + n) % 12 in NATURAL for n in range(12)] for sharps in range(5, -7, -1)])
PROFILES = np.array([[np.roll(profile, 7 * sharps + shift) / np.linalg.norm(profile)
                      for sharps in range(-5, 7)]
                     for profile, shift in ((MAJOR_PROFILE, 0), (MINOR_PROFILE, 9))])


def choose_key(pitch):
    """Pitches -> (its sharps, flats negative, so that accidentals are fewest; name of the key)."""
    count = np.bincount(pitch % 12, minlength=12)
    key = int(np.argmax(SCALES @ count - 1e-6 * np.abs(np.arange(12) - 5)))
    major, minor = PROFILES[:, key] @ count
    return key - 5, (MINOR if minor > major else KEYS)[key]


@functools.cache
def spelling(sharps, octave, marked):
    """How a key writes the pitches 0 to 127, read so many octaves lower, with accidentals at the letters in
    `marked`: (names, {pitch that the key lacks: its letter})."""
    names, foreign = {}, {}
    low = min(max(sharps - 3, -8), 1)  # the twelve names in a row on the line of fifths, F flat to B sharp
    for fifth in range(low, low + 12):
        letter, alter = LETTERS[4 * fifth % 7], (fifth + 1) // 7
        for pitch in range(7 * fifth % 12, 128, 12):
            height = (pitch - alter) // 12 - 5 - octave  # 0 = the octave of middle C
            name = letter.lower() + "'" * (height - 1) if height > 0 else letter + "," * -height
            names[pitch] = MARKS[alter] + name if letter in marked else name
            if not sharps - 1 <= fifth <= sharps + 5:
                foreign[pitch] = letter
    return [names[pitch] for pitch in range(128)], foreign


@functools.cache
def length_text(ticks, unit):
    """A length as ABC writes it: '' for the unit, '3', '/', '3/', '/4', '3/4'."""
    divisor = math.gcd(ticks, unit)
    num, den = ticks // divisor, unit // divisor
    return (str(num) if num > 1 else "") + {1: "", 2: "/"}.get(den, f"/{den}")


def write_layer(pieces, begin, end, names):
    """Pieces of a layer in a bar, {pitch: name} -> [(chord or rest, length, whether it is tied)]"""
    notes = []
    for start, stop, pitches, tied in pieces:
        if begin < start:
            notes.append(("z", start - begin, False))
        chord = "".join([names[pitch] for pitch in pitches])
        notes.append((f"[{chord}]" if len(pitches) > 1 else chord, stop - start, tied))
        begin = stop
    if begin < end:
        notes.append(("z", end - begin, False))
    return write_thirds(notes) if any([length % 3 for _, length, _ in notes]) else notes


def write_thirds(notes):
    """The same for a layer with triplets: only thirds of a beat leave the grid of 1/16.

    What reaches over the border of a beat with thirds is cut there, and no note is 5/6 long. abcjs takes
    three notes of a triplet to be equal; where they are not, the longest is written as two tied ones.
    """
    def split(notes, i, length):
        chord, whole, tied = notes[i]
        notes[i:i + 1] = [(chord, length, chord != "z"), (chord, whole - length, tied)]

    ends = list(itertools.accumulate(length for _, length, _ in notes))
    thirds = {end // BEAT for end in ends if end % 3}
    borders = sorted({BEAT * (beat + i) for beat in thirds for i in (0, 1)})
    beats, now = collections.defaultdict(list), 0
    for note, end in zip(notes, ends, strict=True):
        parts = [note]
        for border in borders:
            if now < border < end:
                split(parts, len(parts) - 1, border - now)
                beats[now // BEAT].append(parts[-2])
                now = border
        beats[now // BEAT].append(parts[-1])
        now = end

    for beat in thirds:
        notes = beats[beat]
        for i, (_, length, _) in enumerate(notes):
            if length == 40:
                split(notes, i, 32)
        lengths = [length for _, length, _ in notes]
        if len(notes) == 3 and len(set(lengths)) > 1:
            split(notes, lengths.index(max(lengths)), max(lengths) // 2)
        beats[beat] = [(chord, length * 3 // 2, tied) for chord, length, tied in notes]
        mark = "(3" if len(notes) == 3 else f"(3::{len(notes)}"
        beats[beat][0] = (mark + beats[beat][0][0], *beats[beat][0][1:])
    return list(itertools.chain(*beats.values()))


def write_layers(lines, octaves, sharps, bars):
    """{(bar, voice, layer): pieces} -> the same with what write_layer makes of them. A letter that is foreign
    to the key anywhere in a bar of a voice is marked throughout it."""
    _, foreign = spelling(sharps, 0, "")
    marked, strange = collections.defaultdict(set), set(foreign)
    for (bar, voice, _), pieces in lines.items():
        pitches = itertools.chain(*[pitches for _, _, pitches, _ in pieces])
        marked[bar, voice].update([foreign[pitch] for pitch in strange.intersection(pitches)])
    names = {(bar, voice): spelling(sharps, octaves[voice], "".join(sorted(letters)))[0]
             for (bar, voice), letters in marked.items()}
    return {(bar, voice, layer): write_layer(pieces, bars[bar], bars[bar + 1], names[bar, voice])
            for (bar, voice, layer), pieces in lines.items()}


def choose_unit(lines, bars):
    """What write_layers leaves -> n of the L:1/n that writes its lengths shortest, {length: its text}; those
    of bars, and of four and two beats, are there too."""
    counts = Counter([length for notes in lines.values() for _, length, _ in notes])
    lengths = {*counts, *(stop - start for start, stop in itertools.pairwise(bars)), 4 * BEAT, 2 * BEAT}
    texts = {n: {length: length_text(length, 4 * BEAT // n) for length in lengths} for n in UNITS}
    unit = min(UNITS, key=lambda n: sum(count * len(texts[n][length]) for length, count in counts.items()))
    return unit, texts[unit]


def write_bars(lines, n_voices, metres, tempos, bars, sizes):
    """What write_layers leaves -> lines of text, one for a bar, or several silent ones, of all voices.

    [M:] stands in every voice and in a layer that next sounds, [Q:] in the first voice. In abcjs a Z after a
    change of metre has the old length, so there a silent voice has a rest; and a rest of four beats lasts a
    bar by the metre of the header, if that is shorter.
    """
    tags = [f"[V:{voice + 1}]" for voice in range(n_voices)] if n_voices > 1 else [""]
    texts, due, metre, known = [], 0, metres[0], {}  # known: the metre of each layer
    for bar in [*sorted({bar for bar, *_ in lines} | metres.keys() | tempos.keys()), len(bars) - 1]:
        if bar > due:
            silence = f"Z{bar - due}|" if bar - due > 1 else "Z|"
            texts.append("".join(tag + silence for tag in tags))
        if bar == len(bars) - 1:
            break
        text, metre, due = "", metres.get(bar, metre), bar + 1
        silence = "z" + sizes[bars[bar + 1] - bars[bar]] if bar and bar in metres else "Z"
        for voice, tag in enumerate(tags):
            layer = 0
            while layer == 0 or (bar, voice, layer) in lines:
                text += "&" if layer else tag
                if known.get((voice, layer), metres[0]) != metre:
                    text += metre
                known[voice, layer] = metre
                if voice == layer == 0:
                    text += tempos.get(bar, "")
                text += "".join([chord + sizes[length] + "-" * tied for chord, length, tied
                                 in lines.get((bar, voice, layer), [])]) or silence
                layer += 1
            text += "|"
        texts.append(text)
    if bars[1] >= 4 * BEAT:
        return texts
    return [re.sub(rf"z{sizes[4 * BEAT]}(?![/\d])", 2 * f"z{sizes[2 * BEAT]}", text) for text in texts]


def write_header(voices, parts, octaves, metre, tempo, unit, key, has_chords):
    """The lines before the music; `parts`: each voice and layer. What differs between voices stands below V:.

    In abc2midi each voice and each layer takes a channel of its own, and a layer has no program on it; one
    that is said holds for the layers too. So voices of one program share a channel where there would be more
    than 15, or where a voice with a program has layers.
    """
    loses_sound = any(layer and voices[voice][0] for voice, layer in parts)
    programs = sorted({program for program, drum in voices if not drum})
    channels = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15] + [16] * len(programs)  # 10: drums
    channels = dict(zip(programs, channels, strict=False)) if len(parts) > 15 or loses_sound else {}
    lines = ["X:1", f"L:1/{unit}", metre.strip("[]"), tempo.strip("[]")]
    lines += ["%%MIDI chordattack 0"] * has_chords + [f"K:{key}"]
    for i, (program, drum) in enumerate(voices):
        if len(voices) > 1 or octaves[i]:
            lines.append(f"V:{i + 1}" + (f" octave={octaves[i]}" if octaves[i] else ""))
        if drum or program in channels:
            lines.append(f"%%MIDI channel {10 if drum else channels[program]}")
        if program:  # without it players take 0, the piano
            lines.append(f"%%MIDI program {program}")
    return lines


def score_to_abc(score, cfg):
    """Tune of a MIDI file -> dict(abc, n_bars, seconds). Raises Rejected."""
    notes, voices, metres, tempos, *_ = score
    time = clock(tempos)
    check_notes(notes, time, cfg)
    bars, metres = bar_lines(metres, int(((notes.onset + notes.duration).max() + 1) * BEAT))
    if len(voices) > MAX_PARTS or len(voices) * len(bars) > MAX_CELLS:
        raise Rejected("too_many_voices", f"{len(voices)}")

    drums = np.array([drum for _, drum in voices])
    on_grid = voice, pitch, *_ = grid_notes(notes, make_grid(notes, bars))
    layers = layers_that_fit(find_chords(*on_grid, len(voices)), drums)
    end = max(chords[-1][1] for own in layers for chords in own)
    n_bars = int(np.searchsorted(bars, end))
    bars = bars[:n_bars + 1]
    seconds = np.interp(bars / BEAT, *time)
    tempos = tempo_fields(seconds, bars)
    metres = {bar: "[M:{}/{}]".format(*metre) for bar, metre in metres.items() if bar < n_bars}
    sharps, key = choose_key(notes.pitch[~drums[notes.voice]])
    octaves = np.rint((np.bincount(voice, pitch) / np.bincount(voice) - 71.5) / 12).astype(int).tolist()

    bars = bars.tolist()
    lines = write_layers(cut_at_bars(layers, bars), octaves, sharps, bars)
    (unit, sizes), parts = choose_unit(lines, bars), {(voice, layer) for _, voice, layer in lines}
    has_chords = any(len(pitches) > 1 for own in layers for chords in own for *_, pitches in chords)
    texts = write_header(voices, parts, octaves, metres[0], tempos.pop(0), unit, key, has_chords)
    texts += write_bars(lines, len(voices), metres, tempos, bars, sizes)
    abc = count_down("\n".join(texts) + "\n")
    if len(abc) > cfg.MAX_ABC_CHARS:
        raise Rejected("too_many_chars", f"{len(abc)}")
    return {"abc": abc, "n_bars": n_bars, "seconds": float(seconds[-1])}


def check_notes(notes, time, cfg):
    """Refuses what is too little, too long or too dense ("black MIDI") for a text. Raises Rejected."""
    if len(notes.pitch) < max(1, cfg.MIN_NOTES):
        raise Rejected("no_notes" if not len(notes.pitch) else "too_few_notes", f"{len(notes.pitch)}")
    length = float((notes.onset + notes.duration).max())
    if length > MAX_BEATS:
        raise Rejected("too_long", f"{length:.0f} beats")
    by_beat, by_second = (np.bincount(times.astype(int))
                          for times in (notes.onset, np.interp(notes.onset, *time)))
    if by_beat[by_beat > 0].mean() > 60 and by_second[by_second > 0].mean() > 120:
        raise Rejected("too_dense")


def midi_to_abc(source, cfg):
    """Bytes or path of a MIDI file -> ABC text, the same on every machine. Raises Rejected, nothing else."""
    return score_to_abc(read_score(source), cfg)["abc"]


MUSIC_LINE = re.compile(r"^(?![A-Za-z]:(?![|:])|%).+", re.M)  # neither a field of the header nor a comment


def header_of(text):
    """A text up to its first line of music."""
    music = MUSIC_LINE.search(text)
    return text[:music.start()] if music else text


def count_down(text, more=0):
    """The text with comments that say how many lines of music are to come, if `more` follow its last one.

    They stand before the first line, and wherever a multiple of 4 is left, of 8 in music of one voice. By
    nothing else a model that sees a part of a tune knows how far it has got: without them 55 % of the tunes
    of two voices that a GPT of 450K wrote came to their end, with them 97 %. A note costs 4 % more for it.
    """
    lines = re.sub(r"^%\d+\n", "", text, flags=re.M).splitlines(keepends=True)
    every, counted = 4 if "\n[V:" in text else 8, []
    left = total = more + sum(bool(MUSIC_LINE.match(line)) for line in lines)
    for line in lines:
        if MUSIC_LINE.match(line):
            if left == total or left % every == 0:
                counted.append(f"%{left}\n")
            left -= 1
        counted.append(line)
    return "".join(counted)


def complete_lines(text):
    """A text with all voices in each line, since to abcjs a voice is its place there: those that a model left
    out are silent."""
    tags = [f"[V:{name}]" for name in dict.fromkeys(re.findall(r"^V:(\w+)", header_of(text), re.M))]

    def complete(line):
        cells = collections.defaultdict(str)
        for cell in re.split(r"(?=\[V:)", line[0])[1:]:
            cells[cell[:cell.find("]") + 1]] += cell
        silence = re.match(r"\[V:\w+\](Z\d*\|)(?=\[|$)", line[0])
        full = [cells.pop(tag, tag + (silence[1] if silence else "Z|")) for tag in tags]
        return "".join([*full, *cells.values()])
    return re.sub(r"^\[V:.*", complete, text, flags=re.M)


# --- 6. ABC back to notes

TOKEN = re.compile(r"(\[(?!\w:)[^]]*\]?|[_^=]{0,2}[A-Ga-g][,']*|z)(\d*/*\d*)(-?)"  # note, length, tie
                   r"|(\[\w:[^]]*\]|\(3(?:::\d)?|Z\d*|\S)")  # field, tuplet, silent bars, or what is wrong
NOTE = re.compile(r"([_^=]{0,2})([A-Ga-g])([,']*)")
SHARPS = {name: i - 5 for names in (KEYS, MINOR) for i, name in enumerate(names)}  # flats negative


def whole(text, default=1, most=9999):
    """A number in the text, bounded: sampled texts hold absurd ones."""
    return min(int(text[:5]), most) if text and text.isdecimal() else default


@functools.lru_cache(maxsize=4096)
def length_value(text):
    """'3/2', '/', '//' ... -> multiple of the unit length."""
    num, slash, den = text.partition("/")
    digits = den.lstrip("/")
    return whole(num) / (max(1, whole(digits)) if digits else 2 ** min(len(slash + den), 8))


@functools.lru_cache(maxsize=8192)
def chord_pitches(text, sharps, octave):
    """'^c,' or '[CEG]' in a key, read so many octaves higher -> pitches."""
    pitches = []
    for mark, letter, marks in NOTE.findall(text):
        step = LETTERS.index(letter.upper())
        alter = mark.count("^") - mark.count("_") if mark else (sharps + 5 - (2 * step + 1) % 7 + 1) // 7
        height = 5 + octave + letter.islower() + marks.count("'") - marks.count(",")
        pitches.append(min(127, max(0, 12 * height + NATURAL[step] + alter)))
    return pitches


class Reader:
    """Reads our notation line by line: what it can't read it skips and lists in `faults`.

    A line is a bar of each voice, or several; its notes are placed there whatever went wrong before. `rows`
    has the chords as lists: voice, onset and duration in beats, pitches.
    """

    def __init__(self):
        self.unit, self.metre, self.key, self.sharps = 0.5, 4.0, "", 0
        self.voices, self.name = {}, "1"
        self.line, self.bar, self.clock = 0, 0, 0.0  # bar and beat where the line begins
        self.here = 0  # bar that is being read
        self.ties = {}  # (voice, layer): (row of a tied chord, fault if it ends)
        self.open_bar = False  # the last line stopped inside a bar
        self.rows, self.faults, self.tempos, self.metres = [], [], [], []

    def fork(self):
        """A reader in the same state that has found nothing yet, for trying what a line would do."""
        twin = copy.copy(self)
        twin.rows, twin.faults, twin.tempos, twin.metres = [], [], [], []
        return copy.deepcopy(twin)

    @property
    def voice(self):
        """The current voice, made when it is new."""
        new = SimpleNamespace(index=len(self.voices), octave=0, program=0, drum=False, metre=self.metre)
        return self.voices.setdefault(self.name, new)

    def fault(self, reason, wrong=True):
        if wrong:
            self.faults.append(Fault(self.line, self.here, self.name, reason))

    def read_line(self, line):
        self.line += 1
        words = line.split()
        if words[:2] == ["%%MIDI", "program"]:
            self.voice.program = whole(words[-1], 0, 127)
        elif words[:3] == ["%%MIDI", "channel", "10"]:
            self.voice.drum = True
        elif re.match(r"[A-Za-z]:(?![|:])", line):
            self.read_field(line[0], line[2:].strip(), self.clock)
        elif words and line[0] != "%":
            self.read_music(line)

    def read_field(self, letter, value, beat):
        """A field of the current voice, in the header or at a beat in the music. Metres and tempos are those
        of the first voice; the others have to agree."""
        numbers = [whole(number, 0) for number in re.split("[/=]", value)]
        if letter == "V":
            self.name = (value.split() or [self.name])[0]
            octave = re.search(r"octave=(-?\d)", value)
            self.voice.octave = int(octave[1]) if octave else self.voice.octave
        elif letter == "K" and value in SHARPS:
            self.key, self.sharps = value, SHARPS[value]
        elif letter == "L" and len(numbers) == 2 and all(numbers):
            self.unit = 4 * numbers[0] / numbers[1]
        elif letter == "M" and len(numbers) == 2 and is_metre(*numbers):
            self.voice.metre = 4 * numbers[0] / numbers[1]
            if not self.voice.index and [*numbers] != [*self.metres[-1:][1:]]:
                self.metre = self.voice.metre
                self.metres.append((beat, *numbers))
        elif letter == "Q" and len(numbers) == 3 and all(numbers):
            num, den, count = numbers
            self.tempos.append((beat, min(max(4 * num / den * count, 0.5), 6000)))
        elif letter in "KLMQ":
            self.fault("bad_field")

    def read_music(self, line):
        """All voices of a line have the same number of bars; the next one begins where most of them end."""
        first, *cells = re.split(r"\[V:([^]]*)\]", line)
        if first.strip():
            cells = [self.name, first, *cells]
        ends = {}  # of each voice: how many bars it has, where they end
        self.open_bar = False
        for name, cell in zip(cells[::2], cells[1::2], strict=True):
            self.name = name.strip() or self.name
            ends[self.name] = self.read_cell(cell, *ends.get(self.name, (0, self.clock)))
        bars, clock = statistics.mode(ends.values())
        for self.name, end in ends.items():
            self.fault("silent_bars", end[0] != bars)
        self.here = self.bar = self.bar + bars
        self.clock, self.name = clock, next(iter(ends))

    def read_cell(self, cell, bars, start):
        """The bars of the current voice in a line -> (their number, where they end); before they were `bars`
        and ended at `start`."""
        voice = self.voice
        *closed, rest = cell.rstrip().split("|")
        self.fault("no_bar_line", rest or not closed)
        self.open_bar |= bool(rest) or not closed
        for text in closed + [rest] * bool(rest):
            self.here = self.bar + bars
            n_bars = 1
            for layer, part in enumerate(text.split("&")):
                n_bars = max(n_bars, self.read_layer(voice, layer, part, start))
            self.fault("metre", voice.metre != self.metre)
            for key, (row, fault) in list(self.ties.items()):
                if row[0] == voice.index and row[1] + row[2] < start + 1e-4:  # it had to go on in this bar
                    self.faults.append(fault)
                    del self.ties[key]
            bars, start = bars + n_bars, start + n_bars * voice.metre
        return bars, start

    def read_layer(self, voice, layer, text, start):
        """A layer of a bar, or of several silent ones; returns how many. It must fill them; what hangs over
        is cut off."""
        now, left, n_bars = start, 0, 1  # left: notes to come in a tuplet
        for chord, length, tie, other in TOKEN.findall(text):
            if chord:
                begin, now = now, now + self.unit * length_value(length) * (2 / 3 if left > 0 else 1)
                left -= 1
                if chord != "z" or self.ties:
                    self.add(voice, layer, chord, begin, min(now, start + voice.metre), tie)
            elif other[:2] == "(3":
                left = whole(other[4:], 3)
            elif other[0] == "Z":
                n_bars = whole(other[1:])
                now += n_bars * voice.metre
            elif other[:3] == "[M:" or (other[:3] == "[Q:" and not voice.index):
                self.read_field(other[1], other[3:-1], now)
            else:
                self.fault("bad_char")
        self.fault("open_tuplet", left > 0)
        self.fault("bar_length", abs(start + n_bars * voice.metre - now) > 1e-6)
        return n_bars

    def add(self, voice, layer, chord, begin, end, tie):
        """A chord, note or rest: a new row, or that of a tied one with the same pitches, which goes on."""
        if chord[0] == "[" and chord[-1] != "]":
            self.fault("open_bracket")
        row, pitches = None, chord_pitches(chord, self.sharps, voice.octave)
        if (voice.index, layer) in self.ties:
            row, fault = self.ties.pop((voice.index, layer))
            if abs(row[1] + row[2] - begin) > 1e-4 or row[3] != pitches:
                self.faults.append(fault)
                row = None
        if end < begin + 1e-6:
            return
        if row:
            row[2] = end - row[1]
        else:
            row = [voice.index, begin, end - begin, pitches]
            self.rows.append(row)
        if tie:
            self.ties[voice.index, layer] = row, Fault(self.line, self.here, self.name, "open_tie")


def read_abc(text):
    """ABC text in our notation -> Tune. Never raises: what it can't read is skipped and in `faults`."""
    reader = Reader()
    for line in text.splitlines():
        reader.read_line(line)
    faults = reader.faults + [fault for _, fault in reader.ties.values()]
    if not reader.key:
        faults.append(Fault(0, 0, "", "no_header"))
    chords = np.array([row[:3] for row in reader.rows], float).reshape(-1, 3)
    sizes = np.array([len(row[3]) for row in reader.rows], int)
    pitches = list(itertools.chain(*[row[3] for row in reader.rows]))
    table = np.column_stack([np.repeat(chords, sizes, axis=0), pitches])
    table = table[table[:, 1] < MAX_BEATS]
    voice, onset, duration, pitch = table[np.lexsort((table[:, 3], table[:, 1], table[:, 0]))].T
    notes = Notes(voice.astype(int), onset, np.minimum(duration, MAX_BEATS - onset), pitch.astype(int))
    voices = [(voice.program, voice.drum) for voice in reader.voices.values()]
    return Tune(notes, voices, reader.metres, reader.tempos, reader.key, reader.bar, faults,
                reader.open_bar or bool(reader.ties))


def abc_to_midi(text):
    """ABC text -> bytes of a Standard MIDI File, a track per voice. Never raises on any string.

    symusic writes a 16th part on channel 1, where its program is that of part 1 as well: so of more than 15
    voices those of one program share a track.
    """
    tune, score, tracks = read_abc(text), symusic.Score(480), {}
    score.tempos.extend([symusic.Tempo(round(480 * beat), qpm) for beat, qpm in tune.tempos or [(0, 120)]])
    score.time_signatures.extend([symusic.TimeSignature(round(480 * beat), num, den)
                                  for beat, num, den in tune.metres or [(0, 4, 4)]])
    for i, (program, drum) in enumerate(tune.voices):
        key = (program, drum) if len(tune.voices) > 15 else i
        track = tracks.setdefault(key, symusic.Track(program=program, is_drum=drum))
        onset, duration, pitch = (column[tune.notes.voice == i] for column in tune.notes[1:])
        start, end = np.rint(480 * onset).astype(int), np.rint(480 * (onset + duration)).astype(int)
        for note in zip(start.tolist(), (end - start).tolist(), pitch.tolist(), strict=True):
            track.notes.append(symusic.Note(*note, 90))
    score.tracks.extend([track for track in tracks.values() if len(track.notes)])
    return score.dumps_midi()


# --- 7. scoring

def note_f1(reference, candidate, onset_tolerance=1 / 8, durations=False):
    """F1 of notes matched by pitch and onset (length within 20 % or 1/8 beat), duplicates merged."""
    a, b = (sorted(zip((2.0**20 * notes.pitch + notes.onset).tolist(), notes.duration.tolist(), strict=True))
            for notes in map(merge_duplicates, (reference, candidate)))
    i = j = hits = 0
    while i < len(a) and j < len(b):
        (place, duration), (other_place, other_duration) = a[i], b[j]
        if abs(place - other_place) <= onset_tolerance + 1e-6:
            hits += not durations or abs(duration - other_duration) <= max(1 / 8, duration / 5) + 1e-6
            i, j = i + 1, j + 1
        elif place < other_place:
            i += 1
        else:
            j += 1
    return 2 * hits / (len(a) + len(b)) if a or b else 1.0


def are_drums(notes, voices):
    """(N,) bool for Notes and [(program, is_drum)] of their voices."""
    return np.array([drum for _, drum in voices], bool)[notes.voice]


def convert_one(data, cfg):
    """MIDI file (bytes or path) -> dict of its text, its round-trip score and its sizes. Raises Rejected."""
    score = read_score(data)
    row, notes = score_to_abc(score, cfg), score.notes
    return row | {"n_notes": len(notes.pitch), "n_chars": len(row["abc"]),
                  "f1": note_f1(notes, read_abc(row["abc"]).notes), "n_tracks": len(score.voices),
                  **identity(notes, are_drums(notes, score.voices))}


def convert_file(source, target, cfg):
    """In a worker: converts a MIDI file to `target`; returns its row of report.jsonl.

    A bug of ours is a reason, too, since one odd file must not cost the others; `convert` tells of it.
    """
    try:
        row = convert_one(Path(source).read_bytes(), cfg)
    except Rejected as reject:
        return {"reason": reject.reason}
    except (OSError, MemoryError) as error:
        return {"reason": "unreadable" if isinstance(error, OSError) else "out_of_memory"}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame.name for frame in frames if frame.filename == __file__]
        return {"reason": f"bug: {type(error).__name__} in {ours[-1]}"}
    write_text(target, row.pop("abc"))
    return {"abc": Path(target).relative_to(cfg.ABC_ROOT).as_posix(), **row}


def limit_worker():
    """A file that swells hits its worker's limit, not the machine's."""
    gc.freeze()
    gc.set_threshold(100_000)  # looking for cycles, of which there are none, took a sixth of the time
    with contextlib.suppress(ImportError, OSError, ValueError):  # Linux only
        import resource
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, mapped + 2**29))


def abc_path(file, cfg):
    """Where the text of a file relative to MIDI_ROOT goes."""
    return cfg.ABC_ROOT / f"{file}.abc"


def convert_all(files, cfg):
    """Yields the row of each file in order. A worker that crashes or hangs costs one file.

    Few files are in flight, so that memory does not grow with their number.
    """
    def row_of(job):
        try:
            return job.result()
        except TimeoutError:
            return {"reason": "timeout"}
        except ProcessExpired:
            return {"reason": "crashed"}

    jobs = collections.deque()
    with workers(cfg, limit_worker) as pool:
        for file in files:
            paths = cfg.MIDI_ROOT / file, abc_path(file, cfg)
            jobs.append(pool.schedule(convert_file, (*paths, cfg), timeout=cfg.CONVERT_TIMEOUT))
            if len(jobs) > 64 * cfg.WORKERS:  # enough to keep the others busy while one takes its time
                yield row_of(jobs.popleft())
        yield from map(row_of, jobs)


def remove_texts(cfg):
    """Removes the texts that an earlier conversion lists: another one may not make them all again."""
    for path in (cfg.ABC_ROOT / "report.jsonl", cfg.ABC_ROOT / "journal.jsonl"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # none, or damaged
            for row in read_jsonl(path):
                if "abc" in row:
                    (cfg.ABC_ROOT / row["abc"]).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


@stage(version=6, knobs="CONVERT_TIMEOUT MAX_ABC_CHARS MIN_NOTES", reads=(extract,))
def convert(cfg):
    """Converts every MIDI file in a worker that may die; every file ends as text or as a counted reason."""
    files, journal = read_json(cfg.DATA_ROOT / "midi_index.json")["files"], cfg.ABC_ROOT / "journal.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not convert.manifest(cfg)["goes_on"]:
        remove_texts(cfg)
    with open(journal, "a+b", buffering=0) as out:
        out.seek(0)
        whole = [len(line) for line in out if line.endswith(b"\n")]  # what an interrupted conversion has done
        out.truncate(sum(whole))
        rest = files[len(whole):]
        rows = progress(convert_all(rest, cfg), "convert", len(files), "file", initial=len(whole))
        for file, row in zip(rest, rows, strict=True):
            out.write(json.dumps({"file": file, **row}).encode() + b"\n")

    reasons = Counter(row.get("reason", "") for row in read_jsonl(journal))
    total, accepted = reasons.total(), reasons.pop("", 0)
    need(accepted, f"no MIDI file became ABC: {dict(reasons)}")
    signatures = np.zeros((accepted, NUM_PERM), "<u4")  # a memory map dies by SIGBUS when the disk is full
    with atomic_path(cfg.ABC_ROOT / "report.jsonl") as partial, open(partial, "w", encoding="utf-8") as out:
        place, bugs = itertools.count(), {}
        for row in read_jsonl(journal):
            if "signature" in row:
                signatures[next(place)] = np.frombuffer(bytes.fromhex(row.pop("signature")), "<u4")
            elif row["reason"].startswith("bug"):
                bugs.setdefault(row["reason"], row["file"])
            out.write(json.dumps(row) + "\n")
    with atomic_path(cfg.ABC_ROOT / "signatures.npy") as partial, open(partial, "wb") as out:
        np.save(out, signatures)
    journal.unlink()
    say(f"convert   {accepted:,} of {total:,} files became ABC; "
        f"rejected: {dict(reasons.most_common()) or 'none'}")
    for bug, file in bugs.items():
        say(f"convert   A {bug} cost {reasons[bug]:,} files. Please report it with {cfg.MIDI_ROOT / file}")
    return [cfg.ABC_ROOT]


# ============================================================================================================
# 5 Tokenize: abc/report.jsonl, abc/ -> tokens/train.bin val.bin test.bin vocab.json tunes.jsonl stats.json
# ============================================================================================================
# A tune is trained on or held out together with its near-duplicates: arrangements, transpositions, cut and
# played versions. Split file by file, as others do, 23 % of the held-out characters of the bundled folk tunes
# would have a version in training. Versions are found by melody alone: a shingle is a run of 12 intervals
# between top notes, a file is the MinHash of its shingles (Broder 1997), and files whose MinHashes agree are
# joined into clusters. The numbers were chosen by benchmarks/bench_works.py; bands of columns, as in
# MinHashLSH, miss re-arranged songs.
#
# A symbol is a character: with some 100 of them no model spends its weights on a vocabulary, and a loss in
# nats per character has one meaning for all sizes. Token files are plain arrays that training maps to memory.

SHINGLE = 12  # melodic intervals per shingle
MIN_PITCHES = 5  # different pitches in a shingle; fewer is an accompaniment figure
NUM_PERM = 256  # MinHash values per file
MIN_JACCARD = 1 / 16  # estimated share of common shingles that makes two files near-duplicates ...
MIN_COMMON = 10  # ... and their estimated number: some 22 successive notes
MAX_CLUSTER = 100  # a cluster larger than this and than 1/200 of the files hangs together by chance


# --- 1. Fingerprints: what two versions of a tune have in common

def content_hash(notes, drums):
    """128-bit hex digest of the notes: (drum?, onset, duration, pitch) in 1/48 beats from the first onset.

    Equal for the same notes in another order of tracks or spread over other tracks, doubled, under other
    instruments, names, tempi or ticks per beat; different once a note is transposed, moved or lengthened.
    """
    onset = np.rint(48 * (notes.onset - notes.onset.min(initial=np.inf))).astype(np.int64)
    duration = np.rint(48 * notes.duration).clip(max=2**22 - 1).astype(np.int64)
    # Packed as 1 + 32 + 22 + 8 bits, because np.unique on rows takes ten times longer.
    packed = drums.astype(np.int64) << 62 | onset << 30 | duration << 8 | notes.pitch
    return hashlib.blake2b(np.unique(packed).astype("<i8").tobytes(), digest_size=16).hexdigest()


def top_notes(notes, pitched):
    """Track, onset in 1/480 beat and pitch of the highest note of each chord of the masked notes, (C,) each.

    A note within 1/16 beat of the one before belongs to its chord, so that strummed chords stay whole.
    """
    tick = np.rint(480 * notes.onset[pitched]).astype(np.int64)
    # One sort of packed integers is much faster than np.lexsort.
    packed = np.sort(notes.voice[pitched].astype(np.int64) << 40 | tick << 8 | notes.pitch[pitched])
    track, tick = packed >> 40, packed >> 8 & 0xFFFFFFFF
    chord = np.flatnonzero(np.diff(track, prepend=-1).astype(bool) | (np.diff(tick, prepend=-99) > 30))
    return track[chord], tick[chord], np.maximum.reduceat(packed & 0xFF, chord) if len(chord) else chord


def melody(notes, drums):
    """Hashes of the runs of SHINGLE intervals between the top notes of each track, and the beats in which
    each run begins and ends: (S,) uint32, (S,), (S,).

    Intervals forget the key, and rhythm is left out: a tune transposed, re-orchestrated, written in halved
    values or played by hand keeps its shingles. Drums have none.
    """
    track, tick, top = top_notes(notes, ~drums)
    count, top = max(0, len(top) - SHINGLE), top.astype(np.uint64)
    code, seen = np.zeros(count, np.uint64), np.uint64(1) << (top[SHINGLE:] & np.uint64(63))
    for k in range(SHINGLE):
        here = top[k:k + count]
        code = code * np.uint64(0x9E3779B97F4A7C15) + (top[k + 1:k + 1 + count] - here)  # modulo 2^64
        seen |= np.uint64(1) << (here & np.uint64(63))
    keep = (track[:count] == track[SHINGLE:]) & (np.bitwise_count(seen) >= MIN_PITCHES)
    hashes, first, last = (code >> np.uint64(32)).astype(np.uint32), tick[:count] / 480, tick[SHINGLE:] / 480
    return hashes[keep], first[keep], last[keep]


def melodic_shingles(notes, drums):
    """(S,) uint32: the different hashes of `melody`."""
    return np.unique(melody(notes, drums)[0])


def fingerprint(notes, drums):
    """(NUM_PERM,) uint32 MinHash of the melodic shingles, all 2^32 - 1 where there are none."""
    sketch, shingles = MinHash(num_perm=NUM_PERM, hashfunc=int), melodic_shingles(notes, drums)
    for start in range(0, len(shingles), 4096):  # bounds the (shingles, NUM_PERM) table of a huge file
        sketch.update_batch(shingles[start:start + 4096].tolist())
    return sketch.hashvalues


def identity(notes, drums):
    """What the rows of report.jsonl hold to tell tunes apart."""
    return {"hash": content_hash(notes, drums),
            "signature": fingerprint(notes, drums).astype("<u4").tobytes().hex()}


# --- 2. Clusters of near-duplicates, and a split that cuts none

def similar_pairs(signatures):
    """(N, NUM_PERM) signatures -> ((P, 2) rows i, j that pass MIN_JACCARD and MIN_COMMON, (P,) similarities).

    Candidates are neighbours in the sorted order of any one column, at most NUM_PERM * N of them: all pairs
    with a value in common would be billions where a shingle is common.
    """
    n, codes = len(signatures), np.zeros(0, np.int64)
    for columns in np.array_split(signatures.T, max(1, NUM_PERM // 16)):  # bounds memory
        found = [codes]
        for column in columns:
            order = np.argsort(column, kind="stable")
            same = np.flatnonzero(column[order][1:] == column[order][:-1])
            found.append(order[same] * n + order[same + 1])
        codes = np.unique(np.concatenate(found))
    pairs = np.stack(np.divmod(codes, max(n, 1)), axis=1)

    size = 2.0**32 / signatures.mean(axis=1, dtype=np.float64) - 1  # of the set, from its mean minimum
    kept, similarity = [], []
    for chunk in np.array_split(pairs, len(pairs) // 2**15 + 1):
        jaccard = (signatures[chunk[:, 0]] == signatures[chunk[:, 1]]).mean(axis=1)
        common = jaccard / (1 + jaccard) * size[chunk].sum(axis=1)
        passed = (jaccard >= MIN_JACCARD) & (common >= MIN_COMMON)
        kept.append(chunk[passed])
        similarity.append(jaccard[passed])
    return np.concatenate(kept), np.concatenate(similarity)


def cluster(signatures, hashes, labels=None):
    """(N,) names of the near-duplicate cluster of each of N files: the smallest content hash in it.

    Files with equal hashes, equal labels or similar signatures are one cluster, and what a chain of such
    files connects. In one that outgrows MAX_CLUSTER by chance files must be more similar, at last by half.
    """
    unique, which, count = np.unique(np.asarray(hashes), return_inverse=True, return_counts=True)
    # Equal notes on other tracks differ in signature; the MinHash of a union is the minimum of the MinHashes.
    first = np.cumsum(count) - count
    merged = np.minimum.reduceat(signatures[np.argsort(which, kind="stable")], first)
    pairs, similarity = similar_pairs(merged)
    first_of = {}
    labelled = [(first_of.setdefault(label, i), i)
                for label, i in zip(labels or range(len(which)), which.tolist(), strict=True)]

    floor, largest = MIN_JACCARD, max(MAX_CLUSTER, len(unique) // 200)
    while True:
        i, j = np.concatenate([pairs, np.array(labelled, int).reshape(-1, 2)]).T
        graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(unique), len(unique)))
        _, component = connected_components(graph, directed=False)
        overgrown = np.bincount(component)[component[pairs[:, 0]]] > largest
        if floor >= 1 / 2 or not overgrown.any():
            break
        floor *= 2
        kept = ~overgrown | (similarity >= floor)
        pairs, similarity = pairs[kept], similarity[kept]
    smallest = np.unique(component, return_index=True)[1]  # first in a component, because hashes are sorted
    return unique[smallest[component]][which]


def split_clusters(clusters, chars, val_frac, test_frac, seed):
    """(N,) 'train', 'val' or 'test' for N files: a cluster never crosses, fractions are of characters.

    Clusters are drawn in the order of a hash of seed and name, so new files move few of the old ones. One
    larger than a held-out share comes last: it goes to training unless nothing else is left to hold out.
    No side is empty with 3 clusters or more.
    """
    names, which = np.unique(np.asarray(clusters), return_inverse=True)
    size = np.bincount(which, weights=chars)
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=6).digest() for name in names]
    draw = np.array([int.from_bytes(drawn, "big") / 2.0**48 for drawn in digests])
    budgets = {"test": test_frac * size.sum(), "val": val_frac * size.sum()}
    large = size > min((budget for budget in budgets.values() if budget > 0), default=0)
    order = np.argsort(np.where(large, 1 + size, draw), kind="stable")
    side = np.full(len(names), "train")
    for split, budget in budgets.items():
        if budget > 0 and len(order) > 1:
            fitting = np.searchsorted(np.cumsum(size[order]), budget, side="right")
            taken = max(1, min(fitting, len(names) // 3))  # leaves a cluster for the other sides
            side[order[:taken]], order = split, order[taken:]
    return side[which]


def leak_of_file_split(clusters, chars, val_frac, test_frac):
    """Expected share of held-out files, and of their characters, that a split file by file leaks.

    A file in a cluster of g has one of the other g - 1 in training with probability 1 - p^(g - 1), where p is
    the share held out. Pass content hashes as clusters for the leak by exact duplicates alone.
    """
    _, which, members = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    leak = 1 - (val_frac + test_frac) ** (members[which] - 1.0)
    return {"files": len(which), "groups": len(members), "largest_group": int(members.max()),
            "leaked_files": leak.mean(), "leaked_chars": np.average(leak, weights=chars)}


def duplicates_last(tunes, budget):
    """Training tunes -> (the same, at the end some of which another version stays before them; how many).

    The last ones, of at most `budget` characters, are not trained on: the loss on them is what a split by
    file takes for a loss on unseen music.
    """
    versions, first, last = Counter(tune["group"] for tune in tunes), [], []
    for tune in tunes:
        if versions[tune["group"]] > 1 and tune["n_chars"] <= budget:
            versions[tune["group"]], budget = 0, budget - tune["n_chars"]  # the others come first
            last.append(tune)
        else:
            first.append(tune)
    return first + last, len(last)


# --- 3. Vocabulary and token files

START, END, UNKNOWN = 0, 1, 2  # ids of the symbols that are not characters


class Vocab(NamedTuple):
    """The symbols in the order of their ids: three special ones, then the characters of training, sorted.

    `sounds`: the header lines for voices, instruments and drums that a tune in a thousand of training has. A
    prompt with others is brought down to its melody.
    """
    chars: tuple
    sounds: tuple = ()

    @property
    def dtype(self):
        return np.uint8 if len(self.chars) <= 256 else np.uint16

    def table(self):
        """id of every Unicode code point, UNKNOWN where the training tunes lack it."""
        table = np.full(sys.maxunicode + 1, UNKNOWN, self.dtype)
        table[[ord(char) for char in self.chars[3:]]] = np.arange(3, len(self.chars))
        return table

    def encode(self, text):
        """The ids of the characters of a text, (n,) int64; no start, no end."""
        ids = {char: i for i, char in enumerate(self.chars)}
        return np.array([ids.get(char, UNKNOWN) for char in text], np.int64)

    def decode(self, ids):
        """The text of ids; start and end have none, an unknown one shows as the replacement character."""
        return "".join(self.chars[i] if i > UNKNOWN else "\ufffd" if i == UNKNOWN else "" for i in ids)


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)


def read_tunes(tunes, desc, cfg):
    """Yields (tune, text) of each of the tunes."""
    for tune in progress(tunes, desc, unit="tune"):
        with open(f"{cfg.ABC_ROOT}/{tune['abc']}", "rb") as file:  # a fraction of the time of Path.read_text
            yield tune, file.read().decode("utf-8")


SOUND = re.compile(r"^(?:V:\d+|%%MIDI program \d+|%%MIDI channel 10)", re.M)  # lines of a header


def build_vocab(tunes, cfg):
    """The vocabulary of the tunes given; reads each once."""
    seen, sounds = np.zeros(sys.maxunicode + 1, bool), Counter()
    for _, text in read_tunes(tunes, "vocabulary", cfg):
        seen[code_points(text)] = True
        sounds.update(SOUND.findall(text))
    chars = "<start>", "<end>", "<unknown>", *map(chr, np.flatnonzero(seen))
    return Vocab(chars, tuple(sorted(line for line, n in sounds.items() if n >= len(tunes) / 1000)))


def write_tokens(split, tunes, vocab, cfg):
    """Writes <split>.bin, each tune as start, characters, end; returns the tunes with their place in it."""
    table, start, placed = vocab.table(), 0, []
    with atomic_path(cfg.tokens_root / f"{split}.bin") as partial, open(partial, "wb") as out:
        for tune, text in read_tunes(tunes, split, cfg):
            ids = table[code_points(f"\0{text}\0")]
            ids[[0, -1]] = START, END
            out.write(ids.tobytes())
            placed.append({"file": tune["file"], "split": split, "group": tune["group"], "start": start,
                           "chars": len(text), "unknown": int((ids == UNKNOWN).sum()),
                           "notes": tune["n_notes"], "seconds": tune["seconds"]})
            start += len(ids)
    return placed


# --- 4. The stage

@stage(version=3, knobs="VAL_FRAC TEST_FRAC SPLIT_BY SEED", reads=(convert,))
def tokenize(cfg):
    """Splits the tunes so that no version of a held-out tune is trained on, and writes them as token ids."""
    report = list(read_jsonl(cfg.ABC_ROOT / "report.jsonl"))
    tunes = [row for row in report if "abc" in row]
    need(len(tunes) >= 3, f"only {len(tunes)} tunes were converted, and a study needs at least three; see "
                          f"{cfg.ABC_ROOT / 'report.jsonl'} for the reasons")
    chars = np.array([tune["n_chars"] for tune in tunes])
    signatures = np.load(cfg.ABC_ROOT / "signatures.npy", mmap_mode="r")
    dump = "dump" in read_json(Path(cfg.DATA_ROOT, "midi_index.json"), {})  # a folder for each tune in it
    labels = [tune["file"].split("/")[0] if dump else tune["file"] for tune in tunes]
    clusters = cluster(signatures, [tune["hash"] for tune in tunes], labels)

    # Held out: 1 % each for validation and test, of a small corpus up to 10 % to reach 200,000 characters.
    val = cfg.VAL_FRAC or float(np.clip(200_000 / chars.sum(), 0.01, 0.1))
    fractions = val, cfg.TEST_FRAC or val
    by_cluster = cfg.SPLIT_BY == "work"
    splits = split_clusters(clusters if by_cluster else [tune["file"] for tune in tunes], chars, *fractions,
                            cfg.SEED)
    members = {"train": [], "val": [], "test": []}
    shuffle_key = [digest([cfg.SEED, tune["hash"], tune["file"]]) for tune in tunes]  # no order of the disk
    for i in np.argsort(shuffle_key, kind="stable"):
        members[splits[i]].append(tunes[i] | {"group": str(clusters[i])})
    need(all(members.values()), "too few different tunes to hold any out; add music or raise VAL_FRAC")
    members["train"], n_leaked = duplicates_last(members["train"], val * chars.sum() if by_cluster else 0)

    vocab = build_vocab(members["train"], cfg)
    placed = {split: write_tokens(split, rows, vocab, cfg) for split, rows in members.items()}
    for tune in placed["train"][len(placed["train"]) - n_leaked:]:
        tune["leaked"] = True  # in train.bin, but not trained on
    need(not all(tune["unknown"] for tune in placed["test"]), "every test tune has characters that the "
         "training tunes lack, so nothing could be evaluated; add music or raise TEST_FRAC")
    write_jsonl(cfg.tokens_root / "tunes.jsonl", itertools.chain(*placed.values()))
    write_json(cfg.tokens_root / "vocab.json", vocab._asdict())
    stats = corpus_statistics(report, placed, vocab, clusters, fractions, cfg)
    write_json(cfg.tokens_root / "stats.json", stats)
    plot_lengths(chars, cfg.tokens_root / "length_distribution.png")

    sizes, leak = stats["splits"].items(), stats["works"]["leak_of_split_by_file"]
    say(f"tokenize  {len(vocab.chars)} symbols; " + ", ".join(
        f"{split} {row['tunes']:,} tunes {row['chars']:,} characters" for split, row in sizes))
    say(f"tokenize  {len(tunes):,} tunes, {leak['groups']:,} clusters of near-duplicates. Split by file, "
        f"{leak['leaked_chars']:.1%} of the held-out characters would have a version in training")
    names = (*(f"{split}.bin" for split in members), "vocab.json", "tunes.jsonl", "stats.json",
             "length_distribution.png")
    return [cfg.tokens_root / name for name in names]


def corpus_statistics(report, placed, vocab, clusters, fractions, cfg):
    """What stats.json tells of the data: counts that balance, lengths, clusters ("works", "groups"), the leak
    of a split by file.
    """
    tunes = [row for row in report if "abc" in row]
    reasons = Counter(row["reason"] for row in report if "reason" in row)
    need(len(report) == len(tunes) + reasons.total(),
         "report.jsonl has files that are neither tunes nor rejected: run with --force --only convert")
    chars = np.array([tune["n_chars"] for tune in tunes])
    splits = {}
    for split, rows in placed.items():
        splits[split] = {"tunes": len(rows), "groups": len({row["group"] for row in rows})}
        for key in ("chars", "notes", "seconds", "unknown"):
            splits[split][key] = sum(row[key] for row in rows)
        splits[split]["set aside"] = sum(row["chars"] + 2 for row in rows if "leaked" in row)
    f1 = np.array([tune["f1"] for tune in tunes])
    sizes = np.unique(clusters, return_counts=True)[1]
    quantiles = {"min": 0, "5%": 5, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "99%": 99, "max": 100}
    return {"files": len(report), "converted": len(tunes), "converted_share": len(tunes) / len(report),
            "rejected": dict(reasons.most_common()), "vocabulary": vocab.chars,
            "vocabulary_size": len(vocab.chars), "splits": splits, "split_by": cfg.SPLIT_BY,
            "fractions": fractions,
            "round_trip_f1": {"mean": f1.mean(), "share_above_0.99": (f1 > 0.99).mean()},
            "chars_per_note": chars.sum() / sum(tune["n_notes"] for tune in tunes),
            "length_quantiles": {name: np.percentile(chars, q) for name, q in quantiles.items()},
            "longest_1%_hold": np.sort(chars)[-max(1, len(chars) // 100):].sum() / chars.sum(),
            "works": {"groups": len(sizes), "largest": sizes.max(),
                      "in_groups_of_several": sizes[sizes > 1].sum(),
                      "leak_of_split_by_file": leak_of_file_split(clusters, chars, *fractions)}}


def plot_lengths(chars, path):
    """The distribution of characters per tune."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(chars, bins=np.geomspace(chars.min(), chars.max() + 1, 60), color="#0072B2")
    axes.set(xscale="log", xlabel="length of a tune (characters)", ylabel="tunes",
             title=f"{len(chars):,} tunes, median {np.median(chars):,.0f} characters")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


# ============================================================================================================
# 6 Models: a Transformer and an LSTM with one face, forward(tokens, state) -> (logits, state)
# ============================================================================================================
# state = None is training and scoring: the window starts from nothing and no state comes back.
# state = model.empty_state(B, T) is sampling: tokens may come a few at a time, it remembers those before. All
# its tensors have the batch first: a row can be replaced or set back while others go on, see `sample`.


def rms_norm(x):
    """Root-mean-square norm without weights (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary(x, cos, sin):
    """Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) for x (..., T, width)."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.size(-1) // 2, dims=-1), sin.to(x.dtype))


def attention(q, k, v):
    """Causal attention, (B, heads, T, width) each."""
    if not q.is_cuda and q.dtype == torch.bfloat16:  # a third of the time of torch's own on a CPU
        return (q * q.size(-1)**-0.5 @ k.mT).add_(causal_mask(q.size(2), q.dtype)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@functools.lru_cache(maxsize=4)  # to make it anew would cost a quarter of the attention
def causal_mask(T, dtype):
    """(T, T): minus infinity where a character would see one that comes after it, else 0."""
    return torch.full((T, T), -math.inf, dtype=dtype).triu(1)


class Block(nn.Module):
    """Pre-norm attention and squared-ReLU MLP (So et al. 2021, https://arxiv.org/abs/2109.08668).

    What goes in is a weighted sum of the present character and the three before it, a short causal
    convolution (as in https://arxiv.org/abs/2312.00752): attention can then find at once what followed the
    same few characters last time.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        # (4, 1, C): of three dimensions, so that the optimiser doesn't take it for a matrix
        self.mix = nn.Parameter(torch.tensor([1 / 16, 1 / 8, 1 / 4, 1]).view(4, 1, 1).repeat(1, 1, width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qkv.weight.stacked = 3  # three matrices in one, told to the optimiser
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def empty_state(self, batch, length):
        """Keys and values (B, length, 2, heads, width) of the characters read, and the last three inputs."""
        C, new = self.mix.size(2), self.mix.new_zeros
        return new(batch, length, 2, self.heads, C // self.heads), new(batch, 3, C)

    def forward(self, x, cos, sin, state=None, place=None, length=0, seen=None):  # x (B, T, C), place (B, T)
        B, T, C = x.shape
        past, before = state or (None, x.new_zeros(B, 3, C))
        x = torch.cat([before, x], dim=1)
        if state:
            before.copy_(x[:, T:])
        mix = self.mix.to(x.dtype)
        mixed = mix[3] * x[:, 3:]
        for i in range(3):
            mixed = torch.addcmul(mixed, mix[i], x[:, i:i + T])
        x = mixed
        qk, v = self.qkv(rms_norm(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).split((2, 1))
        q, k = rotary(qk, cos, sin)
        k, v = rms_norm(k).to(v.dtype), v[0]  # keys of one length keep the logits in bounds
        if state:
            rows = torch.arange(B, device=x.device)[:, None]
            past[rows, place] = torch.stack([k, v]).permute(1, 3, 0, 2, 4)
            k, v = past[:, :length].permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            y = attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(rms_norm(x))

    def mlp(self, x):
        x = F.relu(self.up(x))
        return self.down(x * x)  # autocast would widen .square() to float32


class GPT(nn.Module):
    recurrent, kept_bytes = False, 44  # bytes for the backward pass per layer, unit of width and character

    def __init__(self, size, vocab_size, seq_len):
        super().__init__()
        self.size, self.seq_len = size, seq_len
        self.embed = nn.Embedding(vocab_size, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        half = size.width // size.heads // 2
        angles = torch.outer(torch.arange(seq_len), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", torch.cat([angles, angles], dim=1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angles, -angles], dim=1).sin(), persistent=False)

    def empty_state(self, batch, length):
        """How many characters each row has read, on the CPU, and the state of each block."""
        return [torch.zeros(batch, dtype=torch.long),
                [block.empty_state(batch, length) for block in self.blocks]]

    def forward(self, tokens, state=None):  # (B, T) -> (B, T, V)
        T, x = tokens.size(1), rms_norm(self.embed(tokens))
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))  # memory traffic bounds a GPU; the loss stays the same
        if state is None:
            for block in self.blocks:
                x = block(x, self.cos[:T], self.sin[:T])
            return self.head(rms_norm(x)), None
        read, states = state
        place = read[:, None] + torch.arange(T)  # (B, T), in the window of each row
        length = int(read.max()) + T
        seen = torch.arange(length) <= place[:, None, :, None]  # (B, 1, T, length)
        seen = None if seen.all() else seen.to(x.device, non_blocking=True)  # rows side by side need none
        place = place.to(x.device, non_blocking=True)
        cos, sin = self.cos[place][:, None], self.sin[place][:, None]
        for block, block_state in zip(self.blocks, states, strict=True):
            x = block(x, cos, sin, block_state, place, length, seen)
        return self.head(rms_norm(x)), [read + T, states]

    def flops_per_token(self):
        """Forward and backward: 6 per weight, and attention over half of the window (PaLM, appendix B)."""
        L, d = self.size.layers, self.size.width
        return 6 * (12 * L * d**2 + self.head.weight.numel() + L * self.seq_len * d)


class LSTM(nn.Module):
    """Layers of torch's LSTM, a module each: cuDNN keeps the weights of a single layer on the GPU's cores if
    it is at most 1,024 wide, in multiples of 128."""
    recurrent, kept_bytes = True, 16

    def __init__(self, size, vocab_size, seq_len):
        super().__init__()
        self.size, self.seq_len = size, seq_len
        self.embed = nn.Embedding(vocab_size, size.width)
        self.lstm = nn.ModuleList(nn.LSTM(size.width, size.width) for _ in range(size.layers))
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        for name, weight in self.lstm.named_parameters():
            if weight.dim() == 2:
                weight.stacked = 4  # the gates i, f, g, o of one layer in one matrix, told to the optimiser
            else:
                nn.init.zeros_(weight)
                if "bias_ih" in name:  # remember by default (Jozefowicz et al. 2015)
                    nn.init.ones_(weight.data[size.width:2 * size.width])

    def empty_state(self, batch, length):
        """Output and cell of each layer: twice (B, layers, width)."""
        return [self.head.weight.new_zeros(batch, self.size.layers, self.size.width) for _ in range(2)]

    def forward(self, tokens, state=None):  # (B, T) -> (B, T, V)
        x, after = rms_norm(self.embed(tokens)).transpose(0, 1), []
        for i, layer in enumerate(self.lstm):
            before = state and tuple(part[:, i].unsqueeze(0).contiguous() for part in state)
            x, (output, cell) = layer(x, before)
            after.append((output[0], cell[0]))
        logits = self.head(rms_norm(x.transpose(0, 1)))
        return logits, state and [torch.stack(parts, dim=1) for parts in zip(*after, strict=True)]

    def flops_per_token(self):
        return 6 * (8 * self.size.layers * self.size.width**2 + self.head.weight.numel())


class Family(NamedTuple):
    """What the study needs to know of a family of models; another one needs a class, a row and a ladder."""
    label: str  # its name for people
    colour: str
    marker: str  # of its points in plots
    line: str
    model: type
    weights: int  # in a layer, in squares of the width


FAMILIES = {"gpt": Family("Transformer", "#0072B2", "o", "-", GPT, 12),
            "lstm": Family("LSTM", "#D55E00", "s", "--", LSTM, 8)}


def build_model(size, vocab_size, cfg):
    """A new model for `size`, a Size or the name of one in cfg.MODELS, from torch's global generator."""
    if isinstance(size, str):
        rows = [row for row in cfg.MODELS if row.name == size]
        need(rows, f"no model {size} in the ladder")
        size = rows[0]
    return FAMILIES[size.family].model(size, vocab_size, cfg.SEQ_LEN)


def count_params(model):
    """Parameters three ways: all, without the embedding (the N of the fits), without embedding and head."""
    total = sum(p.numel() for p in model.parameters())
    n_fit = total - model.embed.weight.numel()
    return {"n_params": total, "n_fit": n_fit, "n_non_embedding": n_fit - model.head.weight.numel()}


# ============================================================================================================
# 7 Train: tokens/ -> gpt_*.pt, lstm_*.pt, scaling_results.json, training_curves.json
# ============================================================================================================
# Every model is trained on the same characters in the same order, so that only its size makes a difference.
# The recipe moves the loss further than the size does: with AdamW at a constant 3e-4 a GPT of 1.4 M reached
# 2.46 nats where this one reaches 1.29, an LSTM 2.12 and 1.25. Hence Muon for the matrices of both families,
# and rates checked in both: half the rate is .9 % worse for a GPT of 80K and 1.1 % for an LSTM of 200K, twice
# the rate 2.1 % for the GPT.
#
# The rate rises, stays, and falls in the last fifth of the steps. The result of a smaller budget of D
# characters is the mean of the weights over the fifth before it (arXiv 2602.03702), so that one run gives a
# result for every budget; a branch that cools down for each would cost 17 % more steps. The mean alone would
# not do: its loss is .2 to .8 % above that of a cool-down at the same step, and of the tunes that it writes
# half as many are valid, for it is less sure of what is rare, such as the end of a tune. L(N) has cool-downs
# only; L(N, D) mixes both, which moves its exponents within their intervals (benchmarks/LOG.md).
#
# What an interrupted run needs to go on is written every SAVE_EVERY_S; it goes on to the same bits on a CPU
# (on a GPU to the same losses but for rounding). Each run has a folder named by all that it depends on: with
# other knobs it gets another one, and with the old knobs the old one is found again.
#
# Several processes of a torchrun train a model each: a ladder is then done when its longest models are, and
# no work of Muon is done twice. Left out: DistributedDataParallel, by an estimate twice as slow for a ladder
# and of no use to LSTMs (benchmarks/LOG.md), and for a model larger than one GPU FullyShardedDataParallel.


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised (Jordan et al. 2024).

    https://kellerjordan.github.io/posts/muon/. Other than torch.optim.Muon, which takes one matrix at a time,
    it takes all of one shape together, tall ones turned, in `dtype` if they are not small: that suits a CPU,
    and small models on a GPU. A parameter with an attribute `stacked` = n is n matrices stacked along its
    rows, each orthogonalised on its own (worth 1.5 % of the loss). Where the tensor `found_inf` is not 0 a
    step leaves everything as it is, as in torch's fused AdamW: the device skips it, and nobody waits for it.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "peak": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.found_inf = dtype, torch.zeros(())

    @torch.no_grad()
    def step(self):
        skip = self.found_inf != 0
        for group in self.param_groups:
            parameters, lr, beta = group["params"], group["lr"], group["momentum"]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in parameters]
            gradients = [torch.where(skip, m, p.grad) for m, p in zip(momenta, parameters, strict=True)]
            torch._foreach_lerp_(momenta, gradients, 1 - beta)
            torch._foreach_mul_(parameters, torch.where(skip, 1.0, 1 - lr * group["weight_decay"]))

            by_shape = {}  # Nesterov's momentum, as (n, rows <= columns)
            for p, update in zip(parameters, torch._foreach_lerp(gradients, momenta, beta), strict=True):
                parts = update.view(getattr(p, "stacked", 1), -1, p.size(1))
                tall = parts.size(1) > parts.size(2)
                parts = parts.mT if tall else parts
                by_shape.setdefault(parts.shape[1:], []).append((p, parts, tall))
            for (rows, _), members in by_shape.items():
                dtype = self.dtype if rows >= 64 else torch.float32  # small ones: half the time on a CPU
                updates = orthogonalise(torch.cat([parts for _, parts, _ in members]), dtype).float()
                updates = torch.where(skip, 0.0, updates).split([len(parts) for _, parts, _ in members])
                for (p, _, tall), update in zip(members, updates, strict=True):
                    update = (update.mT if tall else update).reshape(p.shape)
                    p.add_(update, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalise(matrices, dtype):
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz steps; (n, rows <= columns)."""
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(model, cfg):
    """Muon for the matrices inside the network, AdamW for embedding, head, biases and mixing weights.

    AdamW's rate falls with the root of the width, as in https://github.com/karpathy/nanochat.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        inner = p.dim() == 2 and not name.startswith(("embed", "head"))
        (matrices if inner else others).append(p)
    lr_adam = cfg.LR_ADAM * (128 / model.size.width) ** 0.5
    muon = Muon(matrices, lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY, dtype=amp_dtype(False, cfg))
    adam = torch.optim.AdamW([{"params": others, "peak": lr_adam}], lr=lr_adam, betas=tuple(cfg.BETAS),
                             weight_decay=0.0, fused=True)
    return [muon, adam]


COOLDOWN = 0.2  # share of the steps in which the rate falls; a smaller budget has a mean of so many


def lr_scale(step, steps, cfg):
    """The share of the peak rate in `step` (from 1): it rises to 1, stays there, and at last falls to 0.

    The fall is 1 - sqrt (Hagele et al. 2024, https://arxiv.org/abs/2405.18392).
    """
    risen = step / max(1, round(cfg.WARMUP_FRAC * steps))
    left = (steps + 1 - step) / max(1, round(COOLDOWN * steps))
    return min(1.0, risen) * (1 - max(0.0, 1 - left) ** 0.5)


# --- windows that know their tune

# The place of a window in a stream of tunes, 16 bytes.
WINDOW = np.dtype([("begin", "<i8"),  # where its lines begin
                   ("back", "<u4"),  # characters from the tune's start to there
                   ("head", "<u2"),  # characters copied from the tune's start
                   ("length", "<u2")])  # characters from `begin` on


class Windows:
    """A stream of whole tunes as windows of T characters, in training, in every loss, and in sampling.

    A window is the start and the header of the tune in which it begins (a copy, at most 3/8 of the window),
    then whole lines from a line's start. Tunes that fit into a window are packed one after the other; a
    longer one begins a window of its own. The next window begins at the last line start before the end of
    this one. Copies and repeated lines are seen and not counted: every character but the start of a tune is
    counted once a pass. Windows that began anywhere left music of several voices without its header: of 50
    tunes that a model of web files wrote, 43 had none. Those that began within a line were worse still.
    """

    def __init__(self, tokens, vocab, seq_len):
        self.tokens, self.seq_len = tokens, seq_len
        self.plan = plan_windows(tokens, vocab, seq_len)
        self.counted = len(tokens) - len(places_of(START, tokens))
        self.share = self.counted / (len(self.plan) * seq_len)  # counted characters of those a model sees

    def __len__(self):
        return len(self.plan)

    def places(self, chosen):
        """Of some windows, (B, T + 1) each: the place in the stream of each character, -1 behind the end of
        the window, and whether it is counted there."""
        row, place = self.plan[chosen], np.arange(self.seq_len + 1)
        before = self.plan[np.maximum(chosen - 1, 0)]
        seen = np.where(chosen > 0, before["begin"] + before["length"] - row["begin"], 0)

        body = place - row["head"].astype(np.int64)[:, None]  # place among the characters from `begin` on
        start = row["begin"] - row["back"]
        source = np.where(body < 0, start[:, None] + place, row["begin"][:, None] + body)
        source[body >= row["length"][:, None]] = -1
        return source, (source >= 0) & (body >= np.maximum(seen, 0)[:, None])

    def read(self, chosen, device):
        """(B, 2, T) int64 on its way to `device`: characters, and those that follow, -100 if not counted."""
        source, counted = self.places(chosen)
        ids = np.where(source < 0, END, self.tokens[source]).astype(np.int64)
        targets = np.where(counted & (ids != START), ids, -100)
        pair = torch.from_numpy(np.stack([ids[:, :-1], targets[:, 1:]], axis=1))
        if torch.device(device).type == "cuda":
            pair = pair.pin_memory()  # or the copy would wait until the GPU has done all before it
        return pair.to(device, non_blocking=True)

    def chosen(self, step, batch, seed):
        """The windows of one step (from 0): a function of (seed, step). Every pass shuffles them anew."""
        passes, place = np.divmod(np.arange(step * batch, (step + 1) * batch), len(self))
        orders = {number: window_order(len(self), seed, number) for number in set(passes.tolist())}
        return np.array([orders[number][i] for number, i in zip(passes.tolist(), place, strict=True)])


@functools.lru_cache(maxsize=2)
def window_order(n_windows, seed, number):
    """The order of the windows in one pass over the data."""
    return np.random.default_rng([seed, number]).permutation(n_windows)


def plan_windows(tokens, vocab, seq_len):
    """The windows of a stream of whole tunes, in order: an array of WINDOW.

    Stretches of the stream that don't depend on each other are planned side by side, a window of each at a
    time. A line of half a window is cut.
    """
    starts = places_of(START, tokens)
    sizes = np.diff(starts, append=len(tokens))
    lines = np.append(-1, lines_of_music(tokens, vocab))
    music = np.append(lines, len(tokens))[np.searchsorted(lines, starts)]  # where a tune's header ends
    heads = np.minimum(music - starts, np.minimum(sizes, 3 * seq_len // 8))

    # 1. A stretch begins with a tune longer than a window, and among short ones every 64 windows or so
    part = np.cumsum(sizes) // (64 * seq_len)
    tune = np.flatnonzero((sizes > seq_len + 1) | (np.diff(part, prepend=-1) > 0))
    begin, head, end = starts[tune], np.zeros(len(tune), np.int64), np.append(starts[tune][1:], len(tokens))
    found = []
    while len(begin):
        # 2. One more window of each stretch
        stop = np.minimum(begin + seq_len + 1 - head, end)
        found.append(np.rec.fromarrays([begin, begin - starts[tune], head, stop - begin], WINDOW))

        # 3. The next one begins at a line's start; in a header at the tune's start, to hold it whole
        more = stop < end
        last, stop, end = begin[more], stop[more], end[more]
        tune = np.searchsorted(starts, stop, "right") - 1
        line = lines[np.searchsorted(lines, stop, "right") - 1]
        begin = np.where(line > stop - seq_len // 2, line, stop - seq_len // 4)
        in_header = (begin <= music[tune]) & (starts[tune] > last)
        begin, head = np.where(in_header, starts[tune], begin), np.where(in_header, 0, heads[tune])
    plan = np.concatenate(found)
    return plan[np.argsort(plan["begin"], kind="stable")]


def places_of(symbol, tokens, piece=2**22):
    """Where a symbol stands, in order; piece by piece, to spare memory."""
    found = [np.flatnonzero(tokens[i:i + piece] == symbol) + i for i in range(0, len(tokens), piece)]
    return np.concatenate(found)


def lines_of_music(tokens, vocab):
    """Where the lines begin that are no field of a header and no comment, in order."""
    newline, percent, colon = vocab.encode("\n%:")
    letter = np.array([len(char) == 1 and char.isalpha() for char in vocab.chars])
    lines = places_of(newline, tokens[:-2]) + 1
    first, second = tokens[lines], tokens[lines + 1]
    return lines[~((letter[first] & (second == colon)) | (first == percent) | (first == END))]


def amp_dtype(recurrent, cfg):
    """The type in which a model is trained. Autocast runs cuDNN's LSTM in float16 whatever it is told."""
    if cfg.DEVICE == "cuda":  # torch.cuda.is_bf16_supported() is also true of a T4, which emulates it
        bfloat16 = torch.cuda.get_device_capability() >= (8, 0) and not recurrent
        return torch.bfloat16 if bfloat16 else torch.float16
    bfloat16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.bfloat16 if bfloat16 else torch.float32


def autocast(model, cfg):
    dtype = amp_dtype(model.recurrent, cfg)
    return torch.autocast(cfg.DEVICE, dtype=dtype, enabled=dtype != torch.float32)


EVAL_BATCH = 16_384  # characters per forward pass of an evaluation, whatever the batch of the training


@torch.no_grad()
def token_losses(model, windows, cfg):
    """The loss in nats of every character, and its place in its window: (n,) float32, (n,) for n tokens.

    Not a number for the start of a tune, which is not counted. float32 on a CPU, on CUDA as in training.
    """
    device, batch = next(model.parameters()).device, max(1, EVAL_BATCH // windows.seq_len)
    precision = autocast(model, cfg) if device.type == "cuda" else contextlib.nullcontext()
    losses = np.full(len(windows.tokens), np.nan, np.float32)
    place = np.zeros(len(windows.tokens), np.int64)
    model.eval()
    for chosen in np.array_split(np.arange(len(windows)), -(-len(windows) // batch)):
        ids, targets = windows.read(chosen, device).unbind(1)
        with precision:
            logits = model(ids)[0]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        counted = (targets >= 0).cpu().numpy()
        source = windows.places(chosen)[0][:, 1:][counted]
        losses[source] = loss.view(targets.shape).cpu().numpy()[counted]
        place[source] = np.nonzero(counted)[1]
    model.train()
    return losses, place


def mean_loss(losses, tokens):
    """(mean loss per character, its standard error over tunes, the independent pieces of evidence)."""
    counted, tune = np.isfinite(losses), np.cumsum(tokens == START)
    total, count = np.bincount(tune[counted], losses[counted]), np.bincount(tune[counted])
    total, count = total[count > 0], count[count > 0]
    mean = float(total.sum() / count.sum())
    spread = ((total - mean * count) ** 2).sum() * len(count) / max(1, len(count) - 1)
    return mean, float(spread**0.5 / count.sum()) if len(count) > 1 else None


# --- one run: what it owns, the loop, what it leaves


class Run(NamedTuple):
    """One model to train: a row of the ladder, a seed, and a digest of all that the result depends on."""
    size: Size
    seed: int
    name: str
    recipe: str

    def path(self, kind, cfg):
        """kind: "model.pt" (the finished one), "record.json" (its results), "prediction.json", "log.jsonl";
        in training "resume.pt"."""
        return Path(cfg.SAVE_DIR, "runs", f"{self.name}-{self.recipe}", kind)


def planned_runs(cfg):
    """Every run of the study, small to large: the largest can be predicted before it is measured."""
    runs, knobs = [], {knob: getattr(cfg, knob) for knob in SHARED_KNOBS.split()}
    data = tokenize.identity(cfg)
    for size in sorted(cfg.MODELS, key=rough_weights):
        for seed in range(cfg.SEED, cfg.SEED + max(size.seeds, cfg.SEEDS)):
            name = size.name + (f"_seed{seed}" if seed > cfg.SEED else "")
            runs.append(Run(size, seed, name, digest([size[:5], seed, knobs, TRAIN_VERSION, data])))
    return runs


def rough_weights(size):
    return FAMILIES[size.family].weights * size.layers * size.width**2


class Diverged(RuntimeError):
    """A training loss that is no number, worse than guessing, or far above those before it."""


def summed_loss(model, windows_now):
    """Of the counted characters of (B, 2, T), as Windows.read gives them."""
    ids, targets = windows_now.unbind(1)
    logits = model(ids)[0]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


class Training:
    """A model in training: its weights, their mean, and what `owned` names are in its checkpoint. It never
    refers to itself: a CUDA graph that the collector destroys spoils one that is captured then."""
    owned = ("step", "averaged", "losses", "curve", "rows", "seconds")

    def __init__(self, run, vocab_size, share, cfg):
        self.run, self.cfg, self.counted = run, cfg, cfg.BATCH_TOKENS * share
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = build_model(run.size, vocab_size, cfg).to(cfg.DEVICE)
        self.average, self.averaged = copy.deepcopy(self.model), 0  # mean of the weights after so many steps
        self.optimizers = make_optimizers(self.model, cfg)
        half = amp_dtype(self.model.recurrent, cfg) == torch.float16
        self.scaler = torch.amp.GradScaler(cfg.DEVICE, enabled=half, growth_interval=100)
        self.micro = windows_per_pass(self.model, cfg)
        self.loss_of = summed_loss
        self.graph, self.graphed = None, cfg.DEVICE == "cuda" and cfg.COMPILE
        self.compiled = self.graphed and not self.model.recurrent  # cuDNN's LSTM needs no compiling
        if self.compiled:
            torch.compiler.reset()  # its cache is of the code: another size would be a change of shapes
            self.loss_of = torch.compile(summed_loss, dynamic=False)
        self.step, self.seconds = 0, 0.0
        self.losses = []  # of every step so far; not a number where the step was skipped
        self.curve = {"tokens": [], "train_loss": [], "lr": [], "tokens_per_s": []}
        self.rows = []  # one result for each budget that is done

    @torch.no_grad()
    def take_into_mean(self):
        """By our own line: torch's AveragedModel makes a GPU wait in every step (torch 2.13)."""
        self.averaged += 1
        now = list(self.model.parameters())
        torch._foreach_lerp_(list(self.average.parameters()), now, 1 / self.averaged)

    def save(self):
        """Writes a checkpoint, but never one of weights that are no numbers over one that is of use."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(f"{self.run.name} diverged: a weight is no number; lower LR or LR_ADAM")
        write_checkpoint(self.run.path("resume.pt", self.cfg), {
            "model": own_weights(self.model), "average": own_weights(self.average),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(), "device": self.cfg.DEVICE,
            "values": {name: getattr(self, name) for name in self.owned}})

    def restore(self):
        """Goes on from the checkpoint of this run; False where there is none."""
        path = self.run.path("resume.pt", self.cfg)
        if not path.exists():
            return False
        state = load_checkpoint(path)
        need(state["device"] == self.cfg.DEVICE, f"{self.run.name} is half trained on {state['device']}: "
             f"go on with --DEVICE {state['device']}, or delete {path.parent}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        if state["scaler"]:  # empty if it comes from a GPU that has bfloat16
            self.scaler.load_state_dict(state["scaler"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        vars(self).update(state["values"])
        return True

    def gradients(self, batch):
        """Mean loss and gradients of a batch (B, 2, T), `micro` windows at a time.

        A full GPU makes the passes smaller. Where a CUDA graph or torch.compile fails, it goes on without.
        """
        while True:
            try:
                return self.passes(batch)
            except Exception as error:  # torch.compile raises whatever its many parts do
                words = f"{type(error).__name__}: {error}"
                reason = words.partition("\n")[0][:200]
                # cuBLAS, cuDNN, the driver and torch.compile have words of their own for a full GPU
                if re.search("(?i)out ?of ?memory|alloc(ation)?_failed", words):
                    need(self.micro > 1, "out of memory with one window; lower SEQ_LEN or drop this model")
                    self.micro //= 2
                    say(f"{self.run.name}: out of memory, going on with {self.micro} windows per pass")
                elif self.graph:  # else it did not come to that: see capture()
                    self.graphed = False
                    say(f"{self.run.name}: going on without a CUDA graph, which failed ({reason})")
                elif self.compiled:
                    self.compiled, self.loss_of = False, summed_loss
                    say(f"{self.run.name}: going on without torch.compile, which failed ({reason})")
                else:
                    raise
                self.graph = None
            torch.cuda.empty_cache()  # here the exception no longer holds the tensors of the failed pass

    def passes(self, batch):
        """The gradients of a batch; on CUDA by replaying a graph of the pass, which spares its launches.

        There are some hundred kernels a layer: without the graph a slow host needs twice their time.
        """
        if self.graphed and self.graph is None:
            self.capture(batch[:self.micro])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.graph is None)  # a graph adds to tensors that stay in place
        total = torch.zeros((), device=batch.device)
        for windows_now in batch.split(self.micro):
            if self.graph and len(windows_now) == len(self.graph_input):
                self.graph_input.copy_(windows_now)
                self.graph.replay()
                total += self.graph_loss
            else:
                total += self.one_pass(windows_now)
        return total

    def one_pass(self, windows_now):
        """Adds the gradients of a few windows to those that are there; returns their share of the loss."""
        with autocast(self.model, self.cfg):
            loss = self.loss_of(self.model, windows_now)
        loss = loss / self.counted  # of a batch on average: a constant, so that a CUDA graph can hold it
        self.scaler.scale(loss).backward()
        return loss.detach()

    def capture(self, windows_now):
        """Makes a CUDA graph of one_pass(), after passes that compile it and choose its algorithms."""
        self.graph_input, stream = windows_now.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a capture that fails would not leave it
            for _ in range(3):
                self.one_pass(self.graph_input)
            gc.collect()  # nothing is left to be collected during the capture
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.graph_loss = self.one_pass(self.graph_input)
        torch.cuda.current_stream().wait_stream(stream)


def windows_per_pass(model, cfg):
    """How many windows go through a model at once: the batch, halved until the activations fit in 8 GB."""
    micro, bytes_per_char = cfg.batch, model.size.layers * model.size.width * model.kept_bytes
    while micro > 1 and micro * cfg.SEQ_LEN > (cfg.MICRO_TOKENS or 8e9 / bytes_per_char):
        micro //= 2
    return micro


CHECKED_CHARS = 200_000  # how many characters make a mean that hard windows in a row can't double


def divergence(losses, batch_tokens, vocab_size):
    """Why the losses of successive steps are those of a run that failed; empty if they are not.

    A step is not a number where it was skipped: float16 finds its scale in fewer than 25. Means are compared,
    since a batch of few windows may hold only hard ones: one of 1.14 after .4 once stopped a run for nothing.
    """
    finite, n = np.array(losses)[np.isfinite(losses)], max(1, CHECKED_CHARS // batch_tokens)
    if not np.isfinite(losses[-25:]).any():
        return "no finite gradient in 25 steps on end" if len(losses) >= 25 else ""
    means = finite[len(finite) % n:].reshape(-1, n).mean(axis=1)
    limit = min([2 * math.log(vocab_size), *(2 * means[:-1])])
    now = finite[-n:].mean()
    return "" if now <= limit else f"a mean loss of {now:.3g}, where {limit:.3g} is the limit"


def schedule_steps(windows, cfg):
    """Optimiser steps in which TRAIN_TOKENS_TARGET characters are counted."""
    return max(1, round(cfg.TRAIN_TOKENS_TARGET / (cfg.BATCH_TOKENS * windows.share)))


def train_model(run, windows, vocab, cfg, tell=lambda: None):
    """Trains one model to its end, from its checkpoint on if it has one; writes the model and its record.

    Calls tell() every half per cent.
    """
    # 1 Held-out data, model, optimisers
    held_out = Windows(read_tokens("val", vocab, cfg), vocab, cfg.SEQ_LEN)
    if cfg.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    t = Training(run, len(vocab.chars), windows.share, cfg)
    steps = schedule_steps(windows, cfg)
    log_every = max(1, steps // 200)

    # 2 From the last checkpoint on
    log = run.path("log.jsonl", cfg)
    log.parent.mkdir(parents=True, exist_ok=True)
    if not t.restore():
        log.unlink(missing_ok=True)
    began = saved = time.monotonic()
    new_losses = []
    for end in sorted({max(1, round(share * steps)) for share in cfg.BUDGETS})[len(t.rows):]:
        while t.step < end:
            # 3 The windows of this step: a function of seed and step
            batch = windows.read(windows.chosen(t.step, cfg.batch, run.seed), cfg.DEVICE)

            # 4 Their loss and gradients
            loss = t.gradients(batch)

            # 5 The rate of this step; gradients are clipped when the scale of float16 is off again
            share = lr_scale(t.step + 1, steps, cfg)
            for optimizer in t.optimizers:
                t.scaler.unscale_(optimizer)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * share
            norm = nn.utils.clip_grad_norm_(t.model.parameters(), cfg.CLIP_NORM)

            # 6 The step. A gradient that is no number skips it on the device: nobody waits to be told
            bad = ~norm.isfinite()
            for optimizer in t.optimizers:
                optimizer.found_inf = bad.float()
                optimizer.step()
            t.scaler.update()
            new_losses.append(torch.where(bad, math.nan, loss))
            t.step += 1

            # 7 The mean of the weights over the last fifth of this budget; at the end the weights themselves
            if t.step > (1 - COOLDOWN) * end and (end < steps or t.step == steps):
                t.take_into_mean()
            if t.step % log_every and t.step < end:
                continue

            # 8 Every half per cent: is it still learning? A point of the curve, a line of the log
            new_losses = torch.stack(new_losses).tolist()  # here it waits for the GPU
            t.losses += new_losses
            now = time.monotonic()
            if fault := divergence(t.losses, cfg.BATCH_TOKENS, len(vocab.chars)):
                raise Diverged(f"{run.name} diverged in step {t.step}: {fault}. Lower LR or LR_ADAM; the "
                               f"last good state is {run.path('resume.pt', cfg)}")
            rate = len(new_losses) * cfg.BATCH_TOKENS / max(now - began, 1e-9)
            t.seconds, began = t.seconds + now - began, now
            if learned := [loss for loss in new_losses if math.isfinite(loss)]:
                point = {"tokens": round(t.step * t.counted), "train_loss": statistics.fmean(learned),
                         "lr": cfg.LR * share, "tokens_per_s": rate}
                for key, value in point.items():
                    t.curve[key].append(value)
                append_line(log, {**point, "step": t.step})
            new_losses = []
            tell()

            # 9 A checkpoint now and then
            if now - saved > cfg.SAVE_EVERY_S:
                t.save()
                saved = now

        # 10 A budget is reached
        if end == steps:
            state_prediction_first(run, cfg, wait=True)
        t.rows.append(result(t, windows, held_out, end == steps))
        t.averaged = 0  # the next mean begins anew
        t.save()
        began = time.monotonic()

    # 11 The finished model and its record; what only an interrupted training needs goes
    write_checkpoint(run.path("model.pt", cfg), {
        "format": CHECKPOINT_FORMAT, "model": own_weights(t.average), "size": list(run.size[:5]),
        "seq_len": cfg.SEQ_LEN, "vocab": [[*part] for part in vocab], "result": t.rows[-1]})
    held = content(run.path("model.pt", cfg), train.folder(cfg))
    write_json(run.path("record.json", cfg), {"rows": t.rows, "curve": t.curve, "model": held})
    run.path("resume.pt", cfg).unlink(missing_ok=True)


def result(t, windows, held_out, is_last):
    """The row of scaling_results.json for a budget that is reached.

    "tokens" is D, the characters that were counted; "seen" are all that went through the model, copies of
    headers and repeated lines among them, and make the "flops".
    """
    cfg, size, flops = t.cfg, t.run.size, t.model.flops_per_token()
    mean, error = mean_loss(token_losses(t.average, held_out, cfg)[0], held_out.tokens)
    seen, rate = t.step * cfg.BATCH_TOKENS, float(np.median(t.curve["tokens_per_s"]))
    tokens = round(seen * windows.share)
    return {
        "run": t.run.name, "family": size.family, "size": size.size, "seed": t.run.seed,
        "layers": size.layers, "width": size.width, **count_params(t.model),
        "tokens": tokens, "seen": seen, "unique_tokens": min(tokens, windows.counted),
        "epochs": tokens / windows.counted, "flops_per_token": flops, "flops": flops * seen, "lr": cfg.LR,
        "val_loss": mean, "val_loss_se": error, "val_bpc": mean / math.log(2),
        "val_chars": held_out.counted,
        "tokens_per_s": rate, "flops_per_s": rate * flops, "wall_s": t.seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cfg.DEVICE == "cuda" else None,
        "precision": str(amp_dtype(t.model.recurrent, cfg)).removeprefix("torch."), "device": cfg.DEVICE,
        "checkpoint": f"{t.run.name}.pt", "main": is_last}


# --- files of models

CHECKPOINT_FORMAT = "LakhMIDI model 4"


def own_weights(model):
    """The weights on the CPU, each with a storage of its own: cuDNN keeps those of an LSTM in one."""
    return {name: weight.cpu().clone() for name, weight in model.state_dict().items()}


def write_checkpoint(path, content):
    with atomic_path(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # torch's own writer names no reason
            raise OSError(None, str(error).partition("\n")[0] + "; is the disk full?") from error


def append_line(path, row):
    with told_for(path), open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def load_checkpoint(path):
    """A dict of tensors and plain values, on the CPU; nothing in the file is executed."""
    need(Path(path).is_file(), f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            need(archive.testzip() is None, "checksum")  # torch.load looks at no checksum
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is cut off or none of its own
        raise UserError(f"{path} is not a whole checkpoint of this study ({type(error).__name__}); delete it "
                        "and run again") from error


def load(path, device="cpu"):
    """A trained model from its .pt file: (model, vocab, the result that scaling_results.json holds of it).

    Raises UserError if the file is missing, cut off, or no model that this study wrote.
    """
    saved = load_checkpoint(path)
    try:
        need(saved["format"] == CHECKPOINT_FORMAT, "another format")
        size, vocab = Size(*saved["size"]), Vocab(*map(tuple, saved["vocab"]))
        model = build_model(size, len(vocab.chars), Cfg(SEQ_LEN=saved["seq_len"]))
        model.load_state_dict(saved["model"])
        return model.to(device).eval(), vocab, saved["result"]
    except (UserError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a model of this study: {error}") from error


def read_tokens(split, vocab, cfg):
    """The characters of a held-out split that losses are taken over, as ids."""
    return np.fromfile(cfg.tokens_root / f"{split}.bin", vocab.dtype, cfg.EVAL_TOKENS)


def read_training(vocab, cfg):
    """train.bin as (what is trained on, versions of it that were set aside to measure the leak)."""
    tokens = np.memmap(cfg.tokens_root / "train.bin", vocab.dtype, "r")
    stats = read_json(cfg.tokens_root / "stats.json", {"splits": {"train": {"set aside": 0}}})
    return np.split(tokens, [len(tokens) - stats["splits"]["train"]["set aside"]])


def read_vocab(cfg):
    saved = read_json(cfg.tokens_root / "vocab.json")
    return Vocab(tuple(saved["chars"]), tuple(saved.get("sounds", ())))


# --- several processes, of a torchrun or the like: every one runs the same lines; stages but this one are
# rank 0's work, while the others wait. They have nothing in common but the files and a store of counters.


@functools.cache
def ranks():
    """(rank of this process, number of processes, their store): (0, 1, None) where it was started alone."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1 or not os.environ.get("RANK"):
        return 0, 1, None
    rank, address = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    waiting = threading.Timer(10, say, ["waiting for the process of rank 0 at {}:{}".format(*address)])
    waiting.start()
    try:
        store = dist.TCPStore(*address, is_master=rank == 0 and not hosted, wait_for_workers=False,
                              timeout=datetime.timedelta(seconds=START_S))
    except dist.DistError as error:
        raise UserError(f"no process of rank 0 at {address[0]}:{address[1]}") from error
    finally:
        waiting.cancel()
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    threading.Thread(target=show_life, args=(rank, store), daemon=True).start()
    return rank, count, store


START_S, LOST_S = 180, 45  # seconds without a first, or another, sign of life until a process is lost
SIGNS = {}  # of life of other processes: the newest, and when it was first seen here


def show_life(rank, store):
    with contextlib.suppress(dist.DistError):  # the store went with rank 0
        while True:
            store.add(f"alive {rank}", 1)
            time.sleep(5)


def counter(name, step=0):
    """A counter that all processes see, after a step."""
    try:
        return ranks()[2].add(name, step)
    except dist.DistError as error:
        raise ConnectionError("the process of rank 0 is lost; the same command goes on") from error


def look_for_ranks():
    """How many other processes have not begun; ConnectionError if one is lost."""
    rank, count, _ = ranks()
    for other in {*range(count)} - {rank}:
        sign, now = counter(f"alive {other}"), time.monotonic()
        if SIGNS.get(other, (None,))[0] != sign:
            SIGNS[other] = sign, now
        elif now - SIGNS[other][1] > (LOST_S if sign else START_S):
            raise ConnectionError(f"the process of rank {other} is lost; the same command goes on")
    return sum(sign == 0 for sign, _ in SIGNS.values())


def wait_for_ranks():
    """Goes on when all processes have come here."""
    rank, count, _ = ranks()
    if count == 1:
        return
    here, patience = counter(f"came {rank}", 1), time.monotonic() + 8
    while any(counter(f"came {other}") < here for other in range(count)):
        if (absent := look_for_ranks()) and time.monotonic() > patience:
            say(f"waiting for {absent} of {count} processes")
            patience = math.inf
        time.sleep(0.1)


# --- the stage

TRAIN_VERSION = 6  # raise it when the code trains differently
# What a run depends on besides its row of the ladder, its seed and the data. Not on the device: a model that
# was finished on a GPU is finished on a laptop.
SHARED_KNOBS = ("TRAIN_TOKENS_TARGET BATCH_TOKENS SEQ_LEN BUDGETS LR LR_ADAM BETAS WEIGHT_DECAY CLIP_NORM "
                "WARMUP_FRAC EVAL_TOKENS")


@stage(version=TRAIN_VERSION, knobs=SHARED_KNOBS + " MODELS SEEDS SEED", reads=(tokenize,), root="SAVE_DIR",
       by_all=True)
def train(cfg):
    """Trains every model of the study on the same characters in the same order, from small to large."""
    vocab, runs, (rank, count, _) = read_vocab(cfg), planned_runs(cfg), ranks()
    need(len(read_tokens("val", vocab, cfg)) > 1, "no validation tune; add MIDI files or raise VAL_FRAC")
    windows = Windows(read_training(vocab, cfg)[0], vocab, cfg.SEQ_LEN)
    if rank == 0:
        say(f"train     {len(windows):,} windows of {cfg.SEQ_LEN} characters; copies of headers, repeated "
            f"lines and room left over are {1 - windows.share:.1%} of them")
    if cfg.DEVICE == "cuda":  # more processes than GPUs share them
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    todo = [run for run in runs if not finished(run, cfg)]
    wait_for_ranks()  # until all have looked at what there is to do
    turns = [*range(count), *reversed(range(count))]  # the largest first, to and fro: about equal shares
    mine = [run for run, turn in zip(todo[::-1], itertools.cycle(turns)) if turn == rank][::-1]
    side_by_side = cfg.DEVICE == "cpu" and count == 1 and cfg.WORKERS > 1
    with contextlib.closing(TrainingBar(todo, windows, vocab, cfg, disable=rank > 0)) as bar:
        for run in (train_side_by_side if side_by_side else train_in_turn)(mine, windows, vocab, cfg, bar):
            row = finished(run, cfg)["rows"][-1]
            say(f"  {run.name:15s} {row['n_fit']:>11,} parameters  val loss {row['val_loss']:.4f} nats, "
                f"{row['val_bpc']:.4f} bits per character {row['tokens_per_s']:>9,.0f} char/s "
                f"{row['wall_s']:6.0f} s")
            if rank == 0:
                write_results(runs, windows, cfg)
    wait_for_ranks()
    if rank == 0:
        write_results(runs, windows, cfg)
    names = ["scaling_results.json", "training_curves.json", *(f"{run.name}.pt" for run in runs)]
    return [Path(cfg.SAVE_DIR, name) for name in names]


def train_in_turn(runs, windows, vocab, cfg, bar):
    """Yields each run when it is trained."""
    for run in runs:
        state_prediction_first(run, cfg)
        train_model(run, windows, vocab, cfg, bar.show)
        yield run


def train_side_by_side(runs, windows, vocab, cfg, bar):
    """The same on a CPU, a process for each model: small models gain little from a second thread, and two
    threads wait for each other whenever another program runs.
    """
    threads = max(1, cfg.WORKERS // len(planned_runs(cfg)))
    cost = Counter()  # the family that takes longest goes first: its largest model must not end alone
    for run in runs:
        cost[run.size.family] += training_flops(run, windows, vocab, cfg)
    runs = sorted(runs, key=lambda run: -cost[run.size.family])
    with workers(cfg, torch.set_num_threads, threads) as pool:
        jobs = {pool.schedule(train_alone, (run, os.getpid(), cfg)): run for run in runs}
        while jobs:
            for job in concurrent.futures.wait(jobs, 0.5, concurrent.futures.FIRST_COMPLETED).done:
                job.result()  # raises what went wrong there
                yield jobs.pop(job)
            bar.show()


def train_alone(run, parent, cfg):
    """In a process of its own, which ends when its parent is gone."""
    def stop_if_alone():
        if os.getppid() != parent:
            os._exit(1)
    vocab = read_vocab(cfg)
    windows = Windows(read_training(vocab, cfg)[0], vocab, cfg.SEQ_LEN)
    state_prediction_first(run, cfg)
    train_model(run, windows, vocab, cfg, stop_if_alone)


class TrainingBar:
    """Progress in FLOPs over all runs, whichever process trains them, by the last lines of their logs."""

    def __init__(self, runs, windows, vocab, cfg, disable):
        self.cost = {run.path("log.jsonl", cfg): training_flops(run, windows, vocab, cfg) for run in runs}
        self.steps = schedule_steps(windows, cfg)
        self.bar = progress(total=sum(self.cost.values()), desc="train", disable=disable, bar_format=(
            "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"))
        self.close = self.bar.close

    def show(self):
        look_for_ranks()
        done, newest = 0, (0, "")
        for log, cost in self.cost.items():
            if log.exists() and (lines := log.read_text("utf-8").splitlines()):
                last = json.loads(lines[-1])
                done += cost * last["step"] / self.steps
                words = f"{log.parent.name.rpartition('-')[0]} loss {last['train_loss']:.3f}"
                newest = max(newest, (log.stat().st_mtime_ns, f"{words} {last['tokens_per_s']:,.0f} char/s"))
        self.bar.set_postfix_str(newest[1], refresh=False)
        self.bar.update(done - self.bar.n)


def training_flops(run, windows, vocab, cfg):
    """What a training costs, for the time left. On CUDA 1e8 more a character: a step of gpt_1M takes an H200
    a ninth of gpt_100M's time, not a 67th."""
    with torch.device("meta"):
        model = build_model(run.size, len(vocab.chars), cfg)
    flops = model.flops_per_token() + 1e8 * (cfg.DEVICE == "cuda")
    return flops * cfg.BATCH_TOKENS * schedule_steps(windows, cfg)


def finished(run, cfg):
    """The record of a run that was trained to its end and has its model, else None."""
    record = read_json(run.path("record.json", cfg), {})
    held = content(run.path("model.pt", cfg), train.folder(cfg))
    return record if record and held and record.get("model", held) == held else None


def state_prediction_first(run, cfg, wait=False):
    """Writes down what the smaller models of a family say of the loss of its largest, before that is known.

    That is before it is trained, unless other processes still train the smaller ones: then, at the latest,
    before it is measured, for which it waits.
    """
    family = [r for r in planned_runs(cfg) if r.size.family == run.size.family]
    smaller = [r for r in family if r.size != family[-1].size]
    if run != family[len(smaller)] or run.path("prediction.json", cfg).exists():
        return
    while not all(finished(r, cfg) for r in smaller):
        if not wait:
            return
        look_for_ranks()
        time.sleep(1)
    rows = [finished(r, cfg)["rows"][-1] for r in smaller]
    with torch.device("meta"):
        n = count_params(build_model(run.size, len(read_vocab(cfg).chars), cfg))["n_fit"]
    points = {"N": [row["n_fit"] for row in rows], "L": [row["val_loss"] for row in rows]}
    stated = {**state_prediction(points, n, runs=len(family) - len(smaller)), "model": run.size.name,
              "stated_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(run.path("prediction.json", cfg), stated)
    if stated["predicted"]:
        say(f"  {run.name:12s} is predicted to reach {stated['predicted']:.4f} nats, by the smaller ones")


def write_results(runs, windows, cfg):
    """Gathers what the runs have left so far into the files that later stages and people read."""
    save, records, predictions = Path(cfg.SAVE_DIR), {}, {}
    for run in runs:
        if stated := read_json(run.path("prediction.json", cfg)):
            predictions[run.size.family] = stated
        if record := finished(run, cfg):
            records[run.name] = record
            with atomic_path(save / f"{run.name}.pt") as partial:
                try:
                    os.link(run.path("model.pt", cfg), partial)
                except OSError:  # a file system without links
                    shutil.copyfile(run.path("model.pt", cfg), partial)
    write_json(save / "prediction.json", predictions)
    write_json(save / "scaling_results.json", {
        "study": cfg.STUDY, "corpus": cfg.corpus, "device": device_name(cfg), "torch": torch.__version__,
        "knobs": {knob: getattr(cfg, knob) for knob in knob_names()},
        "schedule_steps": schedule_steps(windows, cfg), "copies": 1 - windows.share,
        "batch_tokens": cfg.BATCH_TOKENS, "seq_len": cfg.SEQ_LEN,
        "runs": [row for record in records.values() for row in record["rows"]]})
    write_json(save / "training_curves.json", {name: {
        **record["curve"], "val_tokens": [row["tokens"] for row in record["rows"]],
        "val_loss": [row["val_loss"] for row in record["rows"]]} for name, record in records.items()})


def gpu_fault():
    """In a sentence, why torch can't use the NVIDIA GPU of this machine; empty if it can."""
    if torch.cuda.is_available():
        (major, minor), built = torch.cuda.get_device_capability(), " ".join(torch.cuda.get_arch_list())
        fits = [int(y) <= minor if int(x) == major else kind == "compute" and int(x) < major
                for kind, x, y in re.findall(r"(sm|compute)_(\d+)(\d)", built)]  # PTX suits later cards, too
        return "" if any(fits) or not fits else (
            f"{torch.cuda.get_device_name()} is sm_{major}{minor}, and torch {torch.__version__} has kernels "
            f"only for {built}: use --DEVICE cpu or another torch")
    if torch.version.cuda:
        return (f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU; if there is one, its "
                "driver is too old for that (nvidia-smi shows its version): install a torch that fits it")
    if shutil.which("nvidia-smi"):
        return f"there is an NVIDIA driver, but torch {torch.__version__} has no CUDA: install one that has"
    return ""


def device_name(cfg):
    return torch.cuda.get_device_name() if cfg.DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ============================================================================================================
# 8 Fit: scaling_results.json -> fits.json, scaling_points.csv, *_scaling.png; --plan
# ============================================================================================================
# Two laws are fitted to the losses, by Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556):
#
#     L(N)    = c + a / N^alpha                   runs with the whole budget of characters
#     L(N, D) = E + A / N^alpha + B / D^beta      all runs
#
# The floor c decides the exponent: taken for the smallest loss, a true alpha of .27 comes back as .63; left
# out, as .086; scipy's curve_fit from its default start returns some 3,900 without a warning. With four to
# six sizes alpha and c are known mainly together, so every figure has an interval. For L(N) it is the profile
# interval, which covers 94 % in simulation where bootstraps of the points cover 79 to 90 %; for L(N, D) a
# bootstrap of whole training runs (93 to 97 %), since the budgets of one run share its noise.
#
# R^2 is no evidence: .999 goes together with +-50 % on alpha. So each law has to predict models that it has
# not seen, next to two forecasts that need no law: the ruler (a straight line in log N through the two sizes
# before) and persistence (no better than the size before). "Within 1 %" alone is no test, as the ruler
# passes it on three of four music tables.
#
# Left out: repeated characters at a discount (a plan stays below four passes instead), the crossing of two
# laws (nearly always extrapolated), weights by the noise of each size, which seeds tell too badly: with three
# the interval covers 56 to 91 %, with one noise for all sizes 79 to 96 %.

ROUNDING = 1e-8  # a relative difference of losses that means nothing
MISSED = 0.03  # a held-out error beyond which an exponent is no finding
BELIEVED = ("identified", "ridge")
MAX_EPOCHS = 4  # so many passes are worth nearly as much as new data (https://arxiv.org/abs/2305.16264)
ENDS = ("value", "lo", "hi")  # of an estimate
DELTA = 1e-3  # residuals of log L beyond it count by their size, not by their square


class Law(dict):
    """A fitted law; as a dict, the figures that fits.json keeps.

    best: its parameters (log A, log B, log E, alpha, beta); an L(N) has B = 0. others: (k, 5), what the data
    allow besides: the border of the profile region of an L(N), bootstrap draws of an L(N, D); the ends of an
    interval are `quantiles` of these. sigma: standard deviation of log L from run to run; noise: half of its
    95 % interval.
    """
    best, others, quantiles, sigma, noise = None, (), (0.025, 0.975), math.nan, math.nan

    def interval(self, quantity):
        """Array (value, lo, hi) of a function of parameters (..., 5); without `others` the ends are nan."""
        value = quantity(self.best)
        if not len(self.others):
            return np.array([value, np.nan * value, np.nan * value])
        return np.array([value, *np.quantile(quantity(self.others), self.quantiles, axis=0)])

    def predict(self, N, D=1.0):
        """(3, len(N)): losses at sizes N after D characters, and the ends of their intervals."""
        return self.interval(lambda p: law_loss(p[..., None, :], np.atleast_1d(N), D))


def law_loss(p, N, D):
    """E + A / N^alpha + B / D^beta for parameters p (..., 5), which broadcast with N and D."""
    log_A, log_B, log_E, alpha, beta = np.moveaxis(p, -1, 0)
    return np.exp(log_E) + np.exp(log_A - alpha * np.log(N)) + np.exp(log_B - beta * np.log(D))


def check_columns(*columns):
    """The columns of a table of sizes and losses as arrays; raises UserError where they are none."""
    columns = [np.atleast_1d(np.asarray(column, float)) for column in columns]
    need(columns[0].ndim == 1 and len({column.shape for column in columns}) == 1,
         "sizes, budgets and losses must be columns of one length")
    need(all(np.isfinite(column).all() and (column > 0).all() for column in columns),
         "sizes, budgets and losses must be positive numbers: leave out what is missing")
    return columns


def estimate(values):
    """{"value", "lo", "hi"} of three numbers, None for one that JSON can't hold."""
    values = np.array(values, float)
    return {end: float(v) if np.isfinite(v) else None for end, v in zip(ENDS, values, strict=True)}


def attempt(law, *args, **kwargs):
    """The result of `law`, or why it was refused."""
    try:
        return law(*args, **kwargs)
    except UserError as error:
        return Law(status="refused", reason=str(error))


# --- 1. L(N): for a given alpha a straight line

class Points(NamedTuple):
    """Losses ready to fit, one entry a size, from small to large."""
    x: np.ndarray  # log(N / smallest N)
    y: np.ndarray  # mean of log L
    runs: np.ndarray  # runs of this size: the weight of y
    within: float  # sum of squares of log L of all runs around the mean of their size
    origin: float  # log(smallest N)


def check_points(N, L, least=4):
    """The Points of losses L at sizes N; raises UserError where no falling law can be meant."""
    N, L = check_columns(N, L)
    order = np.lexsort((L, N))  # not even rounding may depend on the order of the rows
    sizes, which, runs = np.unique(N[order], return_inverse=True, return_counts=True)
    need(len(sizes) >= least,
         f"a power law with an offset needs at least {least} sizes, this table has {len(sizes)}")
    x, y = np.log(sizes / sizes[0]), np.log(L[order])
    mean = np.bincount(which, y) / runs
    need(np.polyfit(x, mean, 1, w=np.sqrt(runs))[0] < -1e-9 and mean[-1] < mean[0],
         "the loss does not fall with size, so there is no power law to fit")
    return Points(x, mean, runs, np.sum((y - mean[which])**2), np.log(sizes[0]))


class Lines:
    """The best a, c >= 0 for each exponent alpha (k, 1), and S, the sum of squared residuals of log L.

    For a given alpha the law is a straight line in f = (N / smallest N)^-alpha with slope a and intercept c,
    so a regression finds it; a few repetitions turn relative residuals into those of log L (Gauss-Newton).
    """

    def __init__(self, points, alpha):
        f = np.exp(-alpha * points.x)
        model = np.exp(points.y) + 0 * f
        for _ in range(5):
            z = model * (1 + np.clip(points.y - np.log(model), -0.5, 0.5))
            w = points.runs / model**2
            sw, sf, sz, sff, sfz = (np.sum(w * v, 1, keepdims=True) for v in (1, f, z, f * f, f * z))
            det = sw * sff - sf**2
            self.free = (sff * sz - sf * sfz) / det  # c, were it free to be negative
            self.c = np.clip(self.free, 0, sz / sw)
            self.a = np.maximum((sfz - self.c * sf) / sff, 1e-9 * sz / sw)
            model = self.a * f + self.c
        self.S = np.sum(points.runs * (points.y - np.log(model))**2, 1, keepdims=True) + points.within
        self.sd, self.sf, self.sff, self.sfz = np.sqrt(sff / det), sf, sff, sfz

    def border(self, limit):
        """(a, c), each (k, m): the laws of these exponents with S = limit, an ellipse cut off at c = 0."""
        reach = np.sqrt(np.maximum(limit - self.S + ((self.c - self.free) / self.sd)**2, 0))
        c = np.maximum(self.free + reach * self.sd * np.cos(np.linspace(0, np.pi, 61)), 0)
        left = np.maximum(reach**2 - ((c - self.free) / self.sd)**2, 0)
        a, half = (self.sfz - c * self.sf) / self.sff, np.sqrt(left / self.sff)
        return np.maximum(np.hstack([a - half, a + half]), 1e-9 * self.a), np.hstack([c, c])


def fit_curve(points):
    """The best L(N), and around it all that the points allow at 95 % (Bates and Watts 1988, chapter 6)."""
    def profile(log_alpha):
        return Lines(points, np.exp(np.reshape(log_alpha, (-1, 1)))).S[:, 0]

    def parameters(alpha, a, c):  # for sizes in place of N / smallest N
        with np.errstate(divide="ignore"):
            columns = np.log(a) + alpha * points.origin, -np.inf, np.log(c), alpha, 1.0
        return np.stack(np.broadcast_arrays(*columns), -1).reshape(-1, 5)

    # 1. The best exponent. Beyond these ends no size, or none but the smallest, tells a law from a constant.
    ends = low, high = np.log([1e-3 / points.x[-1], 40 / np.diff(points.x).min()])
    for _ in range(9):
        grid = np.linspace(low, high, 41)
        best = profile(grid).argmin()
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    law, line = Law(), Lines(points, np.exp(grid[[[best]]]))
    law.best, law.S = parameters(np.exp(grid[best]), line.a, line.c)[0], line.S.item()
    law.closed, law.quantiles, law.p_value = np.full(2, False), (0, 1), 1.0

    # 2. The noise: by the seeds, if three sizes have several, as these do not trust the law; else by the law.
    sizes, runs = len(points.x), int(points.runs.sum())
    squares, dof, lack = law.S, runs - 3, sizes - 3
    if (points.runs > 1).sum() >= 3:
        squares, dof = points.within, runs - sizes
        if lack:
            law.p_value = stats.f.sf((law.S - squares) / lack / max(squares / dof, ROUNDING**2), lack, dof)
    if dof == 0:
        return law
    law.sigma = np.sqrt(max(squares / dof, ROUNDING**2))
    law.noise = law.sigma * stats.t.ppf(0.975, dof)

    # 3. All laws whose S is above the least one by no more than that noise explains.
    limit = law.S + law.noise**2
    law.closed = profile(ends) > limit
    ends = [optimize.brentq(lambda v: profile(v)[0] - limit, grid[best], end) if closed else end
            for end, closed in zip(ends, law.closed, strict=True)]
    alpha = np.exp(np.linspace(*ends, 61))[:, None]
    law.others = parameters(alpha, *Lines(points, alpha).border(limit))
    return law


def fit_power_law(N, L):
    """Fits L = a N^-alpha + c, a, c >= 0, to losses L (nats, one per trained model) at sizes N -> Law.

    Least squares on log L, with 95 % profile intervals. Keys: "alpha", "a", "c" = {"value", "lo", "hi"}, None
    for an end that the data leave open (for c: 0 is not excluded); "status" identified | ridge (only alpha
    and c together are known) | not_identified, and "reason"; the others are explained in GLOSSARY. Raises
    UserError for fewer than four sizes, values that are not finite and positive, losses that do not fall.
    """
    points = check_points(N, L)
    N, L = np.array(sorted(zip(*check_columns(N, L), strict=True))).T
    law, sizes = fit_curve(points), np.unique(N)
    alpha = law.interval(lambda p: p[..., 3])
    with np.errstate(over="ignore"):  # a is the loss of a model of one parameter
        a, c = (law.interval(lambda p, i=i: np.exp(p[..., i])) for i in (0, 2))
    alpha[1:][~law.closed] = a[1:][~law.closed] = np.nan
    c[1] = c[1] or np.nan
    law |= {"alpha": estimate(alpha), "a": estimate(a), "c": estimate(c)}

    def predicted(n, smaller):
        rest, losses = N <= smaller, L[N == n]
        return with_outcome(state_prediction({"N": N[rest], "L": L[rest]}, n, runs=len(losses)), losses)
    law["holdout"] = predicted(sizes[-1], sizes[-2])
    law["holdout_two"] = [predicted(n, sizes[-3]) for n in sizes[-2:]]
    law["loo_alpha"] = []
    for keep in ~np.eye(len(sizes), dtype=bool):
        rest = points._replace(x=points.x[keep], y=points.y[keep], runs=points.runs[keep])
        law["loo_alpha"].append(float(fit_curve(rest).best[3]))
    law["local_slopes"] = (np.diff(points.y) / np.diff(points.x)).tolist()

    size = np.expm1(points.x)  # N - smallest N in place of log N makes an exponential of the power law
    law["exponential"] = fit_curve(points._replace(x=size / np.median(size))).S
    law["log_linear"] = straight_line(L, np.log(N))
    faults = not_excluded(law, law.S, len(L))
    if law.p_value < 0.01:
        faults.append("the law misses the points by more than their noise explains")
    law["status"], law["reason"] = verdict(law, ["alpha"], faults)
    law |= {"sigma_log": float(np.sqrt(law.S / max(len(L) - 3, 1))), "objective": law.S, "n_points": len(L)}
    return law


# --- 2. Predictions of models that the law has not seen

def state_prediction(smaller, largest, *, runs=1):
    """The mean loss of `runs` models of `largest` parameters, by smaller ones {"N": ..., "L": ...}.

    Returns what `forecast` does, "n" and "reason", why a None is None.
    """
    N, L = smaller["N"], smaller["L"]
    law = attempt(lambda: fit_curve(check_points(N, L, least=3)))
    none = dict.fromkeys(("predicted", "lo", "hi", "noise", "ruler", "persistence"))
    found = none if law.best is None else forecast(law, *check_columns(N, L), largest, runs=runs)
    alone = "" if len(law.others) else "three points leave nothing to judge the noise by"
    return {"n": float(largest), "reason": law.get("reason", alone), **found}


def forecast(law, N, L, largest, *, D=1.0, runs=1):
    """What a law fitted to losses L at sizes N says of a larger model: {"predicted", "lo", "hi", "noise"},
    and two baselines: {"ruler", "persistence"}.

    The interval is the law's with the noise of the runs in quadrature, on the log scale; noise is the
    standard error of log L. The ruler goes on with the slope per log N between the two largest sizes;
    persistence is the loss of the largest.
    """
    loss, lo, hi = law.predict(largest, D)[:, 0]
    below, above = np.hypot(np.maximum(np.log([loss / lo, hi / loss]), 0), law.noise / np.sqrt(runs))
    sizes = np.unique(N)[-2:]
    before, last = (np.exp(np.log(L[N == n]).mean()) for n in sizes)
    slope = (last - before) / np.log(sizes[1] / sizes[0])
    found = {"predicted": loss, "lo": loss * np.exp(-below), "hi": loss * np.exp(above),
             "noise": law.sigma / np.sqrt(runs), "ruler": last + slope * np.log(largest / sizes[1]),
             "persistence": last}
    return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}


def with_outcome(stated, losses):
    """A stated prediction and what came of it, the geometric mean of the `losses` of the runs.

    Errors are relative; "share_of_last_step" is the law's error over what the largest model gained on the one
    before. A hit beats the ruler, and its interval holds the truth and excludes persistence.
    """
    observed = float(np.exp(np.mean(np.sort(np.log(losses)))))
    predicted, ruler, before = (stated[name] for name in ("predicted", "ruler", "persistence"))
    out = {**stated, "observed": observed, "share_of_last_step": None, "hit": None}
    for name, value in (("error", predicted), ("ruler_error", ruler), ("persistence_error", before)):
        out[name] = value / observed - 1 if value else None
    if predicted and before > observed:
        out["share_of_last_step"] = abs(predicted - observed) / (before - observed)
    if predicted and stated["lo"] is not None and stated["hi"] is not None:
        inside, stays = (stated["lo"] <= loss <= stated["hi"] for loss in (observed, before))
        out["hit"] = bool(abs(out["error"]) < abs(out["ruler_error"]) and inside and not stays)
    return out


def straight_line(L, *columns):
    """The sum of squared relative residuals of the best L linear in these columns."""
    design = np.stack([*columns, np.ones_like(L)], 1) / L[:, None]
    return float(np.linalg.lstsq(design, np.ones_like(L), rcond=None)[1].sum())


def not_excluded(law, S, n_points):
    """Complaints about laws without an exponent that are not 20 times less likely, by their S.

    Without this 26 of 96 exponentials, 33 of 192 stairs and slow straight lines were given an exponent.
    """
    names = [name for name in ("exponential", "log_linear") if name in law]
    return [f"the law {name}, which has no exponent, is not excluded" for name in names
            if n_points * np.log((law[name] + ROUNDING**2) / (S + ROUNDING**2)) < 2 * np.log(20)]


def verdict(law, exponents, faults=()):
    """(status, reason): may these exponents be believed? Thresholds set by simulation, see bench_fit.py."""
    faults, wide, missed = list(faults), [], abs(law["holdout"]["error"] or 0)
    for name in exponents:
        value, lo, hi = law[name].values()
        if lo is None or hi is None:
            faults.append(f"the data do not bound {name}")
        elif hi - lo > value:
            wide.append(f"the interval of {name} is wider than {name}")
    if missed > MISSED:
        faults.append(f"the largest model is missed by {missed:.1%}")
    if faults or wide:
        return ("not_identified", "; ".join(faults)) if faults else ("ridge", "; ".join(wide))
    return "identified", "bounded, and the largest model is predicted"


# --- 3. L(N, D): Huber loss on log residuals, bootstrap over runs

def huber_sum(p, u, v, y, weight):
    """(sum of weight * Huber(r / DELTA), its gradient) of r = y - log(A e^(-alpha u) + B e^(-beta v) + E).

    p = logs of (A, B, E, alpha, beta); u, v, y are log N, log D, log L, centred: nothing overflows.
    """
    alpha, beta = np.exp(np.minimum(p[3:], 5))
    exponents = np.array((p[0] - alpha * u, p[1] - beta * v, np.full(len(u), p[2])))
    terms = np.exp(np.clip(exponents, -300, 300))
    total = terms.sum(0)
    r = (y - np.log(total)) / DELTA
    slope = np.clip(r, -1, 1)  # of the Huber loss
    pull = terms * (-weight * slope / (DELTA * total))
    gradient = np.array((*pull.sum(1), -alpha * (pull[0] @ u), -beta * (pull[1] @ v)))
    return weight @ (slope * (r - slope / 2)), gradient


def fit_surface(N, D, L, run_id, n_boot=0):
    """The best L(N, D), and as `others` n_boot refits of whole runs drawn with replacement."""
    logs = np.log([N, D, L])
    means = logs.mean(1, keepdims=True)
    u, v, y = logs - means

    def descend(start, weight):
        # The objective is a sum of r / DELTA: a mean of r is so small that default tolerances stop at once.
        found = optimize.minimize(huber_sum, start, (u, v, y, weight), method="L-BFGS-B", jac=True,
                                  options={"ftol": 1e-12, "gtol": 1e-8, "maxiter": 2000, "maxcor": 20})
        return found.fun, found.x

    def parameters(p):  # for N, D and L that are not centred
        alpha, beta = np.exp(p[3:])
        return [*p[:3] + means[2] + np.array([alpha, beta, 0]) * means[:, 0], alpha, beta]

    # Starts: for each pair of exponents the terms A, B, E are linear in L.
    starts = []
    for alpha, beta in itertools.product(np.geomspace(0.05, 1.5, 8), repeat=2):
        design = np.exp([-alpha * u - y, -beta * v - y, -y])  # relative residuals
        terms, error = optimize.nnls(design.T, np.ones_like(y))
        starts.append((error, *np.log(np.maximum(terms, 1e-4 * np.exp(y.min()))), *np.log([alpha, beta])))
    objective, best = min((descend(start[1:], np.ones_like(y)) for start in sorted(starts)[:3]),
                          key=lambda fit: fit[0])
    law = Law()
    law.objective, law.best = float(objective), np.array(parameters(best))
    law.sigma = np.sqrt(np.sum(np.log(L / law_loss(law.best, N, D))**2) / max(len(L) - 5, 1))
    law.noise = 1.96 * law.sigma

    names, runs = np.unique(run_id, return_inverse=True)
    rng, counts = np.random.default_rng(0), []
    while len(counts) < n_boot:
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        if len(np.unique(N[drawn[runs] > 0])) >= 3:  # fewer sizes can't hold the law
            counts.append(drawn)
    if counts:
        different, which = np.unique(counts, axis=0, return_inverse=True)  # 126 of five runs
        refits = [parameters(descend(best, count[runs])[1]) for count in different]
        law.others = np.array(refits)[which.ravel()]
    return law


def fit_parametric_loss(N, D, L, *, run_id=None, n_boot=400):
    """Fits L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022) to losses L (nats) of N-parameter models
    after D tokens -> Law: least sum of Huber(r / DELTA) of log residuals r.

    run_id names the training run of a point. The 95 % intervals are percentiles of a bootstrap over runs (400
    draws give an end to 7 % of half its width); None for an end that the data leave open (for E: 0 is not
    excluded). Keys as in fit_power_law. Raises UserError where the terms can't be told apart.
    """
    N, D, L = check_columns(N, D, L)
    run_id = np.arange(len(L)) if run_id is None else np.asarray(run_id)
    need(run_id.shape == L.shape, "run_id must name the run of every loss")
    need(n_boot >= 2, "n_boot, the number of bootstrap draws, must be at least 2")
    counts = len(np.unique(N)), len(np.unique(D)), len(L)
    need(min(np.subtract(counts, (4, 3, 6))) >= 0,
         "L(N, D) needs 4 sizes, 3 token budgets and 6 points; this table has {}, {}, {}".format(*counts))
    need(abs(np.corrcoef(np.log(N), np.log(D))[0, 1]) < 0.999,
         "sizes and token budgets rise together: vary one alone")
    order = np.lexsort((L, D, N))
    N, D, L, run_id = N[order], D[order], L[order], run_id[order]
    slopes = np.linalg.lstsq(np.stack([np.log(N), np.log(D), N**0], 1), np.log(L), rcond=None)[0]
    need(max(slopes[:2]) < -1e-9, "the loss does not fall with size and with tokens: there is no law to fit")

    law = fit_surface(N, D, L, run_id, n_boot)
    open_at = {"A": (-50, 500), "B": (-50, 500), "E": (np.log(1e-3 * L.min()), 500),
               "alpha": (0.01, 5), "beta": (0.01, 5)}
    for i, (name, (least, most)) in enumerate(open_at.items()):
        value, lo, hi = law.interval(lambda p, i=i: p[..., i])
        found = np.array([value, lo if lo > least else np.nan, hi if hi < most else np.nan])
        law[name] = estimate(found if i > 2 else np.exp(found))

    # The largest size at its largest budget, from all runs of smaller sizes.
    n, d = N.max(), D[N == N.max()].max()
    rest, whole, losses = N < n, (N < n) & (D == d), L[(N == n) & (D == d)]
    smaller = fit_surface(N[rest], D[rest], L[rest], run_id[rest], min(n_boot, 100))
    smaller.sigma, smaller.noise = law.sigma, law.noise
    stated = forecast(smaller, N[whole], L[whole], n, D=d, runs=len(losses))
    law["holdout"] = with_outcome({"n": float(n), "d": float(d), "reason": "", **stated}, losses)

    law["log_linear"] = straight_line(L, np.log(N), np.log(D))
    faults = not_excluded(law, np.sum(np.log(L / law_loss(law.best, N, D))**2), len(L))
    law["status"], law["reason"] = verdict(law, ("alpha", "beta"), faults)
    law |= {"objective": law.objective, "sigma_log": float(law.sigma), "n_points": len(L),
            "n_runs": len(np.unique(run_id))}
    return law


# --- 4. What follows: the best split of compute, the families side by side

def compute_frontier(law, flops, flops_per_parameter_token=6.0, most_tokens=np.inf):
    """The best split of m budgets of FLOPs C into N parameters and D tokens.

    N* = G (C/6)^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)) (Hoffmann et al. 2022, eq. 4),
    C = flops_per_parameter_token N D in place of 6 N D, and D at most most_tokens; for a Law of
    fit_parametric_loss: {"n", "d", "loss"}, each (3, m): value, lo, hi.
    """
    pairs = np.atleast_1d(flops) / flops_per_parameter_token

    def split(p):
        p = p[..., None, :]
        alpha, beta = np.maximum(p[..., 3], 1e-3), np.maximum(p[..., 4], 1e-3)
        log_n = (np.log(alpha / beta) + p[..., 0] - p[..., 1] + beta * np.log(pairs)) / (alpha + beta)
        n = np.maximum(np.exp(np.minimum(log_n, 200)), pairs / most_tokens)
        return np.stack([n, pairs / n, law_loss(p, n, pairs / n)], -1)
    return dict(zip(("n", "d", "loss"), np.moveaxis(law.interval(split), -1, 0), strict=True))


def plan_row(runs, surface, flops):
    """The best use of `flops` for one family: {"flops", "n", "d", "loss", "epochs"}, or {"reason"}: none has
    more than MAX_EPOCHS passes over the training characters, or a loss that a run has reached.
    """
    if surface["status"] not in BELIEVED:
        return {"reason": f"no law L(N, D) to plan by: {surface['reason']}"}
    best, one_epoch = min(runs, key=lambda run: run["val_loss"]), runs[-1]["tokens"] / runs[-1]["epochs"]
    per_pair = runs[-1]["flops"] / (runs[-1]["n_fit"] * runs[-1]["tokens"])
    found = compute_frontier(surface, flops, per_pair, MAX_EPOCHS * one_epoch)
    row = {"flops": float(flops), **{key: estimate(values[:, 0]) for key, values in found.items()}}
    if row["loss"]["value"] >= best["val_loss"]:
        return {"reason": f"{best['run']} has reached {best['val_loss']:.4f}, which this would not beat"}
    return {**row, "epochs": row["d"]["value"] / one_epoch}


def by_family(rows):
    """{family: its rows of scaling_results.json, the largest model with the largest budget last}, in the
    order of FAMILIES."""
    there = [row["family"] for row in rows]
    families = {family: [] for family in [*FAMILIES, *there] if family in there}
    for row in sorted(rows, key=lambda row: (row["n_fit"], row["tokens"])):
        families[row["family"]].append(row)
    return families


def main_table(runs, column="n_fit"):
    """(N, L) of the full-budget runs of one family; another column may stand in for N."""
    rows = [(run[column], run["val_loss"]) for run in runs if run["main"]]
    return np.array(rows, float).reshape(-1, 2).T


def compare_families(families, laws, bits_per_note=None):
    """For every pair of families: the loss of the first against the second's, by their laws, at the largest
    size and at the largest cost that both have.

    Of each {"at", "value", "lo", "hi", "nats", "bits_per_note"}: the ratio, the first minus the second, and
    that in bits per note, if told what one nat per character means; or {"status": "refused", "reason"}.
    """
    def difference(first, second):  # intervals in quadrature (Zou and Donner 2008, 10.1002/sim.3095)
        (a, a_lo, a_hi), (b, b_lo, b_hi) = first, second
        return np.array([a - b, a - b - np.hypot(a - a_lo, b_hi - b), a - b + np.hypot(a_hi - a, b - b_lo)])

    rows = []
    for pair in itertools.combinations(families, 2):
        rows.append({"families": list(pair)})
        for key, column, name in (("equal_parameters", "n_fit", "power_law"),
                                  ("equal_flops", "flops", "power_law_flops")):
            both = [laws[family][name] for family in pair]
            reasons = [law["reason"] for law in both if law["status"] == "refused"]
            rows[-1][key] = {"status": "refused", "reason": "; ".join(reasons)}
            if not reasons:
                at = min(max(run[column] for run in families[family]) for family in pair)
                losses = [law.predict(at)[:, 0] for law in both]
                nats, ratio = difference(*losses), np.exp(difference(*np.log(losses)))
                rows[-1][key] = {"at": float(at), **estimate(ratio), "nats": estimate(nats)}
                if bits_per_note:
                    rows[-1][key]["bits_per_note"] = estimate(bits_per_note * nats)
    return rows


def with_ends(estimate):
    """"value [lo, hi]" for people, an open end as such."""
    return "{} [{}, {}]".format(*("open" if v is None else f"{v:.3g}" for v in estimate.values()))


def describe(law, runs):
    """What a law and the range of the runs behind it support, in sentences for people."""
    if law["status"] == "refused":
        return f"No law: {law['reason']}."
    sizes, seeds = np.unique(main_table(runs)[0], return_counts=True)
    span = f"{len(sizes)} sizes within a factor of {sizes[-1] / sizes[0]:.0f}"
    span += f", {'/'.join(map(str, seeds))} seeds"
    if sizes[-1] < 100 * sizes[0]:
        span += ": too narrow a range to carry an exponent over to larger models"
    if law["status"] == "not_identified":
        return f"These runs support no exponent: {law['reason']}. {span}."
    text, held = f"alpha = {with_ends(law['alpha'])}, {law['status']}", law["holdout"]
    if law["status"] == "ridge":
        text += f" ({law['reason']}: only alpha and c together are known)"
    if held["error"] is not None:
        text += f"; the largest model is predicted from the others to {held['error']:+.1%}"
        if held["share_of_last_step"] is not None:
            text += f", {held['share_of_last_step']:.0%} of the last step"
        text += f" (a ruler: {held['ruler_error']:+.1%}; noise of that loss: {held['noise'] or 0:.1%})"
    return f"{text}. {span}."


# --- 5. The stage

GLOSSARY = {
    "power_law": "L = a N^-alpha + c, a, c >= 0, nothing fixed; least squares on log L, for each alpha a "
                 "linear regression; 95 % profile intervals; runs with main = true; power_law_total_n, "
                 "power_law_flops: the same with n_params or flops as N",
    "parametric": "L = E + A / N^alpha + B / D^beta, nothing fixed; sum of Huber(r / 1e-3), r log residual; "
                  "L-BFGS-B from the best 3 of 64 starts, ftol 1e-12; 95 % intervals: bootstrap over runs",
    "verdict": "status identified, ridge (alpha and c are known only together), not_identified or refused, "
               "and its reason. value, lo, hi: estimate and ends of its interval, null if open",
    "quality": "objective: what was minimised, over n_points losses of n_runs; sigma_log: residual standard "
               "deviation of log L; exponential, log_linear: sums of squared residuals, as the objective of "
               "power_law, of c + a e^-kN and of a straight line, in log D, too; loo_alpha: without each "
               "size in turn; local_slopes: d log L / d log N between sizes",
    "prediction": "of the largest model, stated before it was measured; holdout, holdout_two: of the largest "
                  "one or two sizes from the others. Each: predicted, the baselines ruler and persistence, "
                  "observed; error, ruler_error, persistence_error: relative; noise: standard error of log "
                  "observed; share_of_last_step; hit",
    "frontier": "best N and D for so many hours at flops_per_s; frontier_left_out: hours without, and why",
    "comparison": "ratio of the first family's loss to the second's, at the largest N or FLOPs of both",
    "points": "n_fit: N, without embedding; n_params: all; n_non_embedding: without output layer, too; "
              "tokens: D, characters counted once; seen: all that went through the model; unique_tokens: "
              "distinct; flops: C of what was seen, attention too; lr: peak rate; val_loss: L of the mean of "
              "the weights, nats per character; val_loss_se: standard error over tunes",
    "left_out": "no run; L(N) takes the full-budget runs (main = true), L(N, D) all"}


def surface_of(runs, n_boot):
    """L(N, D) of the rows of one family."""
    columns = [[run[column] for run in runs] for column in ("n_fit", "tokens", "val_loss", "run")]
    return attempt(fit_parametric_loss, *columns[:3], run_id=columns[3], n_boot=min(n_boot, 400))


def fit_family(runs, stated, n_boot):
    """All that fits.json says about one family; `stated`: the prediction made before its largest model."""
    N, L = main_table(runs)
    laws = {key: attempt(fit_power_law, *main_table(runs, column)) for key, column in
            (("power_law", "n_fit"), ("power_law_total_n", "n_params"), ("power_law_flops", "flops"))}
    out = {"verdict": describe(laws["power_law"], runs), **laws, "parametric": surface_of(runs, n_boot)}
    out["flops_per_s"] = runs[-1]["flops_per_token"] * (runs[-1]["tokens_per_s"] or 0)
    out["frontier"], out["frontier_left_out"] = [], []
    for hours in (0.25, 1, 4, 24) if out["flops_per_s"] else ():
        row = plan_row(runs, out["parametric"], 3600 * hours * out["flops_per_s"])
        out["frontier_left_out" if "reason" in row else "frontier"].append({"hours": hours, **row})
    if stated and stated.get("predicted") and stated["n"] == N.max():
        out["prediction"] = with_outcome(stated, L[N == N.max()])
    return out


@stage(version=5, knobs="BOOTSTRAP", reads=(tokenize, train), root="SAVE_DIR")
def fit(cfg):
    """Laws, comparison, figures: scaling_results.json -> fits.json, scaling_points.csv, *.png in SAVE_DIR."""
    folder = Path(cfg.SAVE_DIR)
    study, stated = read_json(folder / "scaling_results.json"), read_json(folder / "prediction.json", {})
    families = by_family(study["runs"])
    with workers(cfg) as pool:
        jobs = {name: pool.schedule(fit_family, (runs, stated.get(name), cfg.BOOTSTRAP))
                for name, runs in families.items()}
        laws = {name: job.result() for name, job in jobs.items()}

    val = read_json(cfg.tokens_root / "stats.json", {}).get("splits", {}).get("val", {"notes": 0})
    bits = (val["chars"] + val["tunes"]) / val["notes"] / math.log(2) if val["notes"] else None  # of a nat
    comparison = compare_families(families, laws, bits)
    fits = {"study": study["study"], "corpus": study["corpus"], "method": GLOSSARY, "families": laws,
            "comparison": comparison, "points": study["runs"]}
    text = json.dumps(fits, default=json_default)
    write_json(folder / "fits.json", json.loads(text, parse_constant=lambda constant: None))
    with atomic_path(folder / "scaling_points.csv") as path, open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(study["runs"][0]))
        table.writeheader()
        table.writerows(study["runs"])

    for path in folder.glob("*_scaling*.png"):  # also of a family that is no longer in the study
        path.unlink()
    figures = [("combined_scaling", draw_combined, families, laws),
               ("training_curves", draw_curves, families, read_json(folder / "training_curves.json", {}))]
    figures += [(f"{name}_scaling", draw_family, name, runs, laws[name]) for name, runs in families.items()]
    with workers(cfg) as pool:
        jobs = [pool.schedule(save_figure, (folder, *figure)) for figure in figures]
        files = [path for job in jobs for path in job.result()]

    for name, law in laws.items():
        slopes = ", ".join(f"{slope:+.3f}" for slope in law["power_law"].get("local_slopes", ()))
        say(f"  {name:12s} {law['verdict']}" + f" Slopes of log L by log N: {slopes}." * bool(slopes))
    for pair, key in itertools.product(comparison, ("equal_parameters", "equal_flops")):
        unit, found = ("bits per note" if bits else "nats per character"), pair[key]
        gap = found.get("bits_per_note") or found.get("nats")
        say("  {} minus {}, {}: ".format(*pair["families"], key.replace("_", " "))
            + (f"{with_ends(gap)} {unit}" if gap else found["reason"]))
    return [folder / "fits.json", folder / "scaling_points.csv", *files]


def plan(cfg, budget):
    """Prints the best N and D of each family for a time ("2h", "90m") or for training FLOPs ("1e18")."""
    path = Path(cfg.SAVE_DIR, "fits.json")
    fits = read_json(path)
    need(fits, f"--plan needs {path}, which the stage fit writes: run the study first")
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)([smhd]?)", budget.strip().lower())
    need(match and float(match[1]) > 0, f"--plan takes 2h, 90m or FLOPs such as 1e18, not {budget!r}")
    amount, seconds = float(match[1]), {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(match[2])
    need(seconds or amount >= 1e6, f"{budget} FLOPs train nothing; did you mean {budget}h?")

    form = "{:18s}{:>30s}{:>30s}{:>8s}{:>24s}"
    print(form.format("", "N, parameters", "D, characters", "epochs", "nats per character"))
    notes = [f"In brackets: 95 % intervals. No plan passes over the data more than {MAX_EPOCHS} times."]
    for family, runs in by_family(fits["points"]).items():
        best, law = min(runs, key=lambda run: run["val_loss"]), fits["families"][family]
        columns = (f"{best[key]:.3g}" for key in ("n_fit", "tokens", "epochs", "val_loss"))
        print(form.format(f"{family}, best so far", *columns))
        flops, surface = amount * (seconds * law["flops_per_s"] if seconds else 1), law["parametric"]
        if surface["status"] in BELIEVED:  # only then are the draws worth being made again
            surface = surface_of(runs, cfg.BOOTSTRAP)
        row = plan_row(runs, surface, flops) if flops else {"reason": "its speed was not measured"}
        if "reason" in row:
            print(f"{family}, {budget}: {row['reason']}")
            continue
        n, d, loss = (with_ends(row[key]) for key in ("n", "d", "loss"))
        print(form.format(f"{family}, {budget}", n, d, f"{row['epochs']:.3g}", loss))
        notes.append(f"{family}: L(N, D) is {surface['status']}; {flops:.3g} FLOPs; "
                     f"{row['n']['value'] / runs[-1]['n_fit']:.2g} times the largest N so far, "
                     f"{row['d']['value'] / runs[-1]['tokens']:.2g} times the largest D.")
    print("\n".join(notes))


# --- 6. Figures; markers tell the families apart in grey, too

N_LABEL, D_LABEL = "N: parameters with output layer, without embedding", "D: training characters"
L_LABEL = "validation loss (nats per character)"


def sheet(columns, *panels):
    """(figure, [axes]) of panels (title, x label, y label, [x scale], [y scale]), so many side by side."""
    rows = math.ceil(len(panels) / columns)
    width, height = 5.5 * columns, 4.3 * rows  # inches; a layout engine takes as long again as drawing
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=0.8 / width, right=1 - 0.1 / width, bottom=0.6 / height, top=1 - 0.8 / height,
                           hspace=0.3, wspace=0.2)
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
    for axes, (title, x, y, *scales) in zip(places, panels, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel=x, ylabel=y, **dict(zip(("xscale", "yscale"), scales or ["log"], strict=False)))
        axes.grid(True, which="major", alpha=0.25)
    return figure, places


def save_figure(folder, name, draw, *what):
    """Writes what draw(*what) draws as name.png, the combined one also as .svg and .pdf, and each panel as
    name_panel<n>.png for narrow screens."""
    figure = draw(*what)
    figure.set_dpi(150)
    files = [folder / f"{name}.{kind}" for kind in ("png", "svg", "pdf")[:3 if "combined" in name else 1]]
    for file in files:
        with atomic_path(file) as path:
            figure.savefig(path, format=file.suffix[1:], dpi=150)
    with PIL.Image.open(files[0]) as image:
        for i, axes in enumerate(figure.axes):
            left, low, right, high = axes.get_tightbbox().padded(8).extents
            files.append(folder / f"{name}_panel{i}.png")
            image.crop((left, image.height - high, right, image.height - low)).save(files[-1])
    return files


def draw_law(axes, N, L, family, law, reach, floor=0.0):
    """All runs, and the law with its 95 % band as far as `reach` times the largest size; no law, no curve."""
    style, spread = FAMILIES[family], np.ptp(L) or 0.1 * L.max()
    axes.plot(N, L - floor, style.marker, color=style.colour, label=f"{style.label}, {len(N)} runs", zorder=3)
    if law["status"] in BELIEVED:
        at = np.geomspace(N.min() / 1.3, N.max() * reach, 31)
        loss, lo, hi = law.predict(at) - floor
        axes.fill_between(at, lo, hi, color=style.colour, alpha=0.15, lw=0)
        axes.plot(at, loss, style.line, color=style.colour, label=f"{style.label}, law, 95 % band")
    shown = np.concatenate([line.get_ydata() for line in axes.lines])
    low = max(shown.min(), 1e-3 * spread) / 3 if floor else max(shown.min() - 0.3 * spread, 0)
    axes.set_ylim(low, shown.max() + 0.2 * spread)


def draw_family(family, runs, fits):
    """The law with its held-out test, the reducible loss, the pair (alpha, c)."""
    (N, L), law, style = main_table(runs), fits["power_law"], FAMILIES[family]
    panels = [("a  Loss against size, extrapolated tenfold", N_LABEL, L_LABEL),
              ("b  Reducible loss: a line, if the law holds", N_LABEL, "L - c (nats)", "log", "log"),
              ("c  What is known of both, 95 %", "alpha", "c (nats per character)", "linear")]
    refused = law["status"] == "refused"
    figure, (first, *others) = sheet(1, panels[0]) if refused else sheet(3, *panels)
    title = textwrap.fill(f"{style.label}: {fits['verdict']}", 70 if refused else 200)
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    draw_law(first, N, L, family, law, 10)
    if not refused:
        draw_law(others[0], N, L, family, law, 3, law["c"]["value"])
        held, last = law["holdout"], N == N.max()
        first.plot(N[last], L[last], style.marker, mfc="white", mec=style.colour, zorder=4, label="held out")
        if held["lo"] and held["hi"]:
            ends = [[held["predicted"] - held["lo"]], [held["hi"] - held["predicted"]]]
            first.errorbar(1.25 * held["n"], held["predicted"], ends, fmt="D", ms=5, capsize=3, color="black",
                           label=f"predicted from the others, 95 % ({held['error']:+.1%})")
        others[1].plot(law["alpha"]["value"], law["c"]["value"], "+", color="black", ms=10, mew=1.5)
        if len(law.others):  # all laws that the points allow; its shadows are the intervals of each
            alpha, c = law.others[:, 3].reshape(61, -1)[:, 0], np.exp(law.others[:, 2]).reshape(61, -1)
            others[1].fill_between(alpha, c.min(1), c.max(1), color=style.colour, alpha=0.3)
            others[1].set_xlim(0, min(1.1 * alpha.max(), 4 * law["alpha"]["value"]))
    first.legend(fontsize=8)
    return figure


def draw_combined(families, laws):
    """Loss against size and against compute for all families, and the map of L(N, D) of each."""
    panels = [("a  Loss against size", N_LABEL, L_LABEL),
              ("b  Loss against compute", "C: training FLOPs, attention included", L_LABEL)]
    panels += [(f"{letter}  {FAMILIES[family].label}: lines of equal loss (nats per character)",
                N_LABEL, D_LABEL, "log", "log") for letter, family in zip("cdefghij", families, strict=False)]
    figure, (first, second, *others) = sheet(2, *panels)
    for axes, column, key in ((first, "n_fit", "power_law"), (second, "flops", "power_law_flops")):
        for family, runs in families.items():
            draw_law(axes, *main_table(runs, column), family, laws[family][key], 3)
        axes.legend(fontsize=8)
    for axes, family in zip(others, families, strict=True):
        draw_map(axes, FAMILIES[family], families[family], laws[family]["parametric"])
    return figure


def draw_map(axes, style, runs, law):
    """Lines of equal loss of L(N, D), the runs, and the compute-optimal frontier with its 95 % band."""
    N, D = np.array([[run["n_fit"], run["tokens"]] for run in runs], float).T
    n, d = np.geomspace(N.min() / 2, N.max() * 4, 80), np.geomspace(D.min() / 4, D.max() * 8, 80)
    axes.plot(N, D, style.marker, color=style.colour, ms=5, label="ends of runs")
    if law["status"] in BELIEVED:
        loss = law_loss(law.best, n, d[:, None])
        levels = np.geomspace(loss.min() * 1.01, loss.max(), 10)
        axes.clabel(axes.contour(n, d, loss, levels, colors="0.55", linewidths=0.8), fontsize=7, fmt="%.3g")
        best = compute_frontier(law, 6 * np.geomspace(n[0] * d[0], 1e3 * n[-1] * d[-1], 61))
        (at, lo, hi), tokens = best["n"], best["d"][0]
        axes.plot(at, tokens, "-", color="black", lw=1.5, label="best N and D for their compute, 95 % band")
        axes.fill_betweenx(tokens, lo, hi, color="black", alpha=0.12, lw=0)
    else:
        axes.plot([], [], " ", label=textwrap.fill(f"no map: {law['status']}, {law['reason']}", 60))
    axes.set(xlim=(n[0], n[-1]), ylim=(d[0], d[-1]))
    axes.legend(fontsize=8, loc="lower right", framealpha=0.95)


def draw_curves(families, curves):
    """Training (thin) and validation (marked) loss of every full run, from light to dark with size."""
    figure, places = sheet(len(families), *(
        (f"{FAMILIES[family].label}: training loss (thin), validation loss (marks)", D_LABEL,
         "loss (nats per character)", "linear") for family in families))
    for axes, (family, runs) in zip(places, families.items(), strict=True):
        shown = sorted((r for r in runs if r["main"] and r["run"] in curves), key=lambda r: r["n_fit"])
        for run, shade in zip(shown, colormaps["viridis"](np.linspace(0.85, 0, len(shown))), strict=True):
            curve = curves[run["run"]]
            late = len(curve["tokens"]) // 20  # the fall at the very beginning would squeeze the rest
            axes.plot(curve["tokens"][late:], curve["train_loss"][late:], color=shade, lw=0.5, alpha=0.4)
            axes.plot(curve["val_tokens"], curve["val_loss"], FAMILIES[family].marker, ls="-", color=shade,
                      mec="white", zorder=3, label=run["run"])
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axes.legend(fontsize=8)
    return figure


# ============================================================================================================
# 9 Sample and evaluate: checkpoints, tokens/test.bin -> evaluation.json, samples.jsonl, two sample folders
# ============================================================================================================
# Loss says how well a model predicts music; this section asks what music it makes. Tunes of every model are
# sampled, judged by two readers (ours, and abc2midi, which nobody here wrote), measured beside real tunes
# that no model has seen, and searched for passages of training tunes. Real tunes go through the same judges:
# a figure means something only beside theirs.
#
# Sampling knows no rule of music. --valid draws a bar again until it reads as a bar: that is sampling from
# the model under the condition that bars are right. It took the place of a grammar, which knew the notation a
# second time in 235 lines and chose 23 to 42 % of the characters itself.


# --- sampling

SAMPLE_BATCH = 64  # tunes sampled side by side on a CPU, where more are no faster
AHEAD = 32  # characters drawn on the device before the host looks at them
MAX_TRIES = 50  # for one bar of --valid
LONGEST_BAR = 400  # characters of a bar of one voice, or of a line of a header, with --valid


@torch.inference_mode()
def sample(model, vocab, prompts, *, max_chars=1_500, temperature=1.0, top_k=0, top_p=1.0, seed=0,
           valid=False, label="sample"):
    """Continues each prompt to its end token, or by `max_chars` characters.

    Returns [{"text", "ended"}], prompts included. Tunes are sampled side by side, each at its own place: the
    model's state remembers what was read, so a character costs one step, and a tune that has ended leaves its
    row to the next one. Tune i draws from its own stream (seed, i), whatever else is in the batch.
    temperature 0 takes the likeliest character. `valid` draws bars again that our reader does not find right
    (see Draft.keep_bar) and adds "bars", "tries" and "gave_up". Raises UserError for characters that the
    model does not know.
    """
    unknown = sorted(set("".join(prompts)) - set(vocab.chars[3:]))
    need(not unknown, f"the prompt has characters unknown to the model: {' '.join(map(repr, unknown))}")
    drafts = [Draft(prompt, vocab, max_chars, [seed, i]) for i, prompt in enumerate(prompts)]
    device, batch = next(model.parameters()).device, sample_batch(model)
    seats, waiting = drafts[:batch], collections.deque(drafts[batch:])
    state = model.empty_state(len(seats), model.seq_len)
    ahead = 1 if valid else min(AHEAD, model.seq_len // 4)
    bar = progress(desc=label, total=len(drafts), unit="tune", disable=not label)
    while seats:
        for row, tune in enumerate(seats):
            if tune.room < ahead:
                read = tune.read_window(model, ahead)
                tune.saved = tune.saved or (read, tune.room)
                put_row(state, row, read)

        chars = [torch.tensor([tune.ids[-1:] for tune in seats], device=device)]
        chance = torch.tensor(np.stack([tune.rng.random(ahead) for tune in seats]), device=device)
        for i in range(ahead):
            logits, state = model(chars[-1], state)
            chars.append(draw(logits[:, -1], chance[:, i], temperature, top_k, top_p)[:, None])

        for row, (tune, ids) in enumerate(zip(seats, torch.cat(chars[1:], 1).tolist(), strict=True)):
            tune.add(ids)
            if valid and tune.at_bar_end():
                if tune.keep_bar():
                    tune.saved = pick_rows(state, [row]), tune.room
                else:
                    put_row(state, row, tune.saved[0])
            if tune.done or not valid:
                tune.saved = None
            if tune.done and waiting:
                seats[row] = waiting.popleft()
        bar.update(sum(tune.done for tune in drafts) - bar.n)
        left = [row for row, tune in enumerate(seats) if not tune.done]
        if len(left) < len(seats):
            seats, state = [seats[row] for row in left], pick_rows(state, left)
    bar.close()
    return [tune.result(valid) for tune in drafts]


def sample_batch(model):
    """Tunes to sample side by side; on a GPU so many that their states fill a quarter of its free memory, as
    --valid and rows that move hold them two or three times."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return SAMPLE_BATCH
    row = sum(tensor.nbytes for tensor in flat(model.empty_state(1, model.seq_len)))
    torch.cuda.empty_cache()  # what training has left there is free, too
    return max(1, min(256, torch.cuda.mem_get_info(device)[0] // 4 // row))


class Draft:
    """A tune while it is sampled."""

    def __init__(self, prompt, vocab, max_chars, seed):
        self.prompt, self.vocab, self.rng = prompt, vocab, np.random.default_rng(seed)
        self.ids = [START, *vocab.encode(prompt).tolist()]
        self.most = len(self.ids) + max_chars
        self.ended = self.done = False
        self.room = 0  # characters that the model can read before its window is full
        # --valid: where the bar begins that is being drawn, the model's state and its room there; where the
        # tune may be cut, as nothing is held over; bars that were kept and drawn, tries of this one
        self.bar, self.saved, self.cut = len(self.ids), None, len(self.ids)
        self.bars = self.tries = self.tries_here = 0
        self.reader, (*lines, self.begun) = Reader(), prompt.split("\n")
        for line in lines:
            self.reader.read_line(line)

    @property
    def text(self):
        return self.vocab.decode(self.ids[1:])

    def read_window(self, model, ahead):
        """The state of a model that has read all of the tune but its last character; of a long one what a
        window of the training holds, see Windows: the beginning of the header, then the newest lines from a
        line's start, in all half of a window."""
        ids, half = self.ids, model.seq_len // 2
        if len(ids) + ahead > model.seq_len + 1:
            text = self.vocab.decode(ids[1:])
            head = min(1 + len(header_of(text)), 3 * model.seq_len // 8)
            newest = len(ids) - half + head
            line = 1 + text.find("\n", newest - 2) + 1  # its first character in ids
            ids = ids[:head] + ids[line if newest <= line < len(ids) else newest:]
        state = model.empty_state(1, model.seq_len)
        if len(ids) > 1:
            _, state = model(torch.tensor([ids[:-1]], device=next(model.parameters()).device), state)
        self.room = model.seq_len + 1 - len(ids)
        return state

    def add(self, ids):
        """Takes the characters that were drawn, up to the end of the tune."""
        self.room -= len(ids)
        for i in ids:
            self.ended = i == END
            self.ids += [i] * (not self.ended)
            self.done = self.ended or len(self.ids) >= self.most
            if self.done:
                break

    def at_bar_end(self):
        """Whether a bar of a voice, a line or the tune has come to its end, or a bar goes on for too long."""
        too_long = len(self.ids) - self.bar > LONGEST_BAR
        return self.ended or self.vocab.chars[self.ids[-1]] in "|\n" or too_long

    def keep_bar(self):
        """With --valid: whether our reader finds right what was just drawn: a bar of a voice, a line of the
        header, a tune that has ended. If not, it is forgotten; after MAX_TRIES the tune is given up."""
        drawn, after = self.vocab.decode(self.ids[self.bar:]), self.reader.fork()
        line = self.begun + drawn
        after.read_line(line)
        is_music, at_end = bool(MUSIC_LINE.match(line)), self.ended or line.endswith("\n")
        good = (line.endswith("|") or at_end) and line != "\n" and not after.faults
        good = good and bool(after.key or not is_music)
        good = good and not (self.ended and reader_faults(self.text, prompt=self.prompt)[0])
        self.tries += is_music and bool(drawn.strip())
        self.tries_here += 1
        if not good:
            self.ids, self.ended, self.room = self.ids[:self.bar], False, self.saved[1]
            self.done = self.tries_here == MAX_TRIES
            return False
        self.begun, self.tries_here, self.bar = line, 0, len(self.ids)
        self.bars += is_music and line.endswith("|")
        if at_end:
            self.reader, self.begun = after, ""
            self.cut = self.cut if after.ties or after.open_bar else self.bar
        return True

    def result(self, valid):
        if not valid:
            return {"text": self.text, "ended": self.ended}
        text = self.text if self.ended else self.text[:self.cut - 1]
        return {"text": text, "ended": self.ended, "bars": self.bars, "tries": self.tries,
                "gave_up": self.tries_here == MAX_TRIES}


def flat(state):
    """The tensors of a model's state, which has lists and tuples of them; each has the batch first."""
    return [state] if torch.is_tensor(state) else [tensor for part in state for tensor in flat(part)]


def put_row(state, row, other):
    """Writes the only row of another state of the model into a row of `state`."""
    for tensor, other_tensor in zip(flat(state), flat(other), strict=True):
        tensor[row] = other_tensor[0]


def pick_rows(state, rows):
    """A copy of some rows of a state."""
    return state[rows] if torch.is_tensor(state) else [pick_rows(part, rows) for part in state]


def draw(logits, chance, temperature, top_k, top_p):
    """Logits (R, V), chance (R,) in [0, 1) -> ids (R,), each by its probability among the likeliest; never
    start or unknown. All of it happens on the device."""
    logits[:, START] = logits[:, UNKNOWN] = -math.inf  # a list of places would make the GPU wait
    if temperature == 0:
        return logits.argmax(1)
    ranked, order = logits.double().sort(dim=1, descending=True, stable=True)
    share = (ranked / temperature).softmax(1)
    share[share.cumsum(1) - share >= top_p] = 0  # nucleus: Holtzman et al. 2020, arXiv 1904.09751
    share[:, top_k or share.size(1):] = 0
    reach = share.cumsum(1)
    place = (reach <= chance[:, None] * reach[:, -1:]).sum(1).clamp(max=(share > 0).sum(1) - 1)
    return order.gather(1, place[:, None])[:, 0]


# --- judging

MIN_TUNE_NOTES = 8  # fewer notes, or fewer than three pitches, are no tune
HEADER = re.compile(r"X:1\nL:1/\d+\nM:\d+/\d+\nQ:.+\n(?:%%.+\n)*K:.+\n(?:V:.+\n|%%.+\n)*(?:%\d+\n)?"
                    r"(?![A-Z]:|%|$)")


def check_abc(text, ended=True, prompt=""):
    """Judges a tune as it stands: {"valid": whether there is no reason against it, "reasons", "first_fault",
    and what reader_faults counts}. Raises UserError if abc2midi can't be run: that is no verdict.

    First our reader, which measures every bar; "silent" and "mostly_rests": after the prompt too little was
    composed, or less than a quarter of the time sounds (half would refuse 3 of 99 real web files). Then, for
    what has no fault so far, abc2midi: "abc2midi_error", or "other_notes" if it hears others than our reader
    does. Its warnings are no reasons: they are about bars that we measured as right, and it is wrong about
    some (findings/README.md). "cut": the tune had not ended when it was stopped; it is judged up to its last
    whole bar, and a tie into what is missing is no fault.
    """
    begun, text = text, text if ended else whole_bars(text) or header_of(text)
    faults, found = reader_faults(text, ended, prompt)
    heard = text if ended else re.sub(r"-(?=[^\n]*\n*\Z)", "", text)  # without the ties of the last line
    reasons = sorted(faults or abc2midi_faults(heard)) + ["cut"] * (not ended)
    first = found.pop("first_fault") or "".join(reasons[:1])
    return {"valid": not reasons, "reasons": reasons, "first_fault": first,
            "header": bool(HEADER.match(begun)), **found}


def reader_faults(text, ended=True, prompt=""):
    """What our reader finds wrong, and what it counts: (set of reasons, {"notes" and "pitches" after the
    prompt, "first_fault", those of count_bars}).
    """
    tune, last = read_abc(text), text.count("\n")
    placed = sorted(fault for fault in tune.faults
                    if ended or fault.reason != "open_tie" or fault.line < last)
    faults = {fault.reason for fault in placed}
    begin = end_of_notes(read_abc(whole_bars(prompt)).notes)
    new = Notes(*(column[tune.notes.onset >= begin - 1e-6] for column in tune.notes))
    n, pitches = len(new.pitch), len(set(new.pitch.tolist()))
    if n < MIN_TUNE_NOTES or pitches < 3:
        faults.add("silent")
    elif sounding_beats(new) < (max(bar_starts(tune)[-1], end_of_notes(new)) - begin) / 4:
        faults.add("mostly_rests")
    return faults, {"notes": n, "pitches": pitches, "first_fault": placed[0].reason if placed else "",
                    **count_bars(text, placed)}


def count_bars(text, faults=()):
    """Bars of a text, voice by voice, a run of silent ones as one: {"bars", "right": those without a fault,
    "repeats": right ones that are equal to the one before}.
    """
    count, before = {"bars": 0, "right": 0, "repeats": 0}, {}
    wrong = {(fault.line, voice) for fault in faults for voice in (fault.voice, "")}
    for number, line in enumerate(text.splitlines(), 1):
        music = re.sub(r"\[[MQ]:[^]]*\]", "", line) if MUSIC_LINE.match(line) else ""
        for voice, bar in re.findall(r"(?:\[V:([^]]*)\])?([^|]+\|?)", music):
            right = (number, voice) not in wrong
            count["bars"] += 1
            count["right"] += right
            count["repeats"] += right and before.get(voice) == bar
            before[voice] = bar
    return count


def abc2midi_faults(text):
    """The set of reasons that abc2midi has against a text."""
    def onsets(notes):  # in 1/48 beat, for abc2midi is always late by 1/480
        return set(zip(notes.pitch.tolist(), np.rint(48 * notes.onset).tolist(), strict=True))

    try:
        midi, said = run_abc2midi(text.encode())
        heard = read_score(midi).notes
    except Skip as skip:
        return {str(skip).replace(" ", "_")}
    except Rejected:  # no notes, or no MIDI file
        return {"other_notes"}
    faults = {"abc2midi_error": re.search(r"^Error in line", said, re.M),
              "other_notes": onsets(heard) != onsets(read_abc(text).notes)}
    return {reason for reason, is_so in faults.items() if is_so}


def whole_bars(text):
    """A text up to the end of its last whole line of music."""
    return text[:text.rfind("|\n") + 2] if "|\n" in text else ""


def end_of_notes(notes):
    """The beat in which the last note ends."""
    return float((notes.onset + notes.duration).max(initial=0))


def sounding_beats(notes):
    """Beats in which anything sounds."""
    order = np.argsort(notes.onset)
    onset, end = notes.onset[order], np.maximum.accumulate((notes.onset + notes.duration)[order])
    return float(end[-1] - onset[0] - np.maximum(onset[1:] - end[:-1], 0).sum())


def bar_starts(tune):
    """(bars + 1,) beats where the bars of a tune begin and the last one ends; 10,000 bars at most."""
    metres = {round(beat, 3): 4 * num / den for beat, num, den in tune.metres}
    starts, metre = [0.0], 4
    for _ in range(min(tune.n_bars, 10_000)):
        metre = metres.get(round(starts[-1], 3), metre)
        starts.append(starts[-1] + metre)
    return np.array(starts)


# --- what the music is like

def music_metrics(tune):
    """{metric: number, None where it is not defined} of a Tune; {} of one without pitched notes.

    As in MusPy (Dong et al. 2020, arXiv 2008.01951) and MGEval (Yang and Lerch 2020); groove as in Wu and
    Yang 2020 (arXiv 2008.01307). pitch_class_entropy: bits. scale_consistency: share of notes in the best
    major or minor scale. polyphony: notes at once, where any sounds. groove_consistency: 1 - share of the
    steps of 1/12 beat in which the onsets of a bar and the next differ. empty_bars: share of bars in which no
    note begins. repeated_bars: share of the others that were heard before. Drums count in the last four.
    """
    (onset, duration, pitch), bars = tune.notes[1:], bar_starts(tune)
    pitched = Notes(*(column[~are_drums(tune.notes, tune.voices)] for column in tune.notes))
    if not len(pitched.pitch) or len(bars) < 2:
        return {}
    share = np.bincount(pitched.pitch % 12, minlength=12) / len(pitched.pitch)
    bar, steps = np.searchsorted(bars[1:-1], onset + 1e-3, "right"), np.rint(12 * np.diff(bars))
    contents = [set() for _ in steps]  # of each bar: its (onset in it, duration, pitch), in 1/12 beats
    for b, *note in zip(bar, np.rint(12 * (onset - bars[bar])), np.rint(12 * duration), pitch, strict=True):
        contents[b].add(tuple(note))
    rhythms = [{first for first, *_ in notes} for notes in contents]
    changes = [len(rhythms[i] ^ rhythms[i + 1]) / steps[i] for i in np.flatnonzero(np.diff(steps) == 0)]
    full = [frozenset(notes) for notes in contents if notes]
    return {"pitch_class_entropy": stats.entropy(share, base=2),
            "scale_consistency": max(share[np.add(NATURAL, root) % 12].sum() for root in range(12)),
            "polyphony": pitched.duration.sum() / sounding_beats(pitched),
            "groove_consistency": 1 - np.mean(changes) if changes else None,
            "notes_per_beat": len(pitch) / bars[-1],
            "empty_bars": 1 - len(full) / len(contents),
            "repeated_bars": 1 - len(set(full)) / len(full)}


# --- whether it was copied

def training_shingles(file, cfg):
    """In a worker: the melodic shingles of a tune that was trained on."""
    tune = read_abc(abc_path(file, cfg).read_text("utf-8"))
    return melodic_shingles(tune.notes, are_drums(tune.notes, tune.voices))


def find_copies(melodies, cfg):
    """Melodies, each (shingles in their order, the bar in which each begins, and ends), all (S,) -> what each
    has in common with the training tunes, a dict:

    "known": share of its shingles (runs of 12 intervals, as in the split) that any training tune has.
    "nearest": the training tune that has most of them, "share": how many, "bars": first and last bar of the
    longest passage that is in it too, "notes": its length. None where there is nothing in common.
    """
    trained = [tune["file"] for tune in read_jsonl(cfg.tokens_root / "tunes.jsonl")
               if tune["split"] == "train" and "leaked" not in tune]
    wanted = {shingle for shingles, *_ in melodies for shingle in shingles.tolist()}
    holders = collections.defaultdict(list)  # of each: the training tunes that have it
    with workers(cfg) as pool:
        found = pool.map(training_shingles, trained, [cfg] * len(trained), chunksize=64).result()
        for file, shingles in zip(trained, found, strict=True):
            for shingle in wanted.intersection(shingles.tolist()):
                holders[shingle].append(file)
    return [nearest_tune(holders, *melody) for melody in melodies]


def nearest_tune(holders, shingles, first, last):
    files = [holders.get(shingle, []) for shingle in shingles.tolist()]
    count = Counter(itertools.chain(*files))
    if not count:
        return {"known": 0.0, "share": 0.0, "nearest": None, "bars": None, "notes": 0}
    nearest, most = count.most_common(1)[0]
    same = np.flatnonzero([nearest in those for those in files])
    ends = (np.diff(same) > 1) | (np.diff(first[same]) < 0)  # a passage stays in its voice
    passage = max(np.split(same, np.flatnonzero(ends) + 1), key=len)
    return {"known": np.mean([bool(those) for those in files]), "share": most / len(files),
            "nearest": nearest, "bars": [int(first[passage[0]]), int(last[passage[-1]])],
            "notes": len(passage) + SHINGLE}


# --- loss where it matters

KIND = re.compile(r"(?P<header>\0(?:(?:[A-Z]:|%%)[^\n]*\n)*)|(?P<countdown>%\d+\n)|(?P<voice_tag>\[V:\d+\])"
                  r"|(?P<other>\[[A-Z]:[^]]*\]|\(\d(?:::\d)?)|(?P<accidental>[_^=]+)|(?P<pitch>[A-Ga-g][,']*)"
                  r"|(?P<length>[\d/]+)|(?P<rest>[zZ])|(?P<bar>[|\n]+)|(?P<end>\x01)")
KINDS = ("header", "countdown", "pitch", "accidental", "length", "rest", "bar", "voice_tag", "end", "other")


def char_kinds(tokens, vocab):
    """Ids of whole tunes -> (n,) index into KINDS of each; "other": chords, ties, tuplets, fields."""
    text = "".join([("\0", "\1", "\2", *vocab.chars[3:])[i] for i in tokens])
    kinds = np.full(len(text), KINDS.index("other"))
    for match in KIND.finditer(text):
        kinds[match.start():match.end()] = KINDS.index(match.lastgroup)
    return kinds


def test_loss(model, vocab, test, whole, cfg):
    """Loss on the test Windows: per character, note and second, by kind of character, by place in the window.

    `whole` are the rows of tunes.jsonl for the tunes that are whole in them.
    """
    losses, place = token_losses(model, test, cfg)
    kinds = char_kinds(test.tokens, vocab)
    loss, error = mean_loss(losses, test.tokens)
    bits, counted = losses / math.log(2), np.isfinite(losses)
    in_whole = np.nansum(bits[:whole[-1]["start"] + whole[-1]["chars"] + 2], dtype=np.float64)
    edges = [0, *(2**k for k in range(int(math.log2(model.seq_len)) + 1))]
    spans = {span: counted & (span[0] <= place) & (place < span[1]) for span in itertools.pairwise(edges)}
    of_kind = {kind: counted & (kinds == i) for i, kind in enumerate(KINDS)}
    return {"test_loss": loss, "test_loss_se": error, "test_bpc": loss / math.log(2),
            "test_perplexity": math.exp(loss),
            **{f"bits_per_{unit}": in_whole / sum(tune[f"{unit}s"] for tune in whole)
               for unit in ("note", "second")},
            "by_kind": {kind: {"share": here.sum() / counted.sum(), "bits": bits[here].mean(dtype=np.float64)}
                        for kind, here in of_kind.items() if here.any()},
            "by_position": [{"from": low, "to": high, "bits": bits[here].mean(dtype=np.float64)}
                            for (low, high), here in spans.items() if here.any()]}


def leaked_loss(model, leaked, cfg):
    """Loss on tunes that were not trained on, though a version of each was: what a split by file measures."""
    found = mean_loss(token_losses(model, leaked, cfg)[0], leaked.tokens) if len(leaked) else (None, None)
    return dict(zip(("leaked_loss", "leaked_loss_se"), found, strict=True))


def draw_places(tested):
    """Test loss against the place in the window, pale to full by size: what more context brings."""
    figure, (axes,) = sheet(1, ("Test loss by place in the window", "place in the window (characters)",
                                "bits per character"))
    for i, row in enumerate(sorted(tested, key=lambda row: row["n_fit"])):
        style, spans = FAMILIES[row["run"].partition("_")[0]], row["by_position"]
        middle = [math.sqrt((span["from"] + 1) * span["to"]) for span in spans]
        axes.plot(middle, [span["bits"] for span in spans], style.marker + style.line, color=style.colour,
                  mec="white", alpha=0.3 + 0.7 * (i + 1) / len(tested), label=row["run"])
    axes.legend(fontsize=8, ncols=2)
    return figure


# --- whether a model finds music likelier than what is nearly music: a measure without sampling

# a line of music: silent voices before the first one that sounds, its bar, the rest
FIRST_BAR = re.compile(r"^(?P<head>(?:\[V:\d+\]Z\d*\|)*(?:\[V:\d+\])?)(?P<bar>[^|\n]*[A-Ga-g][^|\n]*\|).*\n",
                       re.M)


def twins(text, rng):
    """A tune and its damaged twins, {"true", "pitch", "swap", "loop": text}, and where they part; ({}, 0) if
    it is too short.

    One bar of the first voice that sounds there: a note is moved by a step or a third ("pitch"), the bar
    changes places with the next one ("swap"), or the bar before it takes its place ("loop").
    """
    lines = list(FIRST_BAR.finditer(text))
    threes = [(one, two, three) for one, two, three in zip(lines, lines[1:], lines[2:], strict=False)
              if one.end() == two.start() and two.end() == three.start()
              and one["head"] == two["head"] == three["head"]
              and len({one["bar"], two["bar"], three["bar"]}) == 3]
    if not threes:
        return {}, 0
    one, two, three = threes[rng.integers(len(threes))]
    before, bar, after = one["bar"], two["bar"], three["bar"]
    letters, note = LETTERS + LETTERS.lower(), rng.choice([m.start() for m in re.finditer("[A-Ga-g]", bar)])
    moved = letters[(letters.index(bar[note]) + rng.choice([-2, -1, 1, 2])) % len(letters)]
    pairs = {"true": (bar, after), "pitch": (bar[:note] + moved + bar[note + 1:], after),
             "swap": (after, bar), "loop": (before, after)}
    place, between, rest = two.start("bar"), text[two.end("bar"):three.start("bar")], text[three.end("bar"):]
    return {name: text[:place] + this + between + then + rest for name, (this, then) in pairs.items()}, place


@torch.inference_mode()
def twin_shares(model, vocab, real, cfg):
    """{damage: share of the real tunes that the model finds likelier than their twin}: by the likelihood of
    the bar in question and the rest of the window."""
    rng, device, likelier = np.random.default_rng(cfg.SEED), next(model.parameters()).device, {}
    for text in real:
        texts, place = twins(text[:model.seq_len * 7 // 8].rpartition("\n")[0] + "\n", rng)
        if texts:
            rows = [torch.tensor([START, *vocab.encode(twin)])[:model.seq_len + 1] for twin in texts.values()]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(device)
            logits = model(ids[:, :-1].clamp(min=0))[0].float()
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # 0 for -100
            true, *damaged = losses[:, place:].sum(1).tolist()
            for name, other in zip([*texts][1:], damaged, strict=True):
                likelier.setdefault(name, []).append(true < other)
    return {name: share_of(flags) for name, flags in likelier.items()}


# --- samples of every model, judged beside real music

SAMPLE_FOLDERS = ("best_samples", "samples")


def named(run, kind, tunes, folder, shown):
    """Tunes with their "run", "kind", "name", text in complete lines, and "shown", the folder to which the
    first ones are written; they are not selected.
    """
    return [{"run": run, "kind": kind, "name": f"{run}_{kind}_{number:02d}",
             "shown": folder if number <= shown else "", **tune, "text": complete_lines(tune["text"])}
            for number, tune in enumerate(tunes, 1)]


def write_music(run, model, vocab, real, is_best, cfg):
    """Tunes of one model, a list for each kind, as `named` gives them with "prompt", "ended" and "real".

    Kinds: "unprompted", "valid" (the same, bars drawn again, see `sample`), "same" (every model goes on from
    the same four bars), and of the best model "prompted", with the "real" tune that the prompt is from.
    """
    most = cfg.SAMPLE_CHARS
    n = cfg.SAMPLES if is_best else min(cfg.SAMPLES, 100)
    few = min(n, 100 if is_best else 10)  # a weak model draws each line again and again
    prompts = {"unprompted": [""] * n, "valid": [""] * few, "same": [first_bars(real[0], 4)]}
    if is_best:
        prompts["prompted"] = [whole_bars(text[:min(len(text) // 3, most // 2)])
                               or text[:text.find("|\n") + 2] for text in real]  # a third, or a bar
    groups = []
    for kind, given in prompts.items():
        tunes = sample(model, vocab, given, max_chars=most, seed=cfg.SEED, temperature=cfg.TEMPERATURE,
                       top_p=cfg.TOP_P, valid=kind == "valid",
                       label=f"{run} {kind}" if cfg.DEVICE == "cuda" else "")  # else in a worker
        for tune, prompt, text in zip(tunes, given, real if kind == "prompted" else given, strict=True):
            tune |= {"prompt": prompt, "real": text}
        where = ("best_samples", cfg.SHOWN) if is_best else ("samples", kind != "valid")
        groups.append(named(run, kind, tunes, *where))
    return groups


class Music(NamedTuple):
    """Held-out music to examine models with."""
    test: Windows
    whole: list  # rows of tunes.jsonl, for the tunes that are whole in it
    real: list  # their texts, if the models know all characters
    leaked: Windows  # tunes of which training has another version


def examine(row, best, music, cfg):
    """(name, (row of "models" in evaluation.json, tunes of each kind)) of a model in scaling_results.json."""
    run, (model, vocab, _) = row["run"], load(cfg.SAVE_DIR / row["checkpoint"], cfg.DEVICE)
    tested = {"run": run, "n_fit": row["n_fit"], "val_loss": row["val_loss"],
              **test_loss(model, vocab, music.test, music.whole, cfg),
              **leaked_loss(model, music.leaked, cfg),
              "likelier_than_twin": twin_shares(model, vocab, music.real[:100], cfg)}
    return run, (tested, write_music(run, model, vocab, music.real[:cfg.SAMPLES], run == best, cfg))


def examine_all(rows, best, music, cfg):
    """Yields what `examine` returns for each model: one after the other on a GPU, else a process for each."""
    rows = rows[::-1]  # the large ones first: none must end alone
    if cfg.DEVICE == "cuda":
        yield from (examine(row, best, music, cfg) for row in rows)
        return
    with workers(cfg, torch.set_num_threads, 1) as pool:
        yield from pool.map(examine, rows, *([same] * len(rows) for same in (best, music, cfg))).result()


def judge(tune, cfg):
    """In a worker: verdict, metrics and melody of a tune; writes the files of one that is shown."""
    text = tune["text"] if tune["ended"] else whole_bars(tune["text"])
    if tune["shown"]:
        path = Path(cfg.SAVE_DIR, tune["shown"], tune["name"])
        write_tune(path, text, tune["prompt"], score=tune["shown"] != "samples")
        if tune["kind"] == "prompted":
            write_tune(f"{path}_real", tune["real"], tune["prompt"])
    parsed = read_abc(text)
    shingles, *beats = melody(parsed.notes, are_drums(parsed.notes, parsed.voices))
    bars = [np.searchsorted(bar_starts(parsed), beat + 1e-3, "right") for beat in beats]
    return {"check": check_abc(tune["text"], tune["ended"], tune["prompt"]), "metrics": music_metrics(parsed),
            "melody": (shingles, *bars)}


def judge_all(groups, cfg):
    """Lists of tunes -> the same with "check", "metrics" and "copy"."""
    tunes = list(itertools.chain(*groups))
    with workers(cfg) as pool:
        found = list(pool.map(judge, tunes, [cfg] * len(tunes)).result())  # raises what a judge raised
    copies = find_copies([facts.pop("melody") for facts in found], cfg)
    judged = iter([{**tune, **facts, "copy": copy}
                   for tune, facts, copy in zip(tunes, found, copies, strict=True)])
    return [list(itertools.islice(judged, len(group))) for group in groups]


def share_of(flags):
    """Share of true ones with its 95 % interval (Wilson 1927)."""
    flags = list(flags)
    found = stats.binomtest(sum(flags), len(flags)).proportion_ci(method="wilson")
    return {"value": sum(flags) / len(flags), "lo": float(found.low), "hi": float(found.high)}


def mean_of(values, cfg):
    """Mean of the numbers among `values` with a 95 % bootstrap interval over tunes."""
    values = np.array([value for value in values if value is not None], float)
    if len(values) < 2 or np.ptp(values) == 0:
        return {"value": values.mean() if len(values) else None, "lo": None, "hi": None}
    found = stats.bootstrap((values,), np.mean, n_resamples=cfg.BOOTSTRAP, method="percentile",
                            rng=np.random.default_rng(cfg.SEED)).confidence_interval
    return {"value": values.mean(), "lo": found.low, "hi": found.high}


def emergence_row(tunes, copy_limit, repeats, cfg):
    """One row of the emergence table. A tune counts as copied that shares more of its melody with one
    training tune than 95 % of the real held-out tunes do: `copy_limit`. Of the bars that are equal to the one
    before, no larger share counts as right than such bars have in held-out tunes, `repeats`: a loop is no
    success.
    """
    def most_common(found):
        return dict(Counter(found).most_common())

    checks = [tune["check"] for tune in tunes]
    bars, right, repeated = (sum(check[key] for check in checks) for key in ("bars", "right", "repeats"))
    row = {"run": tunes[0]["run"], "kind": tunes[0]["kind"], "n": len(tunes),
           "ended": sum(tune["ended"] for tune in tunes),
           "valid": share_of(check["valid"] for check in checks),
           "valid_or_cut": share_of(check["reasons"] in ([], ["cut"]) for check in checks),
           "header": share_of(check["header"] for check in checks),
           "bars_right": (right - max(0, repeated - repeats * bars)) / max(1, bars),
           "first_fault": most_common(check["first_fault"] for check in checks if check["first_fault"]),
           "reasons": most_common(reason for check in checks for reason in check["reasons"]),
           "known": np.median([tune["copy"]["known"] for tune in tunes]),
           "nearest": np.median([tune["copy"]["share"] for tune in tunes]),
           "copied": share_of(tune["copy"]["share"] > copy_limit for tune in tunes),
           "metrics": {name: mean_of([tune["metrics"].get(name) for tune in tunes], cfg)
                       for name in dict.fromkeys(name for tune in tunes for name in tune["metrics"])}}
    if row["kind"] == "valid":
        kept = sum(tune["bars"] for tune in tunes)
        row["tries"] = sum(tune["tries"] for tune in tunes) / kept if kept else None
        row["gave_up"] = sum(tune["gave_up"] for tune in tunes)
    return row


@stage(version=8, knobs="SAMPLES SHOWN SAMPLE_CHARS TEMPERATURE TOP_P SEED EVAL_TOKENS BOOTSTRAP",
       reads=(extract, tokenize, train), root="SAVE_DIR")
def evaluate(cfg):
    """Test losses of every model; its tunes, judged, compared with real ones, searched for copies, shown."""
    save, vocab = Path(cfg.SAVE_DIR), read_vocab(cfg)
    say_if_mute()
    rows = [row for row in read_json(save / "scaling_results.json")["runs"]
            if row["main"] and row["seed"] == cfg.SEED]  # one of each size
    best = min(rows, key=lambda row: row["val_loss"])["run"]
    for folder in SAMPLE_FOLDERS:
        shutil.rmtree(save / folder, ignore_errors=True)
        (save / folder).mkdir()

    held_out = [tune for tune in read_jsonl(cfg.tokens_root / "tunes.jsonl") if tune["split"] == "test"]
    test, leaked = read_tokens("test", vocab, cfg), read_training(vocab, cfg)[1][:cfg.EVAL_TOKENS]
    whole = [tune for tune in held_out if tune["start"] + tune["chars"] + 2 <= len(test)] or held_out[:1]
    real = [vocab.decode(test[tune["start"] + 1:][:tune["chars"]]) for tune in whole if not tune["unknown"]]
    need(real, "every test tune has characters that the training tunes lack; add music or raise TEST_FRAC")
    music = Music(Windows(test, vocab, cfg.SEQ_LEN), whole, real, Windows(leaked, vocab, cfg.SEQ_LEN))

    examined = dict(progress(examine_all(rows, best, music, cfg), "evaluate", len(rows), "model"))
    tested = [examined[row["run"]][0] for row in rows]
    figures = save_figure(save, "loss_by_place", draw_places, tested)
    originals = [{"prompt": "", "text": text[:cfg.SAMPLE_CHARS], "ended": len(text) <= cfg.SAMPLE_CHARS}
                 for text in real[:cfg.SAMPLES]]
    written = itertools.chain(*(examined[row["run"]][1] for row in rows))
    groups = judge_all([named("real", "real", originals, "samples", 1), *written], cfg)
    tunes = list(itertools.chain(*groups))
    limit = float(np.quantile([tune["copy"]["share"] for tune in groups[0]], 0.95))  # the real ones
    bars = [count_bars(complete_lines(text)) for text in real]
    repeats = sum(count["repeats"] for count in bars) / max(1, sum(count["bars"] for count in bars))
    table = [emergence_row(group, limit, repeats, cfg) for group in groups if group[0]["kind"] != "same"]

    for folder in SAMPLE_FOLDERS:
        write_json(save / folder / "metadata.json", [tune for tune in tunes if tune["shown"] == folder])
    write_jsonl(save / "samples.jsonl", tunes)
    write_json(save / "evaluation.json", {
        "models": tested, "best": best, "test_chars": music.test.counted, "sample_chars": cfg.SAMPLE_CHARS,
        "copy_limit": limit, "repeated_bars_of_real": repeats, "music": table})
    for row in table:
        if row["run"] in ("real", best):
            say(f"  {row['run']:12s} {row['kind']:12s} {row['valid']['value']:.0%} of {row['n']} tunes valid,"
                f" {row['valid_or_cut']['value']:.0%} as far as they went in {cfg.SAMPLE_CHARS:,} characters")
    return [save / "evaluation.json", save / "samples.jsonl", *figures,
            *(save / folder for folder in SAMPLE_FOLDERS)]


# --- tunes as files: text, MIDI, sound, piano roll, score

SOUND_SECONDS = 30
ROLL_WIDTH, ROLL_HEIGHT = 480, 150
VOICE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # on white and on black
GIVEN_COLOUR = "#8c8c8c"
SCORE_BARS, SCORE_STAVES, SCORE_BYTES = 16, 4, 150_000


def write_tune(path, text, prompt="", score=False):
    """ABC text -> path.abc, .mid, .mp3, _roll.svg and, if asked for, .svg (score).

    Of a tune that goes on from a prompt one hears and sees what begins two bars before the new music.
    """
    tune, midi = read_abc(text), abc_to_midi(text)
    write_text(f"{path}.abc", text)
    Path(f"{path}.mid").write_bytes(midi)
    if not len(tune.notes.pitch):
        return
    begin, given_bars = heard_from(tune, prompt)
    write_text(f"{path}_roll.svg", draw_roll(tune, begin, given_bars))
    wave, rate = render_sound(midi, begin) if midirenderer else ((), 0)
    if len(wave):
        soundfile.write(f"{path}.mp3", wave, rate, bitrate_mode="VARIABLE", compression_level=0.8)
    picture = engrave(tune, midi) if score and lytk else None
    if picture:
        write_text(f"{path}.svg", picture)


def say_if_mute():
    """One line where there are no wheels for sound and scores."""
    if not midirenderer:
        say("  no sound, no scores: midirenderer and lytk are not installed; Linux on ARM has no wheels")


def heard_from(tune, prompt):
    """(second at which the sound of a tune begins, bars that its prompt gave)."""
    given_bars, bars = read_abc(whole_bars(prompt)).n_bars, bar_starts(tune)
    return float(seconds_at(tune, bars[max(0, min(given_bars, len(bars) - 1) - 2)])), given_bars


def seconds_at(tune, beats):
    """Beats of a Tune -> seconds, by its tempos."""
    start, qpm = np.array(tune.tempos or [(0, 120)], float).T
    seconds = np.concatenate([[0], np.cumsum(np.diff(start) * 60 / qpm[:-1])])
    tempo = np.maximum(np.searchsorted(start, beats, "right") - 1, 0)
    return seconds[tempo] + (beats - start[tempo]) * 60 / qpm[tempo]


def render_sound(midi, begin=0.0):
    """MIDI -> (n,) samples of the SOUND_SECONDS from `begin`, the loudest of them 0.8, and their rate.

    The instruments are those of the General MIDI SoundFont in pretty_midi's wheel. midirenderer stops with
    the last event, so a marker two seconds after the last note lets it ring.
    """
    soundfont = Path(importlib.util.find_spec("pretty_midi").origin).parent / "TimGM6mb.sf2"
    score = symusic.Score.from_midi(midi).to("second")
    score = score.clip(begin, begin + SOUND_SECONDS, clip_end=True).shift_time(-begin)
    if not score.note_num():
        return np.zeros(0), 0
    score.markers.append(symusic.TextMeta(score.end() + 2, "end", "second"))
    wav = midirenderer.render_wave_from(soundfont.read_bytes(), score.to("tick").dumps_midi())
    wave, rate = soundfile.read(io.BytesIO(wav), always_2d=True)
    wave = wave.mean(axis=1)  # one channel: stereo takes nearly twice the bytes, as does twice the rate
    wave = np.fft.irfft(np.fft.rfft(wave)[:len(wave) // 4 + 1])
    return 0.8 * wave / max(np.abs(wave).max(), 1e-9), rate // 2


def draw_roll(tune, begin=0.0, given_bars=0):
    """A Tune -> SVG of what its sound holds: pitch over time, bars numbered, a colour per voice.

    `begin` is the second at which the sound begins. The notes of the first `given_bars` bars are grey, and
    end at a line. "data-seconds" is the length, by which the page's script moves the head.
    """
    notes, bars = tune.notes, bar_starts(tune)
    start, end = (seconds_at(tune, beats) - begin for beats in (notes.onset, notes.onset + notes.duration))
    seen = np.flatnonzero((start > -1e-6) & (start < SOUND_SECONDS))
    if not len(seen):
        return ""
    length = min(max(end[seen].max(), 1), SOUND_SECONDS)
    low, high = notes.pitch[seen].min() - 2, notes.pitch[seen].max() + 2
    x, y = ROLL_WIDTH / length, (ROLL_HEIGHT - 16) / (high - low)  # of a second, of a semitone
    lines, join = (seconds_at(tune, bars) - begin) * x, min(given_bars, len(bars) - 1)
    inside = np.flatnonzero((lines > -1e-6) & (lines < ROLL_WIDTH))

    paths = [f"M{lines[bar]:.1f} 0V{ROLL_HEIGHT - 14}" for bar in inside]
    words = [(lines[bar] + 2, ROLL_HEIGHT - 3, bar + 1) for bar in inside[::len(inside) // 16 + 1]
             if bar < len(bars) - 1]
    for c in range(math.ceil(low / 12), high // 12 + 1):
        paths.append(f"M0 {(high - 12 * c) * y:.1f}H{ROLL_WIDTH}")
        words.append((2, (high - 12 * c) * y - 2, f"C{c - 1}"))
    shapes = [f'<path d="{"".join(paths)}" stroke="#8884"/>']
    shapes += [f'<text x="{left:.1f}" y="{base:.1f}">{word}</text>' for left, base, word in words]
    for i in seen:
        given = notes.onset[i] < bars[join] - 1e-6
        colour = GIVEN_COLOUR if given else VOICE_COLOURS[notes.voice[i] % len(VOICE_COLOURS)]
        width, top = (min(end[i], length) - start[i]) * x - 0.6, (high - notes.pitch[i] - 0.5) * y
        shapes.append(f'<rect x="{start[i] * x:.1f}" y="{top:.1f}" width="{max(width, 1):.1f}"'
                      f' height="{0.9 * y:.1f}" fill="{colour}"/>')
    if given_bars:
        shapes.append(f'<path d="M{lines[join]:.1f} 0v150" stroke="currentColor" stroke-dasharray="4 3"/>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="roll" viewBox="0 0 {ROLL_WIDTH} {ROLL_HEIGHT}"'
            f' preserveAspectRatio="none" data-seconds="{length:.3f}" font-family="sans-serif" font-size="13"'
            f' fill="currentColor" role="img" aria-label="Piano roll">{"".join(shapes)}'
            f'<path class="head" d="M0 0v150" stroke="currentColor" stroke-width="0"/></svg>')


def engrave(tune, midi, most=SCORE_BARS):
    """The first bars of a Tune and its MIDI as a score in SVG, None where it can't be set.

    By way of MIDI and Humdrum, since verovio's own reader of ABC knows one voice only, and lytk's stops at
    several. Drums are left out; of more than SCORE_STAVES voices the busiest stay. The <desc> of the SVG says
    what is missing. Where a score of 16 bars takes more than SCORE_BYTES, half of the bars are set.
    """
    bars, score = bar_starts(tune), symusic.Score.from_midi(midi)
    shown = min(most, len(bars) - 1)
    score = score.clip(0, round(bars[shown] * score.ticks_per_quarter), clip_end=True)
    voices = [track for track in score.tracks if not track.is_drum and len(track.notes)]
    busiest = sorted(voices, key=lambda track: -len(track.notes))[:SCORE_STAVES]
    score.tracks = [track for track in voices if track in busiest]
    if not voices:
        return None
    if len(voices) > 1:
        import pretty_midi  # takes most of a second
        for track in score.tracks:
            track.name = pretty_midi.program_to_instrument_name(track.program)
    score.key_signatures = [symusic.KeySignature(0, SHARPS.get(tune.key, 0), 0)]

    verovio.enableLog(verovio.LOG_OFF)
    page = verovio.toolkit()
    page.setOptions({"pageWidth": 1600, "pageHeight": 60_000, "adjustPageHeight": True, "scale": 40,
                     "pageMarginLeft": 120, "svgViewBox": True, "svgRemoveXlink": True, "header": "none",
                     "footer": "none", "xmlIdSeed": 1})
    try:
        humdrum = lytk.to_humdrum(lytk.from_midi_bytes(score.dumps_midi())).replace('*I"Track 1', "*")
    except lytk.LytkError:
        return None
    cut = shown < len(bars) - 1
    if not page.loadData(humdrum.replace("==", "=") if cut else humdrum):  # a final bar line at the end only
        return None
    picture = re.sub(r">\s+<", "><", page.renderToSVG(1))
    if len(picture) > SCORE_BYTES and shown > 1:
        return engrave(tune, midi, shown // 2)

    left_out = [f"bars {shown + 1} to {len(bars) - 1}"] * cut
    left_out += ["the drums"] * any(drum for _, drum in tune.voices)
    left_out += [f"{len(voices) - SCORE_STAVES} more voices"] * (len(voices) > SCORE_STAVES)
    said = f"Left out: {', '.join(left_out)}." if left_out else "The whole tune."
    return re.sub("<desc>[^<]*</desc>", f"<desc>{said}</desc>", picture)


# --- on demand: python LakhMIDI.py --sample 8 --prompt mine.mid

LINES_TO_COME = 16  # of a prompt that doesn't say how long the tune is to be


def is_abc_text(prompt):
    """Whether a prompt is text, if only none at all, and not the path of a file."""
    return not prompt or bool(re.search(r"\n|\\n|^[A-Z]:[^\\/]|\|", prompt))


def read_prompt(prompt, cfg, bars=8, vocab=None):
    """The beginning of a prompt in the notation of the models: its first `bars` whole bars, at least one less
    than it has, since a tune that has come to its close would be followed by its end.

    `prompt` is the path of an .abc or MIDI file, which is converted, or ABC text, which is taken as it is. Of
    a file with voices or instruments that `vocab` does not know only the melody is taken. The tune is to be
    as long as its file, or by LINES_TO_COME longer than the prompt where that has less to come.
    """
    if is_abc_text(prompt):
        return count_down(prompt.replace("\\n", "\n"), LINES_TO_COME)
    cfg = copy.copy(cfg)
    cfg.MIN_NOTES = 1
    try:
        score = read_score(read_foreign(prompt))
        text = score_to_abc(score, cfg)["abc"]
        strange = set(SOUND.findall(text)) - set(vocab.sounds) if vocab else ()
        if strange:
            say(f"prompt    only the melody of {prompt} is taken, without its instrument: training had no "
                f"{', '.join(sorted(strange))}")
            text = score_to_abc(melody_voice(score), cfg)["abc"]
    except Rejected as reject:
        raise UserError(f"{prompt} holds no music to go on from ({reject})") from reject
    begun = first_bars(text, bars)
    rest = len(MUSIC_LINE.findall(text)) - len(MUSIC_LINE.findall(begun))
    return count_down(begun, max(rest, LINES_TO_COME))


def first_bars(text, bars):
    """A text up to so many bars, without its last line; one of one bar or two as it is."""
    reader, kept = Reader(), []
    for line in text.splitlines(keepends=True)[:-1]:
        reader.read_line(line)
        if reader.bar > bars:
            break
        kept.append(line)
    return "".join(kept) if reader.bar > 1 else text


def melody_voice(score):
    """A Score of one voice without drums, the highest of those that have many notes, as a piano."""
    drums = are_drums(score.notes, score.voices)
    count = np.bincount(score.notes.voice[~drums])
    if not count.any():
        raise Rejected("no_notes", "drums only")
    height = np.bincount(score.notes.voice[~drums], score.notes.pitch[~drums]) / np.maximum(1, count)
    best = np.where(count >= count.max() / 2, height, -1).argmax()
    notes = Notes(*(column[score.notes.voice == best] for column in score.notes))
    return score._replace(notes=notes._replace(voice=0 * notes.voice), voices=[(0, False)])


def compose(cfg, count, prompt="", valid=False, bars=8):
    """Writes tunes by the best model, see write_tune, and a page of players to a new folder
    SAVE_DIR/my_samples/<prompt>_<seed>/; prints of each its path, what is new in it, and the verdict."""
    runs = read_json(Path(cfg.SAVE_DIR, "scaling_results.json"), {"runs": []})["runs"]
    need(runs, f"there is no trained model in {cfg.SAVE_DIR}; run the study first")
    best = min((row for row in runs if row["main"]), key=lambda row: row["val_loss"])
    model, vocab, _ = load(Path(cfg.SAVE_DIR, best["checkpoint"]), cfg.DEVICE)
    name = best["run"] if is_abc_text(prompt) else re.sub(r"\W+", "_", Path(prompt).stem)[:40]
    prompt, home = read_prompt(prompt, cfg, bars, vocab), Path(cfg.SAVE_DIR, "my_samples")
    seed = next(seed for seed in itertools.count(cfg.SEED) if not (home / f"{name}_{seed}").exists())
    tunes = sample(model, vocab, [prompt] * count, max_chars=cfg.SAMPLE_CHARS, temperature=cfg.TEMPERATURE,
                   top_p=cfg.TOP_P, seed=seed, valid=valid)
    folder, shown = home / f"{name}_{seed}", []
    folder.mkdir(parents=True)
    say_if_mute()
    kind = "yours" if prompt else "unprompted"
    for tune in named(best["run"], kind, tunes, f"my_samples/{folder.name}", count):
        tune["prompt"] = prompt
        shown.append(show_tune(folder / tune["name"], tune | judge(tune, cfg)))
        print(f"{folder / tune['name']}.mid  {shown[-1]['news']}. {shown[-1]['verdict']}")
    lead = f"By {model_name(best['run'])}. Grey notes were given; a click into a picture plays from there."
    write_page(folder / "index.html", f"New music: {name}", lead, groups=[("Tunes", "", shown, "cards")])
    print(f"players   {folder / 'index.html'}")


# ============================================================================================================
# 10 Report and main: every JSON of the run -> runs_lakh/report.html
# ============================================================================================================
# One page for two readers. A musician finds three players on the first screen, then every shown tune as a
# card. A researcher finds what the study found in sentences, then figures, tables and a checklist. All of it
# comes from the run's JSON and the files of the tunes: nothing is typed by hand or fetched, and text from
# files is escaped. Rows of tables are rows of JSON; NAMES has what people read for their keys. The one script
# moves a line over the piano rolls, lights up notes and seeks; without it the page is whole.

SCRIPT = """
for (const box of document.querySelectorAll('.play')) {
  const audio = box.querySelector('audio'), roll = box.querySelector('svg'), seconds = roll.dataset.seconds
  const show = () => {
    const x = audio.currentTime / seconds * roll.viewBox.baseVal.width
    roll.querySelector('.head').setAttribute('transform', `translate(${x})`)
    for (const note of roll.querySelectorAll('rect')) {
      const start = note.x.baseVal.value, sounds = start <= x && x < start + note.width.baseVal.value
      note.classList.toggle('lit', sounds && !audio.paused)
    }
    if (!audio.paused) requestAnimationFrame(show)
  }
  audio.onseeked = audio.onpause = show
  audio.onplay = () => {
    for (const other of document.querySelectorAll('audio')) if (other != audio) other.pause()
    show()
  }
  roll.onclick = click => {
    audio.currentTime = click.offsetX / roll.clientWidth * seconds
    audio.play()
  }
  roll.classList.add('live')
}
"""
STYLE = """
:root { color-scheme: light dark; --line: 1px solid #8884; --accent: light-dark(#0072b2, #56b4e9) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: .8rem 1rem;
  overflow-wrap: break-word }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .2rem 0 } a { color: var(--accent) }
h2 { margin: 2.6rem 0 .6rem; border-bottom: 2px solid var(--accent) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } .note { font-size: .88rem; opacity: .85 }
p, figure { margin: .4rem 0 } img, svg { max-width: 100%; height: auto; display: block }
audio { width: 100%; height: 2.4rem } .part img { max-width: min(46rem, 100%) } .narrow { display: none }
.cards { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
.first { gap: .3rem 1rem } .first p { margin: 0; font-size: .9rem } .first .roll { height: 56px }
.first text { display: none }
.row { display: flex; gap: 1rem; overflow-x: auto } .row .card { flex: 0 0 16rem }
.card { border: var(--line); border-radius: 6px; padding: .7rem; font-size: .9rem } .card h3 { margin: 0 }
.roll { border: var(--line); width: 100%; box-sizing: border-box } .lit { fill: CanvasText }
.live { cursor: pointer } .live .head { stroke-width: 1.5 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .84rem }
th, td { padding: .22rem .4rem; border-bottom: var(--line); text-align: right; vertical-align: top }
td { white-space: nowrap } td.words { text-align: left; white-space: normal; min-width: 15rem }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
pre { background: #8881; padding: .6rem; white-space: pre-wrap; max-height: 22rem; overflow-y: auto }
@media (max-width: 40rem) { .wide { display: none } .narrow { display: block } }
@media (prefers-color-scheme: dark) { .score { filter: invert(.85) } .roll rect { filter: brightness(1.4) } }
@media print { audio, details { display: none } .scroll { overflow: visible } table { font-size: 7.5px }
  td { white-space: normal } figure, tr, .card { break-inside: avoid } .row { flex-wrap: wrap } }
"""
TABLE = """{%- macro table(caption, rows) %}{% if rows %}<h3>{{ caption }}</h3>
{% if rows[0] | length > 7 %}<p class="note">A wide table: where it does not fit, it scrolls.</p>{% endif %}
<div class="scroll"><table><tr>{% for key in rows[0] %}<th>{{ key | name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for key, value in row.items() %}{% set cell = value | show("%" in (key | name)) %}
<td{% if cell | length > 40 %} class="words"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}{% endmacro %}
"""
PAGE = TABLE + """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:;
 style-src 'unsafe-inline'; script-src 'sha256-{{ script_hash }}'">
<title>{{ title }}</title><link rel="icon" href="data:,"><style>{{ style }}</style></head><body>
{%- macro player(tune) %}<figure{% if tune.roll and tune.mp3 %} class="play"{% endif %}>{{ tune.roll }}
{% if tune.mp3 %}<audio controls preload="metadata" src="{{ tune.mp3 }}"></audio>{% endif %}</figure>
{% endmacro %}
{%- macro card(tune) %}<div class="card"><h3>{{ tune.title }}</h3>
<p>{{ tune.verdict }} {{ tune.heard }}</p>{{ player(tune) }}
{% if tune.original %}<p>What the real tune did:</p>{{ player(tune.original) }}{% endif %}
<p>{% if tune.copied and tune.copied.nearest %}Nearest training tune: {{ tune.copied.nearest }}, with
{{ tune.copied.share | show(true) }} % of this melody; longest passage in common: bars
{{ tune.copied.bars | join(" to ") }}, {{ tune.copied.notes }} notes.
{% elif tune.copied %}No {{ shingle + 1 }} notes on end in common with any training tune.{% endif %}</p>
<p>Download {% for kind in ("mid", "abc") %}
<a download="{{ tune.name }}.{{ kind }}" href="{{ tune[kind] }}">.{{ kind }}</a>{% endfor %}</p>
{% if tune.svg %}<details><summary>Score</summary><p>{{ tune.left_out }}</p>
<img class="score" src="{{ tune.svg }}" alt="Score of {{ tune.title }}"></details>{% endif %}
<details><summary>ABC</summary><pre>{{ tune.text }}</pre></details></div>{% endmacro %}
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<div class="cards first">{% for label, tune in first %}<div><p><strong>{{ label }}</strong><br>
{{ tune.form }}. {{ tune.heard }}</p>{{ player(tune) }}</div>{% endfor %}</div>
<p class="note">{% for name, value in about.items() %}{{ name }}: {{ value }}.
{% endfor %}</p>
{% for title, text, tunes, form in groups if tunes %}<h2>{{ title }}</h2><p>{{ text }}</p>
<div class="{{ form }}">{% for tune in tunes %}{{ card(tune) }}{% endfor %}</div>{% endfor %}
{% for title, sentences, figures, caption, tables, note in sections %}<h2>{{ title }}</h2>
<ul>{% for text in sentences %}<li>{{ text }}</li>{% endfor %}</ul>
{% for figure, form in figures -%}
<figure class="{{ form }}"><img src="{{ figure }}" alt="{{ caption }}"></figure>{% endfor %}
<p class="note">{{ caption }}</p>{% for caption, rows in tables %}{{ table(caption, rows) }}{% endfor %}
<p class="note">{{ note }}</p>{% endfor %}
{% if cite %}<h2>Cite</h2><pre>{{ cite }}</pre>{% endif %}
<script>{{ script }}</script></body></html>
"""
NAMES = {  # of keys, as columns; what has % in its name is a share
    "run": "network", "model": "network", "n_fit": "N", "tokens": "D, characters", "flops": "FLOPs",
    "val_loss": "validation loss", "tokens_per_s": "characters/s", "wall_s": "seconds",
    "status": "verdict", "stated_at": "stated at", "observed": "reached", "error": "error, %",
    "share_of_last_step": "of the last step, %", "ruler_error": "a ruler's, %",
    "persistence_error": "persistence's, %",
    "bits_per_note": "bits/note", "test_loss": "nats/character", "test_loss_se": "s.e.",
    "test_bpc": "bits/character", "bits_per_second": "bits/second of music",
    "leaked_loss": "nats/character, near-duplicates", "kind": "tunes", "valid": "valid, %",
    "valid_or_cut": "valid or cut, %", "bars_right": "bars right, %", "whole_header": "whole header, %",
    "tries": "tries a bar", "copied": "copies, %", "first_fault": "first faults", "groups": "clusters",
    "chars": "characters", "unknown": "unknown characters"}
WORDS = {  # what check_abc finds, and the kinds of samples
    "bar_length": "bars that do not add up", "open_tie": "a tie that leads nowhere", "cut": "cut off",
    "open_bracket": "an open bracket", "open_tuplet": "an unfinished tuplet", "bad_char": "stray characters",
    "no_bar_line": "a missing bar line", "silent_bars": "voices out of step", "silent": "hardly anything new",
    "abc2midi_error": "abc2midi finds an error", "other_notes": "abc2midi hears other notes",
    "no_header": "no header", "unprompted": "begun from nothing", "prompted": "continued",
    "valid": "bars redrawn", "yours": "goes on from yours", "same": "four bars continued",
    True: "yes", False: "no", None: "\u2013"}
LICENCES = {FOLK: "public domain", "The Session": "Open Database License", "Lakh": "CC BY 4.0"}


def show(value, as_percent=False, digits=4):
    """A value of a JSON file for people: rounded, thousands grouped, "value [lo, hi]", names in words, of
    counts the first two, a dash for what is not known.
    """
    if isinstance(value, dict) and "value" not in value:
        return ", ".join(f"{show(name)} {count}" for name, count in [*value.items()][:2])
    if isinstance(value, dict):
        ends = ["open" if value[end] is None else show(value[end], as_percent, 3) for end in ENDS]
        return "{} [{}, {}]".format(*ends) if value["value"] is not None else WORDS[None]
    if value is None or isinstance(value, (bool, str)):
        return WORDS.get(value) or model_name(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{float(f'{100 * value:.3g}' if as_percent else f'{value:.{digits}g}'):,.10g}"


def pick(rows, keys):
    """Rows with the keys of a table only."""
    return [{key: row.get(key) for key in keys.split()} for row in rows]


def playing_time(seconds):
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def model_name(run):
    """gpt_1M -> Transformer 1M, gpt -> Transformer, anything else as it is."""
    family, _, size = run.partition("_")
    return f"{FAMILIES[family].label} {size}".strip() if family in FAMILIES else run


def render(source, **content):
    """A page, or a part of it, that escapes what it is given and fails for what it lacks."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"show": show, "name": lambda key: NAMES.get(key, key)}
    return environment.from_string(source).render(content)


def html_table(caption, rows):
    """A table of the report page by itself, for notebooks; rows are dicts of one set of keys."""
    return render(TABLE + "{{ table(caption, rows) }}", caption=caption, rows=rows)


def write_page(path, title, lead, groups, first=(), about=None, sections=(), cite=""):
    """Writes a page that needs no other file, of the parts that PAGE has."""
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    write_text(path, render(PAGE, title=title, lead=lead, groups=groups, first=first, about=about or {},
                            sections=sections, cite=cite, style=Markup(STYLE), script=Markup(SCRIPT),
                            script_hash=script_hash, shingle=SHINGLE))


def data_uri(path):
    """A file as an address that needs no network; None where there is no such file."""
    kind = mimetypes.guess_type(path)[0] or "text/plain"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else None


# --- tunes

def show_tune(path, tune):
    """What a page shows of a tune (a row of metadata.json) that write_tune wrote to `path`."""
    files = {kind: data_uri(Path(f"{path}.{kind}")) for kind in ("abc", "mid", "mp3", "svg")}
    text = Path(f"{path}.abc").read_text("utf-8")
    parsed, reasons = read_abc(text), tune["check"]["reasons"]
    begin, given_bars = heard_from(parsed, tune["prompt"])
    end = float(seconds_at(parsed, end_of_notes(parsed.notes)))
    until = min(begin + SOUND_SECONDS, end)
    heard = "all" if begin == 0 and until == end else f"{playing_time(begin)} to {playing_time(until)}"
    form = f"{parsed.key.removesuffix('m')} {'minor' if parsed.key.endswith('m') else 'major'}"
    form += "".join(f", {num}/{den}" for _, num, den in parsed.metres[:1])
    score = Path(f"{path}.svg").read_text("utf-8") if files["svg"] else "<desc></desc>"
    join = seconds_at(parsed, bar_starts(parsed)[min(given_bars, parsed.n_bars)])
    news = f"yours: bars 1-{given_bars}, new from {playing_time(join)}, " * bool(given_bars)
    news += f"{parsed.n_bars - given_bars} bars"
    return {**files, "text": text, "name": tune["name"], "form": form, "is_valid": not reasons,
            "original": None, "news": "the model added almost nothing" if "silent" in reasons else news,
            "title": f"Tune {int(tune['name'].rpartition('_')[2])}, {show(tune['kind'])}, {form}",
            "heard": f"Heard: {heard} of {playing_time(end)}.", "verdict": verdict_in_words(reasons, parsed),
            "roll": Markup(draw_roll(parsed, begin, given_bars)), "copied": tune.get("copy"),
            "left_out": html.unescape(re.search("<desc>(.*?)</desc>", score)[1])}


def verdict_in_words(reasons, parsed):
    """Whether a tune is valid, and if not, what is wrong in which bar."""
    found = []
    for reason in reasons:
        bars = sorted({fault.bar + 1 for fault in parsed.faults if fault.reason == reason})
        where = f" (bar {', '.join(map(str, bars[:4]))}{' ...' * (len(bars) > 4)})" if bars else ""
        found.append(WORDS.get(reason, reason.replace("_", " ")) + where)
    verdict = "Valid" if reasons in ([], ["cut"]) else "Not valid"
    return f"{verdict}{': ' * bool(found)}{'; '.join(found)}."


def page_tunes(save, evaluation):
    """The first three players, (label, tune) each, and the groups of cards: (title, text, tunes, form)."""
    best, sizes = evaluation["best"], {row["run"]: row["n_fit"] for row in evaluation["models"]}
    smallest = min((run for run in sizes if run.split("_")[0] == best.split("_")[0]), key=sizes.get)
    cards, same, first = {True: [], False: []}, {}, {}
    for folder in SAMPLE_FOLDERS:
        for row in read_json(save / folder / "metadata.json", []):
            run, kind, tune = row["run"], row["kind"], show_tune(save / folder / row["name"], row)
            if kind == "prompted":
                tune["original"] = show_tune(save / folder / f"{row['name']}_real", row)
            if kind == "same":
                same[run] = tune | {"title": f"{model_name(run)}, {sizes[run]:,} weights"}
            elif run == best:
                cards[tune["is_valid"]].append(tune)
            if kind in ("real", "unprompted") and not first.get(run, {}).get("is_valid"):
                first[run] = tune

    text = (f"By {model_name(best)}, the best network: of each kind the first ones, not selected; grey notes "
            "were given. Bars redrawn: each bar is drawn again until it adds up. A click into a picture "
            "plays from there. Right, or valid, means: every bar adds up, every tie and bracket is closed, "
            "the tune is not silent and came to its end, and abc2midi hears the notes that our reader finds.")
    labels = {"real": "A real tune", smallest: f"Smallest network, {sizes[smallest]:,} weights",
              best: f"Best network, {sizes[best]:,} weights"}
    return [(label, first[run]) for run, label in labels.items() if run in first], [
        ("Tunes that are right", text, cards[True], "cards"),
        ("What goes wrong", "The others of the same tunes.", cards[False], "cards"),
        ("The same four bars, continued by each size", "From small to large; the row scrolls sideways.",
         [same[run] for run in sorted(same, key=sizes.get)], "row")]


# --- for researchers

def answers(fits):
    """The question of the study, answered for each pair of families: how far their losses are apart."""
    found = []
    for pair, equal in itertools.product(fits["comparison"], ("equal_parameters", "equal_flops")):
        law, (one, other), gaps = pair[equal], map(model_name, pair["families"]), []
        for key, unit in ("bits_per_note", "bits a note"), ("nats", "nats a character"):
            if key in law:
                below = -np.array([law[key][end] for end in ("value", "hi", "lo")], float)
                gaps.append(f"{show(estimate(below))} {unit}")
        answer = f"is {' or '.join(gaps)} below that of the {other}, a ratio of {show(law)}"
        answer = answer if gaps else f"can't be compared with that of the {other}: {law['reason']}"
        found.append(f"At {equal.replace('_', ' ')} the loss of the {one} {answer}.")
    return found


def in_short(stats, fits, evaluation):
    """What the study found, in sentences with intervals and counts."""
    best = next(row for row in evaluation["models"] if row["run"] == evaluation["best"])
    leak, texts = stats["works"]["leak_of_split_by_file"]["leaked_chars"], answers(fits)
    texts += [f"{model_name(family)}: {law['verdict']}" for family, law in fits["families"].items()]
    texts.append(f"The best network, {model_name(best['run'])}, needs {best['bits_per_note']:.2f} bits a "
                 f"note, {best['test_loss']:.4f} nats a character, on {evaluation['test_chars']:,} "
                 "characters of unseen tunes.")
    texts += [f"Tunes {show(row['kind'])}: {show(row['valid'], True)} % of {row['n']} valid, "
              f"{show(row['copied'], True)} % copies." for row in evaluation["music"]
              if row["run"] in ("real", best["run"])]
    texts.append(f"Split by file, {leak:.1%} of the held-out characters would have a version in training.")
    if best["leaked_loss"] is not None:
        texts[-1] += f" On such tunes the best network loses {best['leaked_loss']:.4f} nats a character."
    return texts


def law_tables(fits):
    """Tables of the laws; a law that was refused has no row."""
    laws = fits["families"].items()
    stated = [row | {"predicted": estimate([row["predicted"], row["lo"], row["hi"]])}
              for row in (law.get("prediction") for _, law in laws) if row]
    plans = [{"family": family, "n_fit": row["n"], "tokens": row["d"]} | row
             for family, law in laws for row in law.get("frontier", [])]

    def fitted(name, keys):
        rows = [{"family": family} | law[name] for family, law in laws if law[name]["status"] != "refused"]
        return pick(rows, f"family {keys} status")

    return [("L(N) = a N^-alpha + c, with 95 % profile intervals", fitted("power_law", "alpha c")),
            ("The largest network, predicted from the smaller ones before it was measured",
             pick(stated, "model stated_at predicted observed hit error share_of_last_step ruler_error "
                          "persistence_error")),
            ("L(N, D) = E + A / N^alpha + B / D^beta, with 95 % bootstrap intervals",
             fitted("parametric", "alpha beta E")),
            ("The best use of so many hours on this machine, by L(N, D)",
             pick(plans, "family hours n_fit tokens epochs loss"))]


def loss_tables(runs, tested):
    """Tables of the training and of the test losses."""
    kinds = [{"run": "share of characters"} | {
        kind: part["share"] for kind, part in tested[0]["by_kind"].items()}]
    kinds += [{"run": row["run"]} | {kind: part["bits"] for kind, part in row["by_kind"].items()}
              for row in tested]
    return [("Networks at the full budget",
             pick(runs, "run n_fit tokens epochs val_loss flops tokens_per_s wall_s")),
            ("Test loss", pick(tested, "run bits_per_note test_loss test_loss_se test_bpc bits_per_second "
                                       "leaked_loss")),
            ("Test loss by kind of character, bits a character", kinds)]


def music_tables(evaluation):
    """Tables of the samples."""
    music = [row | {"whole_header": row["header"]} for row in evaluation["music"]]
    twins = [{"run": row["run"]} | {f"{damage}, %": share for damage, share in
                                    row["likelier_than_twin"].items()} for row in evaluation["models"]]
    means = [{"run": row["run"]} | {name.replace("_", " "): mean for name, mean in row["metrics"].items()}
             for row in music if row["kind"] in ("real", "unprompted") and row["metrics"]]
    return [("Valid tunes [95 % interval]",
             pick(music, "run kind n valid valid_or_cut bars_right whole_header tries copied first_fault")),
            ("Real tunes that are likelier than a twin of which one bar is damaged [95 % interval]", twins),
            ("How the tunes compare with real music: means [95 % bootstrap interval]", means)]


def data_tables(stats):
    """Tables of what became of the files, and of the split."""
    files = [{"outcome": "converted", "files": stats["converted"]}]
    files += [{"outcome": f"rejected: {why}", "files": n} for why, n in stats["rejected"].items()]
    return [("What became of the files", files),
            ("The split", [{"part": part} | row for part, row in stats["splits"].items()])]


def checklist(stats, results, fits):
    """The survey's questions, and what this run answers."""
    columns = ([row[key] for row in results["runs"]] for key in ("n_fit", "epochs", "lr"))
    (sizes, epochs, rates), method = map(sorted, map(set, columns)), fits["method"]
    answered = {
        "L(N)": method["power_law"], "L(N, D)": method["parametric"], "left out": method["left_out"],
        "how things are counted": method["points"],
        "points": f"{len(results['runs'])} in scaling_points.csv, with seeds: {len(sizes)} sizes, "
                  f"{sizes[0]:,} to {sizes[-1]:,}; {epochs[0]:.2g} to {epochs[-1]:.2g} epochs",
        "data": f"{results['corpus']}; {stats['vocabulary_size']} symbols (characters), in one order for all",
        "rates": f"peaks {rates[0]:.4g} to {rates[-1]:.4g}; {results['batch_tokens']:,} characters a batch, "
                 f"in windows of {results['seq_len']:,}"}
    return [{"question": question, "answer": answer} for question, answer in answered.items()]


def page_sections(stats, results, fits, evaluation, pictures):
    """What researchers read: (title, sentences, [(picture, form)], caption, tables, note) of each section."""
    def figures(*names):  # a narrow screen shows their panels one by one
        found = [(name, "wide" if f"{name}_panel0" in pictures else "part") for name in names]
        found += [(name, "narrow") for name in pictures if name.rpartition("_panel")[0] in names]
        return [(pictures[name], form) for name, form in found if name in pictures]

    runs = [row for row in results["runs"] if row["main"]]
    seeds = Counter((row["family"], row["size"]) for row in runs).values()
    loss = (f"Loss on validation tunes; N is without the embedding; D = {runs[-1]['tokens']:,} characters "
            f"({runs[-1]['epochs']:.2g} epochs); {min(seeds)} to {max(seeds)} seeds a size; "
            f"{results['corpus']}.")
    music = ("Real tunes that no network has seen go through the same checks: they are the ceiling. Valid or "
             f"cut: also those that were whole when cut after {evaluation['sample_chars']:,} characters. Of "
             "bars that are equal to the one before, only as many count as right as real tunes have. A copy "
             f"shares more runs of {SHINGLE} melodic intervals with a training tune than 95 % of real tunes. "
             "Metrics of MusPy and MGEval; entropy is in bits.")
    data = (f"{stats['converted']:,} tunes form {stats['works']['groups']:,} clusters of near-duplicates; "
            f"split by {stats['split_by']}. A note takes {stats['chars_per_note']:.2f} characters.")
    return [
        ("In short", in_short(stats, fits, evaluation), figures("combined_scaling"), loss, [], ""),
        ("Laws", [], figures(*(f"{family}_scaling" for family in fits["families"])),
         "The law of each family, its 95 % band, and what is known of alpha and c.", law_tables(fits), ""),
        ("Training", [], figures("training_curves", "loss_by_place"), "Training loss against characters "
         "seen; test loss against the place in the window: what more context brings.",
         loss_tables(runs, evaluation["models"]), ""),
        ("What emerges at which size", [], [], "", music_tables(evaluation), music),
        ("Data", [], figures("length_distribution"), "Lengths of the tunes.", data_tables(stats), data),
        ("Checklist", [], [], "", [("What the survey (Mis)Fitting, arXiv 2502.18969, asks of a scaling law",
                                    checklist(stats, results, fits))], "")]


def about_run(results, cfg):
    """Date, code, machine, precision, time and corpus of a run, for the head of the page."""
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=, with changes"]
    commit = "not known"
    if shutil.which("git"):
        found = subprocess.run(git, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
        commit = found.stdout.strip() or commit
    manifests = [*cfg.DATA_ROOT.glob("manifests/*.json"), *cfg.SAVE_DIR.glob("manifests/*.json")]
    seconds = sum(read_json(path).get("seconds", 0) for path in manifests)
    licences = [licence for name, licence in LICENCES.items() if name in results["corpus"]]
    precision = ", ".join(sorted({row["precision"] for row in results["runs"]}))
    return {"Date": datetime.date.today().isoformat(), "Commit": commit, "Machine": results["device"],
            "Precision": f"{precision}, torch {results['torch']}", "All stages": playing_time(seconds),
            "Corpus": f"{results['corpus']}, licence: {(licences or ['its owners'])[0]}",
            **({} if midirenderer else {"Sound": "none, for midirenderer was not installed"})}


@stage(version=4, knobs="", reads=(tokenize, train, fit, evaluate), root="SAVE_DIR")
def report(cfg):
    """One page that needs no other file, drawn from what the other stages wrote."""
    save = Path(cfg.SAVE_DIR)
    stats, names = read_json(cfg.tokens_root / "stats.json"), ("scaling_results", "fits", "evaluation")
    results, fits, evaluation = (read_json(save / f"{name}.json") for name in names)
    files = [cfg.tokens_root / "length_distribution.png", *sorted(save.glob("*.png"))]
    pictures = {path.stem: data_uri(path) for path in files}
    about, (first, groups) = about_run(results, cfg), page_tunes(save, evaluation)

    best = next(row for row in results["runs"] if row["main"] and row["run"] == evaluation["best"])
    tunes = stats["splits"]["train"]["tunes"] * min(1, best["epochs"])
    lead = (f"A network of {best['n_fit']:,} weights read {float(f'{tunes:.2g}'):,.0f} tunes "
            f"({results['corpus']}) in {playing_time(best['wall_s'])} minutes. Here is what it wrote.")
    cite = (f"Lakh MIDI Scaling Study, LakhMIDI.py, commit {about['Commit']}, {about['Date']}. Study "
            f"{results['study']}, seed {results['knobs']['SEED']}, {results['corpus']}.")
    write_page(save / "report.html", "Tunes by networks, small to large", lead, first=first, groups=groups,
               sections=page_sections(stats, results, fits, evaluation, pictures), about=about, cite=cite)
    return [save / "report.html"]


STAGES = (extract, convert, tokenize, train, fit, evaluate, report)


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, and the flag that may have been meant."""

    def error(self, message):
        words = re.findall(r"--\w+", message.partition("unrecognized arguments:")[2])
        known = {flag.lower(): flag for flag in self._option_string_actions}
        near = [known[word] for flag in words for word in difflib.get_close_matches(flag.lower(), known, 1)]
        raise UserError(f"{message}; " + (f"did you mean {near[0]}?" if near else "--help lists all flags"))


def parse_flags(argv):
    """(cfg, flags) of a command line; every knob is a flag that takes a Python literal or a bare word."""
    parser = Parser(prog="LakhMIDI.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.__name__ for stage in STAGES]
    stages = {"choices": names, "metavar": "STAGE"}
    add = parser.add_argument
    add("--from", dest="first", default=names[0], help="start with this stage", **stages)
    add("--to", dest="last", default=names[-1], help="stop after this one", **stages)
    add("--only", help=f"one of {', '.join(names)}", **stages)
    add("--force", action="store_true", help="run the chosen stages again; train keeps its finished models")
    add("--status", action="store_true", help="say what is done and what is stale, and stop")
    add("--plan", metavar="BUDGET", help="print the best N and D for 2h, 90m or 1e18 FLOPs, and stop")
    add("--sample", type=int, metavar="N", help="write N tunes by the best model, and stop")
    add("--prompt", default="", help="what they go on from: ABC text, an .abc or a .mid file")
    add("--valid", action="store_true", help="draw a bar again until it reads as a bar")
    add("--bars", type=int, default=8, metavar="N", help="how many bars of the prompt are taken (8)")
    knobs = parser.add_argument_group("knobs of class Cfg")
    for name, comment in knob_help().items():
        default = getattr(Cfg, name)
        knobs.add_argument(f"--{name}", metavar=type(default).__name__,
                           help=f"{comment} [{default!r}]".replace("%", "%%"))
    flags = parser.parse_args(argv and [str(word) for word in argv])  # paths, too
    given = {name: getattr(flags, name) for name in knob_help() if getattr(flags, name) is not None}
    return Cfg(**{name: parse_knob(name, text) for name, text in given.items()}), flags


def parse_knob(name, text):
    """The text of a flag as the type of its knob; what is no literal is left to checked_knob to refuse."""
    kind = type(getattr(Cfg, name))
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = tuple(map(str.strip, text.split(","))) if kind is tuple else text
    return (value,) if kind is tuple and not isinstance(value, (tuple, list)) else value


def banner(cfg):
    """What is about to happen, on what, and how to have it otherwise."""
    if cfg.given["DEVICE"] == "auto" and cfg.DEVICE == "cpu" and gpu_fault():
        say(f"note      {gpu_fault()}")
    say(f"corpus    {find_source(cfg)[0]}\n"
        f"device    {device_name(cfg)}\n"
        f"study     {cfg.STUDY}: {len(cfg.MODELS)} models, {len(planned_runs(cfg))} trainings of "
        f"{cfg.TRAIN_TOKENS_TARGET:,} characters\n"
        f"Your own data: --LMD_ZIP_PATH lmd_full.tar.gz, or --USE_LOCAL_MIDI True --LOCAL_MIDI_ROOT folder")


def stages_between(first, last):
    names = [stage.__name__ for stage in STAGES]
    chosen = STAGES[names.index(first):names.index(last) + 1]
    need(chosen, f"--from {first} comes after --to {last}")
    return chosen


def run_stages(cfg, first="extract", last="report", force=False):
    """Runs the stages from `first` to `last`; returns whether any of them had something to do."""
    return carry_out(stages_between(first, last), cfg, force)


def main(argv=None):
    """The command line; returns the exit code: 0 done, 1 failed, 2 a user's mistake, 130 or 143 stopped."""
    stopped = []

    def stop(number, _):  # SIGTERM, which schedulers send, ends a run as Ctrl-C does
        stopped.append(number)
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may hold what the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    signals = (signal.SIGINT, signal.SIGTERM)  # which only the main thread may handle
    signals = signals if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, stop) for number in signals]
    try:
        command(*parse_flags(argv))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if stopped:  # matplotlib's C++ makes a ValueError of it
            print("\nLakhMIDI: interrupted; the same command goes on from here", file=sys.stderr)
            return 128 + stopped[0]
        if not isinstance(error, (UserError, Diverged, OSError)):
            raise
        print(f"LakhMIDI: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def command(cfg, flags):
    """Does what a command line asks for. Raises UserError."""
    need(flags.sample is None or flags.sample > 0, "--sample takes the number of tunes, at least 1")
    need(flags.sample or not (flags.prompt or flags.valid), "--prompt and --valid go with --sample N")
    cfg.check()
    alone = flags.plan or flags.status or flags.sample
    if alone and int(os.environ.get("WORLD_SIZE") or 1) > 1 and os.environ.get("RANK", "0") != "0":
        say("nothing to do here: that is done by the process of rank 0")
    elif flags.plan:
        plan(cfg, flags.plan)
    elif flags.status:
        for one in STAGES:
            print(f"{one.__name__:9s} {one.status(cfg)}")
    elif flags.sample:
        compose(cfg, flags.sample, flags.prompt, flags.valid, flags.bars)
    else:
        first, last = flags.only or flags.first, flags.only or flags.last
        stages_between(first, last)  # raises UserError before the banner
        leads = ranks()[0] == 0
        if leads:
            banner(cfg)
        worked = run_stages(cfg, first, last, flags.force)
        if leads and not worked:
            say("nothing to do: every stage is up to date (--force runs them again)")
        if leads and last == "report":
            say(f"report    {cfg.SAVE_DIR / 'report.html'}")


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # of a torchrun: all is written; the store's thread may abort the usual way out
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1)  # rank 0 keeps the store of the others
        os._exit(code)
    sys.exit(code)
