"""Lakh MIDI Scaling Study: how the loss of Transformers and LSTMs on symbolic music falls with their size.

MIDI files go in at the top; ABC notation, characters, two families of models, power laws with honest intervals and
new music come out at the bottom. The file reads in the order in which the study runs.

    python LakhMIDI.py                                    the whole study on bundled folk tunes, or on what Cfg names
    python LakhMIDI.py --LMD_ZIP_PATH lmd_full.tar.gz     the same on the Lakh MIDI Dataset
    python LakhMIDI.py --status                           what is done, what is stale
    python LakhMIDI.py --from train --STUDY cpu           part of it, with another knob (--help lists all)
    python LakhMIDI.py --sample 8 --prompt mine.mid       new music by the best model; the prompt may be ABC text, too

  stage      reads                     writes
  extract    ZIP, tar, folder, corpus  data_lakh/midi/, midi_index.json
  convert    midi_index.json           data_lakh/abc/, report.jsonl
  tokenize   report.jsonl, abc/        data_lakh/tokens/: train.bin val.bin test.bin vocab.json stats.json
  train      tokens/                   runs_lakh/: gpt_*.pt lstm_*.pt scaling_results.json training_curves.json
  fit        scaling_results.json      runs_lakh/: fits.json *_scaling.png
  evaluate   checkpoints, tokens/      runs_lakh/: evaluation.json best_samples/ samples/ samples.jsonl
  report     every JSON above          runs_lakh/report.html

A stage is a function of files: it is skipped while its knobs and inputs are what they were, and goes on where it was
stopped. Left out on purpose: lyrics, pitch bends and controllers (ABC has no place for them), velocities.
"""
from __future__ import annotations

import argparse
import ast
import base64
import bz2
import contextlib
import copy
import csv
import difflib
import functools
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from bisect import bisect, bisect_left
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

# Threads that wait by spinning starve each other on a machine that is shared: 7 times slower when measured on two busy
# cores. The setting counts only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jinja2
import numpy as np
import requests
import soundfile
import symusic
import torch
import torch.nn.functional as F
from datasketch import MinHash
from matplotlib import colormaps
from matplotlib.figure import Figure
from pebble import ProcessExpired, ProcessPool
from scipy import optimize, stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from tqdm.auto import tqdm

# ============================================================================================================
# 1 Knobs: class Cfg
# ============================================================================================================


class UserError(ValueError):
    """Something the user can put right: main() prints the one line and exits with code 2."""


class Size(NamedTuple):
    """One row of a ladder: an architecture small enough to name in a word."""
    family: str  # "gpt" or "lstm"
    size: str  # its name within the family, about its number of parameters
    layers: int
    width: int  # model width d of a GPT, hidden size h of an LSTM
    heads: int = 1  # attention heads (GPT only)

    @property
    def name(self):
        return f"{self.family}_{self.size}"


class Study(NamedTuple):
    """What a study trains when the knobs leave it open."""
    tokens: int  # training characters per model
    batch_tokens: int  # characters per optimiser step
    seq_len: int  # characters per window
    ladder: tuple


# The LSTM of each row is matched to the GPT of the same name in non-embedding parameters: 12 L d^2 against 8 L h^2.
STUDIES = {
    "smoke": Study(16_384, 1_024, 64, tuple(
        [Size("gpt", f"{d}w", 1, d, d // 8) for d in (8, 16, 24, 32)]
        + [Size("lstm", f"{h}w", 1, h) for h in (10, 20, 30, 39)])),
    "cpu": Study(800_000, 2_048, 256, (
        Size("gpt", "25K", 2, 32, 2), Size("gpt", "80K", 3, 48, 3), Size("gpt", "200K", 4, 64, 4),
        Size("gpt", "450K", 4, 96, 6), Size("gpt", "1M", 5, 128, 8),
        Size("lstm", "25K", 2, 40), Size("lstm", "80K", 2, 72), Size("lstm", "200K", 2, 112),
        Size("lstm", "450K", 2, 168), Size("lstm", "1M", 2, 248))),
    "full": Study(100_000_000, 65_536, 1_024, (
        Size("gpt", "1M", 5, 128, 2), Size("gpt", "5M", 6, 256, 4), Size("gpt", "20M", 8, 448, 7),
        Size("gpt", "50M", 10, 640, 10), Size("gpt", "100M", 14, 768, 12),
        Size("lstm", "1M", 2, 256), Size("lstm", "5M", 2, 544), Size("lstm", "20M", 2, 1_104),
        Size("lstm", "50M", 2, 1_760))),
}


class KnobType(type):
    """Makes `Cfg.SEQLEN = 256` fail where it is written; `Cfg.SEQ_LEN = 256` changes what later Cfg() are made of."""
    def __setattr__(cls, name, value):
        super().__setattr__(name, checked_knob(cls, name, value))


class Cfg(metaclass=KnobType):
    """All knobs of the study. Edit them here, or `Cfg(SEQ_LEN=256)`, `Cfg.SEQ_LEN = 256`, `--SEQ_LEN 256`.

    A misspelt name or a value of another type raises UserError at once. Lower-case properties are derived from the knobs.
    """
    # --- data: set one of these; none of them: the folk tunes bundled with music21
    LMD_DOWNLOAD = ""  # full | matched | clean: fetch that part of the Lakh MIDI Dataset (1.8, 1.4, 0.2 GB)
    LMD_ZIP_PATH = ""  # a ZIP, tar or tar.gz of MIDI files, such as lmd_full.tar.gz
    USE_LOCAL_MIDI = False  # read the folder LOCAL_MIDI_ROOT in place instead of an archive
    LOCAL_MIDI_ROOT = ""  # a folder of MIDI files; it is never changed
    MAX_MIDI_FILES = 0  # use at most so many files, chosen by a hash of their path; 0 = all
    # --- where things go
    DATA_ROOT = "data_lakh"  # everything made from the MIDI files
    MIDI_ROOT = ""  # extracted MIDI files; empty = DATA_ROOT/midi
    ABC_ROOT = ""  # converted ABC files; empty = DATA_ROOT/abc
    SAVE_DIR = "runs_lakh"  # checkpoints, figures, samples, report
    # --- conversion and tokens
    WORKERS = 0  # conversion processes; 0 = one per core
    CONVERT_TIMEOUT = 60.0  # seconds that one MIDI file may take before it is given up
    MAX_ABC_CHARS = 300_000  # a longer tune is rejected: a few loops would otherwise fill the corpus
    MIN_NOTES = 8  # a shorter tune is rejected
    VAL_FRAC = 0.0  # share of the characters for validation; 0 = 1 %, more on a small corpus (EVAL_TOKENS)
    TEST_FRAC = 0.0  # share for the final test; 0 = as VAL_FRAC
    EVAL_TOKENS = 2_000_000  # a loss is taken over this many held-out characters at most, always the same ones
    # --- study
    STUDY = "auto"  # smoke | cpu | full; auto = full on CUDA, else cpu
    MODELS = ()  # names such as ("gpt_1M", "lstm_1M"), or rows ("gpt", "2M", 6, 160, 5); () = the study's ladder
    TRAIN_TOKENS_TARGET = 0  # training characters per model; 0 = the study's
    BATCH_TOKENS = 0  # characters per optimiser step; 0 = the study's
    SEQ_LEN = 0  # characters per window; 0 = the study's
    BUDGETS = (0.25, 0.5, 1.0)  # shares of TRAIN_TOKENS_TARGET at which the decayed loss is also measured
    SEEDS = 1  # trainings per model, with seeds SEED, SEED + 1, ...
    SEED = 1337  # everything random follows from it
    # --- optimiser
    LR = 0.02  # peak learning rate of the weight matrices (Muon)
    LR_ADAM = 0.01  # peak learning rate of embedding, head and biases (AdamW)
    BETAS = (0.9, 0.95)  # of AdamW
    WEIGHT_DECAY = 0.01  # decoupled, on the weight matrices
    CLIP_NORM = 1.0  # gradients are scaled down to this L2 norm
    WARMUP_FRAC = 0.02  # share of the steps in which the learning rate rises
    DECAY_FRAC = 0.2  # share of the steps in which it falls to zero
    # --- machine
    DEVICE = "auto"  # cpu | cuda | auto
    COMPILE = True  # torch.compile on CUDA
    MICRO_TOKENS = 0  # characters per forward pass; 0 = a whole batch. Steps do not change, memory does
    SAVE_EVERY_S = 60.0  # seconds between checkpoints of a model in training
    # --- evaluation
    SAMPLES = 0  # tunes of the best model that are judged, of each kind; 0 = 20 on a CPU, 500 on CUDA
    SHOWN = 4  # tunes of each kind in best_samples/, with sound and picture
    SAMPLE_CHARS = 0  # a tune that has not ended by then is cut at a bar line, and counted; 0 = 1,200, 4,000 on CUDA
    TEMPERATURE = 0.9  # of sampling
    BOOTSTRAP = 1_000  # draws behind the intervals of L(N, D)
    TOP_P = 0.98  # sample from the likeliest characters that hold this share of the probability

    def __init__(self, **knobs):
        for name in knob_names(type(self)):  # a snapshot: later edits of the class leave this study alone
            super().__setattr__(name, getattr(type(self), name))
        for name, value in knobs.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        super().__setattr__(name, checked_knob(type(self), name, value))

    @classmethod
    def smoke(cls, root, **knobs):
        """A study of seconds, all files below `root`."""
        root = Path(root)
        return cls(**{"DATA_ROOT": root / "data_lakh", "SAVE_DIR": root / "runs_lakh", "STUDY": "smoke", "WORKERS": 1,
                      "MAX_MIDI_FILES": 80, "EVAL_TOKENS": 4_000, "SAMPLES": 4, "SHOWN": 2, "SAMPLE_CHARS": 200, **knobs})

    # --- derived values
    @property
    def device(self):
        """The torch device type that is used: "cuda" or "cpu"."""
        return self.DEVICE if self.DEVICE != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def source(self):
        """What identifies the MIDI files of this study; UserError if they are not there."""
        return vars(self).get("pinned_source") or source_id(self)

    def pinned(self):
        """A copy that looks at its source once and for all: one run, one answer."""
        cfg = copy.copy(self)
        vars(cfg)["pinned_source"] = self.source
        return cfg

    @property
    def corpus(self):
        """The MIDI files of this study in words."""
        if self.LMD_DOWNLOAD:
            return f"the Lakh MIDI Dataset ({self.LMD_DOWNLOAD})"
        if self.LMD_ZIP_PATH:
            return Path(self.LMD_ZIP_PATH).name
        return f"folder {self.LOCAL_MIDI_ROOT}" if self.USE_LOCAL_MIDI else "the folk tunes bundled with music21"

    @property
    def study(self):
        return self.STUDY if self.STUDY != "auto" else "full" if self.device == "cuda" else "cpu"

    @property
    def ladder(self):
        """The models to train, small to large within each family: a tuple of Size."""
        known = {size.name: size for study in reversed(STUDIES.values()) for size in study.ladder}
        known |= {size.name: size for size in STUDIES[self.study].ladder}  # one name may differ between studies
        chosen = self.MODELS or STUDIES[self.study].ladder
        unknown = [m for m in chosen if isinstance(m, str) and m not in known]
        need(not unknown, f"MODELS names {unknown}; known are {', '.join(known)}")
        return tuple(known[m] if isinstance(m, str) else Size(*m) for m in chosen)

    @property
    def train_tokens(self):
        return self.TRAIN_TOKENS_TARGET or STUDIES[self.study].tokens

    @property
    def batch_tokens(self):
        return self.BATCH_TOKENS or STUDIES[self.study].batch_tokens

    @property
    def seq_len(self):
        return self.SEQ_LEN or STUDIES[self.study].seq_len

    @property
    def samples(self):
        return self.SAMPLES or (500 if self.device == "cuda" else 20)

    @property
    def sample_chars(self):
        return self.SAMPLE_CHARS or (4_000 if self.device == "cuda" else 1_200)

    @property
    def steps(self):
        """Optimiser steps of a full-budget run."""
        return max(1, self.train_tokens // self.batch_tokens)

    @property
    def midi_root(self):
        if self.USE_LOCAL_MIDI and not self.LMD_ZIP_PATH:
            return Path(self.LOCAL_MIDI_ROOT)
        return Path(self.MIDI_ROOT or Path(self.DATA_ROOT, "midi"))

    @property
    def abc_root(self):
        return Path(self.ABC_ROOT or Path(self.DATA_ROOT, "abc"))

    @property
    def tokens_root(self):
        return Path(self.DATA_ROOT, "tokens")

    @property
    def workers(self):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux knows more
        return self.WORKERS or cores

    def check(self):
        """Raises UserError for knobs that are each of the right type and make no sense together."""
        need(self.STUDY in ("auto", *STUDIES), f"STUDY is {self.STUDY!r}; choose auto, {', '.join(STUDIES)}")
        need(self.DEVICE in ("auto", "cpu", "cuda"), f"DEVICE is {self.DEVICE!r}; choose auto, cpu or cuda")
        need(self.DEVICE != "cuda" or torch.cuda.is_available(), "DEVICE is cuda, but torch sees no CUDA GPU; use cpu")
        need(self.VAL_FRAC + self.TEST_FRAC <= 0.5, "VAL_FRAC + TEST_FRAC must leave at least half of the data to train")
        need(self.batch_tokens % self.seq_len == 0, f"BATCH_TOKENS ({self.batch_tokens}) must be a multiple of "
                                                    f"SEQ_LEN ({self.seq_len})")
        need(self.SEEDS >= 1, "SEEDS must be at least 1")
        need(self.BUDGETS and all(isinstance(b, (int, float)) and 0 < b <= 1 for b in self.BUDGETS)
             and max(self.BUDGETS) == 1, "BUDGETS are shares of the training tokens in (0, 1], the largest of them 1")
        need(len(self.BETAS) == 2 and all(0 <= b < 1 for b in self.BETAS), "BETAS are two numbers in [0, 1)")
        need(0 < self.DECAY_FRAC <= 1 and self.WARMUP_FRAC + self.DECAY_FRAC <= 1,
             "DECAY_FRAC must be above 0, and WARMUP_FRAC + DECAY_FRAC at most 1")
        need(len({size.name for size in self.ladder}) == len(self.ladder), "MODELS holds the same model twice")
        for size in self.ladder:
            need(size.family in ("gpt", "lstm") and min(size.layers, size.width, size.heads) > 0
                 and size.width % size.heads == 0 and (size.family == "lstm" or size.width // size.heads % 2 == 0),
                 f"{size}: a GPT needs a width that is an even multiple of its heads; families are gpt and lstm")


def need(condition, sentence):
    """A user's mistake, told in one line."""
    if not condition:
        raise UserError(sentence)


def knob_names(cls=Cfg):
    return [name for klass in reversed(cls.__mro__) for name in vars(klass) if name.isupper()]


def checked_knob(cls, name, value):
    """`value` as the type of the knob `name`; UserError if there is no such knob or it can't hold that value."""
    if name not in knob_names(cls):
        near = difflib.get_close_matches(name.upper(), knob_names(cls), 1)
        raise UserError(f"Cfg has no knob {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    kind = type(getattr(cls, name))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, (np.generic, list)):
        value = tuple(value) if isinstance(value, list) else value.item()
    if kind is float and type(value) is int:
        value = float(value)
    need(type(value) is kind, f"{name} must be of type {kind.__name__}, not {value!r}")
    need(kind not in (int, float) or 0 <= value < float("inf"), f"{name} must be a finite number >= 0, not {value}")
    return value


def knob_help():
    """{knob: its comment in the source of Cfg}, so that a knob is described in one place."""
    return dict(re.findall(r"^    ([A-Z_]+) = .+?  # (.+)$", inspect.getsource(Cfg), re.M))


# ============================================================================================================
# 2 Plumbing: files that are whole or absent, stages that know whether they are up to date
# ============================================================================================================


@contextlib.contextmanager
def atomic_path(path):
    """Yields a path beside `path` to write to; it takes the name `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False, default=json_default) + "\n")


def json_default(value):
    """numpy scalars and arrays, tuples and paths as JSON knows them."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def read_json(path, missing=None):
    """The content of a JSON file, or `missing` where there is no such file or it was cut off."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return missing


def digest(data):
    """16 hexadecimal digits that change when anything in `data` (JSON-able) does."""
    text = json.dumps(data, sort_keys=True, default=json_default)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def say(message):
    """A line for people that does not tear a progress bar apart."""
    tqdm.write(message)


def progress(iterable=None, desc=None, total=None, unit="it", **options):
    """A tqdm bar that leaves a line now and then in a log file and moves freely before a person."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(iterable, desc=desc, total=total, unit=unit, mininterval=0.2 if watched else 15, delay=1,
                leave=False, **options)


def size_on_disk(path):
    """Bytes of a file; [files, bytes] of a folder; None where there is nothing."""
    path = Path(path)
    if path.is_dir():
        sizes = [os.path.getsize(Path(base, name)) for base, _, names in os.walk(path) for name in names]
        return [len(sizes), sum(sizes)]
    return path.stat().st_size if path.exists() else None


def stage(version, knobs, after=None, root="DATA_ROOT"):
    """Makes a function of files out of `body(cfg) -> [paths of its outputs]`: skipped while it is up to date.

    Up to date means: the manifest, which is written last, names the recipe of today (the knobs, `version`, and the
    recipes of all stages before), and every output has the size recorded in it. Raise `version` when the code of a stage
    changes what it writes. The decorated function takes (cfg, force=False) and returns whether it did any work.
    """
    def decorate(body):
        name = body.__name__

        def manifest_path(cfg):
            return Path(getattr(cfg, root), "manifests", f"{name}.json")

        def recipe(cfg):
            values = {knob: getattr(cfg, knob) for knob in knobs.split()}
            return {"stage": name, "version": version, "knobs": json.loads(json.dumps(values, default=json_default)),
                    "after": digest(after.recipe(cfg)) if after else None}

        def status(cfg):
            """"up to date", or why not."""
            found, today = read_json(manifest_path(cfg)), recipe(cfg)
            if not found:
                return "not run"
            then = found["recipe"]
            stale = [knob for knob, value in today["knobs"].items() if then["knobs"].get(knob) != value]
            if stale:
                return "stale: " + ", ".join(stale) + " changed"
            if then != today:
                return "stale: an earlier stage changed" if then["version"] == version else "stale: newer code"
            changed = [path for path, size in found["outputs"].items() if size_on_disk(path) != size]
            return f"stale: {changed[0]} changed" if changed else "up to date"

        @functools.wraps(body)
        def run(cfg, force=False):
            cfg = cfg.pinned()
            cfg.check()
            if after is not None:
                need(after.status(cfg) == "up to date",
                     f"{name} needs {after.__name__}, which is {after.status(cfg)}; run with --to {name}")
            if not force and status(cfg) == "up to date":
                say(f"{name:9s} up to date")
                return False
            manifest_path(cfg).unlink(missing_ok=True)
            today, began = recipe(cfg), time.time()
            outputs = body(cfg)
            write_json(manifest_path(cfg), {"recipe": today, "seconds": round(time.time() - began, 1),
                                            "outputs": {str(path): size_on_disk(path) for path in outputs}})
            say(f"{name:9s} done in {time.time() - began:.0f} s")
            return True

        run.recipe, run.status = recipe, status
        return run
    return decorate


# ============================================================================================================
# 3 Acquire: ZIP, tar, folder, download or bundled corpus -> data_lakh/midi/, midi_index.json
# ============================================================================================================

LAKH_URL = "http://hog.ee.columbia.edu/craffel/lmd/"  # https is not served there, hence the checksums
LAKH = {  # https://colinraffel.com/projects/lmd/, in bytes: 1,768,163,879, 1,407,072,670 and 234,283,029
    "full": ("lmd_full.tar.gz", "6fcfe2ac49ca08f3f214cec86ab138d4fc4dabcd7f27f491a838dae6db45a12b"),
    "matched": ("lmd_matched.tar.gz", "621ff830aed771f469e5bfa13dc12a33c6ed69090adeda63d0b5c47783af0191"),
    "clean": ("clean_midi.tar.gz", "de1bb64cbc0cf35545a05b5c3e786aa6890cfa144edffc4b827ff41bf8c33dc5"),
}
FOLK_BOOKS = ("airdsAirs", "essenFolksong", "oneills1850", "ryansMammoth")  # in music21, public domain
MIDI_SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
# What no honest archive of MIDI files comes near (Lakh has 178,561 of them):
MAX_MEMBERS = 1_000_000
MAX_FILE_BYTES = 16 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**30
MAX_RATIO = 200  # unpacked to packed, of the whole archive
FREE_RATIO_BYTES = 256 * 2**20  # a few equal files pack so well that small archives may have any ratio
SPARE_DISK_BYTES = 256 * 2**20


class Skip(Exception):
    """Why one file is left out; its text is the reason in the books."""


def source_id(cfg):
    """A dict that tells the source from any other without reading it. Raises UserError if there is none."""
    chosen = [knob for knob in ("LMD_DOWNLOAD", "LMD_ZIP_PATH", "USE_LOCAL_MIDI") if getattr(cfg, knob)]
    need(len(chosen) <= 1, f"{' and '.join(chosen)} each name a source of MIDI files; set only one of them")
    if cfg.LMD_DOWNLOAD:
        need(cfg.LMD_DOWNLOAD in LAKH, f"LMD_DOWNLOAD is {cfg.LMD_DOWNLOAD!r}; choose {', '.join(LAKH)}")
        return dict(zip(("archive", "sha256"), LAKH[cfg.LMD_DOWNLOAD], strict=True))
    if cfg.LMD_ZIP_PATH:
        path = Path(cfg.LMD_ZIP_PATH)
        need(path.is_file(), f"LMD_ZIP_PATH: there is no file {path} (LOCAL_MIDI_ROOT takes a folder)")
        return {"archive": path.name, "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    if cfg.USE_LOCAL_MIDI:
        root = cfg.LOCAL_MIDI_ROOT
        need(root and os.path.isdir(root), f"USE_LOCAL_MIDI: LOCAL_MIDI_ROOT {root!r} is no folder")
        found = sorted((name, os.lstat(path)) for name, path in walk(root) if is_midi(name))
        return {"folder": root, "digest": digest([(name, s.st_size, s.st_mtime_ns) for name, s in found])}
    return {package: importlib.metadata.version(package) for package in ("music21", "symusic")}


# --- names


def is_midi(name):
    return name.lower().endswith(MIDI_SUFFIXES)


def rank(name):
    """A number that orders names as neither the archive nor the file system does."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def check_name(name):
    """The parts of a name; raises Skip for what is no MIDI file, or would lead out of its folder."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    if not is_midi(name):
        raise Skip("not .mid, .midi, .kar or .rmi")  # an archive in the archive, too
    if name[0] in "/\\" or name[1] == ":" or ".." in parts or "\0" in name:
        raise Skip("unsafe path")
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        raise Skip("hidden")  # macOS packs a resource fork ._a.mid with every a.mid
    if len(name) > 400 or max(len(part.encode("utf-8", "surrogatepass")) for part in parts) > 240:
        raise Skip("name too long")
    return parts


# Reserved and control characters, bytes that are no UTF-8 (to tarfile: surrogates), a final dot or blank.
UNPORTABLE = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]|[. ]\Z')


def portable_path(parts, taken):
    """A path for every file system, unlike all in the Counter `taken` even where case does not count."""
    *folders, file = (UNPORTABLE.sub("_", part) for part in parts)
    folders = [folder + "_" * is_midi(folder) for folder in folders]  # a.mid/b.mid must not bar a.mid
    path = first = "/".join([*folders, file])

    def key(path):
        return unicodedata.normalize("NFC", path).casefold()

    while taken[key(path)]:
        taken[key(first)] += 1
        path = f"-{taken[key(first)]}".join(os.path.splitext(first))
    taken[key(path)] += 1
    return path


# --- archives: generators of (name of a member, function that reads it or raises Skip)


def check_bomb(path, unpacked):
    limit = min(MAX_UNPACKED_BYTES, FREE_RATIO_BYTES + MAX_RATIO * os.path.getsize(path))
    need(unpacked <= limit, f"{path} unpacks to more than {limit:,} bytes: refused as made to do harm")


def zip_members(path):
    with zipfile.ZipFile(path) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        check_bomb(path, sum(info.file_size for info in infos))  # zipfile reads no more than is declared
        ends = [info.header_offset + 30 + info.compress_size for info in infos]
        overlap = any(end > info.header_offset for end, info in zip(ends, infos[1:], strict=False))
        need(not overlap, f"{path} has members that overlap: refused as made to do harm")
        for info in progress(infos, "extract", unit="file"):
            if not info.is_dir():
                yield info.orig_filename, functools.partial(read_zip_member, archive, info)


def read_zip_member(archive, info):
    if info.flag_bits & 1:
        raise Skip("encrypted")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise Skip("link or device")
    try:
        with archive.open(info) as member:
            return member.read(MAX_FILE_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError) as error:
        raise Skip("damaged in the archive") from error


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, and reads long names of any length."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if not info.isreg() and info.size > 2**20:
            raise tarfile.ReadError("a header of more than 1 MiB")
        return info


def tar_members(path):
    """Read once, in order, and decompressed to the end, which is where the checksum stands."""
    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    size = os.path.getsize(path)
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", size, desc="extract", delay=1, leave=False) as packed:
        stream = openers.get(file.read(2), lambda packed: packed)(packed)
        file.seek(0)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # or memory would grow with the archive
                check_bomb(path, tar.offset)
                if not member.isdir():
                    yield member.name, functools.partial(read_tar_member, tar, member)
        unpacked = tar.offset
        while rest := stream.read(2**20):
            unpacked += len(rest)
            check_bomb(path, unpacked)


def read_tar_member(tar, member):
    if not member.isreg():
        raise Skip("link or device")
    return tar.extractfile(member).read(MAX_FILE_BYTES + 1)


# --- the folk tunes bundled with music21


def folk_members(cfg):
    """The tunes turned into MIDI files in the order of their rank: the first MAX_MIDI_FILES will be used."""
    corpus = Path(importlib.util.find_spec("music21").origin).parent / "corpus"  # an import takes seconds
    tunes = {}
    for book in (path for folder in FOLK_BOOKS for path in (corpus / folder).glob("*.abc")):
        for tune in re.split(rb"^(?=X:)", book.read_bytes(), flags=re.M)[1:]:
            number = int(re.match(rb"X:\s*(\d+)", tune)[1])
            tunes[f"{book.parent.name}/{book.stem}_{number:04d}.mid"] = tune
    names = sorted(tunes, key=rank)
    with abc2midi_program() as program, ThreadPool(2 * cfg.workers) as pool:  # threads mostly wait
        make = functools.partial(run_abc2midi, program)
        jobs = {name: pool.apply_async(make, [tunes[name]]) for name in names[:cfg.MAX_MIDI_FILES or None]}
        for name in progress(names, "extract", unit="tune"):
            yield name, jobs[name].get if name in jobs else functools.partial(make, tunes[name])


@contextlib.contextmanager
def abc2midi_program():
    """Yields the path of a private copy of the abc2midi in symusic, which pip leaves without the run bit."""
    bundled = Path(importlib.util.find_spec("symusic").origin).parent / "bin"
    with tempfile.TemporaryDirectory(prefix="abc2midi", ignore_cleanup_errors=True) as folder:
        program = Path(shutil.copy(next(bundled.glob("abc2midi*")), folder))
        program.chmod(0o700)
        yield program


def run_abc2midi(program, abc, timeout_s=20):
    """The bytes of a MIDI file for those of one tune (whole books crash abc2midi). Raises Skip, UserError."""
    midi = program.with_name(f"{threading.get_ident()}.mid")
    try:
        done = subprocess.run([program, "-", "-o", midi], input=abc, timeout=timeout_s,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode or not midi.exists():
            raise Skip("abc2midi failed")
        return midi.read_bytes()
    except subprocess.TimeoutExpired:
        raise Skip("abc2midi timed out") from None
    except OSError as error:
        raise UserError(f"can't run abc2midi ({error}); set TMPDIR to a folder where programs run") from error
    finally:
        midi.unlink(missing_ok=True)


# --- download


def download(url, path, *, sha256=None, pauses=(2, 10, 30)):
    """Fetches `url` to `path`, unless it is there; returns `path`. Goes on where another attempt broke off.

    `pauses`: seconds between attempts. Raises UserError for a file that can't be had or has another checksum.
    """
    path = Path(path)
    part, waits = path.with_name(path.name + ".part"), list(pauses)
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        try:
            fetch_rest(url, part)
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
            if found == sha256:
                os.replace(part, path)
            part.with_suffix(".json").unlink(missing_ok=True)  # without it the next attempt begins anew
            need(found == sha256, f"{url} is not the known file: its SHA-256 is {found}; run again to retry")
        except requests.RequestException as error:
            code = error.response.status_code if error.response is not None else 500
            reason = "no connection, or it broke off" if error.response is None else f"status {code}"
            need(waits and code >= 500, f"can't download {url}: {reason}; run again to go on from there, "
                 "or get the file in another way and set LMD_ZIP_PATH")
            time.sleep(waits.pop(0))
        except OSError as error:
            raise UserError(f"can't write {part}: {error.strerror}") from error
    return path


def fetch_rest(url, part):
    """One request for what `part` lacks, or for all unless the server says that the file is the same."""
    note = part.with_suffix(".json")  # which file `part` is the beginning of
    known = read_json(note, {}) if part.exists() else {}
    have = part.stat().st_size if known.get("tag") else 0
    if have and have == known["total"]:
        return
    asked = {"Range": f"bytes={have}-", "If-Range": known["tag"]} if have else {}
    asked["Accept-Encoding"] = "identity"  # or lengths would be those of packed bytes
    with requests.get(url, headers=asked, stream=True, timeout=30) as reply:
        etag = reply.headers.get("ETag", "W/")  # a weak one does not promise equal bytes
        tag = reply.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
        span = re.match(rf"bytes {have}-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if have and reply.status_code in (206, 416) and not (span and tag == known["tag"]):
            note.unlink()
            raise requests.ConnectionError("the file has changed on the server")
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0
        total = int(span[1] if have else reply.headers.get("Content-Length", 0))
        need(shutil.disk_usage(part.parent).free > total - have + SPARE_DISK_BYTES, f"no space for {part}")
        bar = progress(None, part.stem, total or None, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as out:
            write_json(note, {"tag": tag, "total": total})  # when `part` is empty or known
            for chunk in reply.iter_content(2**16):  # what is less than a chunk gets lost with the connection
                bar.update(out.write(chunk))
    if total and part.stat().st_size != total:
        raise requests.ConnectionError("the connection broke off")


# --- the stage


def collect(members, limit, take):
    """The books over `members`: `take(name, parts, read)` returns the path of a file or raises Skip.

    Memory holds names only. Of more than `limit` files (0: no limit) those of lowest rank are kept.
    """
    seen, skipped, kept = 0, Counter(), []  # a heap: what an archive holds is known only at its end
    for seen, (name, read) in enumerate(members, 1):
        need(seen <= MAX_MEMBERS, f"more than {MAX_MEMBERS:,} files")
        try:
            parts = check_name(name)
            if limit and len(kept) == limit and -rank(name) < kept[0][0]:
                raise Skip("over MAX_MIDI_FILES")
            heapq.heappush(kept, (-rank(name), take(name, parts, read)))
            if limit and len(kept) > limit:
                heapq.heappop(kept)  # its file stays on the disk, unused
                raise Skip("over MAX_MIDI_FILES")
        except Skip as reason:
            skipped[str(reason)] += 1
    return {"files": sorted(path for _, path in kept), "skipped": dict(skipped), "seen": seen}


def check_size(size):
    if not 0 < size <= MAX_FILE_BYTES:
        raise Skip(f"larger than {MAX_FILE_BYTES >> 20} MiB" if size else "empty")


def write_members(members, cfg):
    """Writes MIDI files below midi_root. Raises UserError for a folder that others have filled."""
    root, taken, folders = cfg.midi_root, Counter(), set()
    marker = root / ".extracted_by_LakhMIDI"  # all beside it is ours to replace
    need(not root.exists() or marker.exists() or not any(root.iterdir()),
         f"{root} holds other files; set MIDI_ROOT to an empty folder, or read them with USE_LOCAL_MIDI")

    def take(name, parts, read):
        path, data = portable_path(parts, taken), read()
        check_size(len(data))
        if not folders:  # an archive without music leaves nothing behind
            root.mkdir(parents=True, exist_ok=True)
            marker.touch()
        write_member(root, root / path, data, folders)
        return path

    return collect(members, cfg.MAX_MIDI_FILES, take)


def write_member(root, target, data, folders):
    """Writes a file, unless it is there, and never through a link. `folders`: those known to be below `root`.

    No fsync, no renaming: what a killed run left half written is in no index, and its bytes differ next time.
    """
    try:
        need(shutil.disk_usage(root).free > SPARE_DISK_BYTES, f"the disk of {root} is full")
        if target.parent not in folders:
            inside = Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(root))
            need(inside, f"{target.parent} is a link that leads out of {root}; remove it")
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
        if target.is_symlink() or not target.is_file() or target.read_bytes() != data:
            target.unlink(missing_ok=True)  # rather than written into: it may have a second name elsewhere
            with open(target, "xb") as out:
                out.write(data)
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror}") from error


def walk(root):
    """(relative POSIX path, path) of all files in a folder; links to folders are not followed."""
    for base, _, files in os.walk(root):
        for path in (os.path.join(base, file) for file in sorted(files)):
            yield Path(os.path.relpath(path, root)).as_posix(), path


def index_folder(cfg):
    """The books of LOCAL_MIDI_ROOT, which is only read."""
    root = Path(cfg.LOCAL_MIDI_ROOT)
    for knob in ("DATA_ROOT", "SAVE_DIR"):
        inside = Path(os.path.realpath(getattr(cfg, knob))).is_relative_to(os.path.realpath(root))
        need(not inside, f"{knob} is inside LOCAL_MIDI_ROOT, where nothing is written; move one of them")

    def take(name, parts, path):
        if re.search("[\ud800-\udfff]", name):
            raise Skip("name that is not UTF-8")
        if not os.path.isfile(path):
            raise Skip("broken link or device")
        check_size(os.path.getsize(path))
        return name

    return collect(walk(root), cfg.MAX_MIDI_FILES, take)


def read_archive(path, cfg):
    """The books of an archive, known by its content. Raises UserError if it can't be read to its end."""
    try:
        with open(path, "rb") as file:
            members = zip_members if file.read(4) in (b"PK\3\4", b"PK\5\6") else tar_members
        return write_members(members(path), cfg)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError,
            NotImplementedError, OverflowError, RecursionError, UnicodeError) as error:
        raise UserError(f"{path} is no ZIP or tar archive, or is cut off or damaged ({error})") from error


@stage(version=1, knobs="source MAX_MIDI_FILES MIDI_ROOT")
def extract(cfg):
    """Puts the MIDI files of the source into midi_root; midi_index.json says which of those there to use."""
    index, source, archive = Path(cfg.DATA_ROOT, "midi_index.json"), source_id(cfg), cfg.LMD_ZIP_PATH
    index.unlink(missing_ok=True)
    if cfg.LMD_DOWNLOAD:
        name, sha256 = LAKH[cfg.LMD_DOWNLOAD]
        archive = download(LAKH_URL + name, Path(cfg.DATA_ROOT, "downloads", name), sha256=sha256)
    if cfg.USE_LOCAL_MIDI:
        books = index_folder(cfg)
    else:
        books = read_archive(archive, cfg) if archive else write_members(folk_members(cfg), cfg)
    files, skipped = books["files"], books["skipped"]
    assert books["seen"] == len(files) + sum(skipped.values()), skipped
    need(files, f"no MIDI files in {archive or cfg.midi_root}; skipped: {skipped or 'nothing'}")
    say(f"extract   {len(files):,} MIDI files of {books['seen']:,} files; skipped: {skipped or 'none'}")
    write_json(index, {"source": source, "root": str(cfg.midi_root), **books})
    return [index] if cfg.USE_LOCAL_MIDI else [index, cfg.midi_root]


# ============================================================================================================
# 4 Convert: data_lakh/midi/ -> data_lakh/abc/, report.jsonl
# ============================================================================================================
# The pure functions. A beat is a quarter note whatever the metre says. In the writer times are whole ticks
# of 1/48 beat, so that the grids of 1/16 beat (3 ticks), 1/8 (6) and triplets (1/6, 8) are all exact.

BEAT = 48  # ticks per beat
LETTERS = "CDEFGAB"
NATURAL = (0, 2, 4, 5, 7, 9, 11)  # semitones of C D E F G A B
MARKS = {-2: "__", -1: "_", 0: "=", 1: "^", 2: "^^"}
KEYS = ("Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#")  # signatures -5 ... 6
MINOR = ("Bbm", "Fm", "Cm", "Gm", "Dm", "Am", "Em", "Bm", "F#m", "C#m", "G#m", "D#m")
MAX_LAYERS = 4  # chords of a voice that may overlap; more buys little and costs length
UNITS = (1, 2, 4, 8, 16, 32)  # L:1/n
DRUM_KEY = 6  # G major in every drum voice: its one sharp is the closed hi-hat, the most frequent drum
# Krumhansl & Kessler 1982, probe-tone ratings of the twelve pitch classes from the tonic up
MAJOR_PROFILE = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR_PROFILE = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


class Rejected(Exception):
    """A MIDI file that becomes no text. `reason` is a short slug for the books, the message adds detail."""
    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Notes(NamedTuple):
    """Notes as four arrays of one length N. Times are in beats, that is quarter notes."""
    voice: np.ndarray
    onset: np.ndarray
    duration: np.ndarray
    pitch: np.ndarray


class Tune(NamedTuple):
    """What read_abc found."""
    notes: Notes
    voices: list  # (program 0-127, is_drum) of each voice
    key: str
    tempos: list  # (beat, quarter notes per minute)
    metres: list  # (beat, numerator, denominator)
    n_bars: int
    problems: list  # (line number, slug)


# --- MIDI in

def read_score(source):
    """Bytes or path of a MIDI file, bare or RIFF-wrapped -> symusic score. Raises Rejected."""
    data = bytes(source) if isinstance(source, (bytes, bytearray)) else Path(source).read_bytes()
    start = data.find(b"MThd")
    if start < 0:
        raise Rejected("bad_header", "no MThd chunk")
    try:  # sanitize_data clamps payload bytes above 127, else one file in fifty would be refused
        score = symusic.Score.from_midi(data[start:], sanitize_data=True)
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise Rejected("bad_bytes", str(error)) from error
    if score.tpq <= 0:
        raise Rejected("bad_header", "no ticks per quarter note")
    return score


def score_notes(score):
    """symusic score -> (Notes, [(program, is_drum)]): a voice for each track, channel and program."""
    tracks = [track for track in score.tracks if len(track.notes)]
    if not tracks:
        return Notes(*[np.zeros(0, int)] * 4), []
    arrays = [track.notes.numpy() for track in tracks]
    voice = np.repeat(np.arange(len(arrays)), [len(a["time"]) for a in arrays])
    time, length, pitch = (np.concatenate([a[k] for a in arrays]) for k in ("time", "duration", "pitch"))
    notes = Notes(voice, time / score.tpq, length / score.tpq, pitch.astype(int))
    return notes, [(track.program, bool(track.is_drum)) for track in tracks]


def merge_duplicates(notes):
    """Notes sorted by voice, pitch and onset; of equal ones (a ninth of web files) the longest."""
    order = np.lexsort((-notes.duration, notes.onset, notes.voice * 128 + notes.pitch))
    voice, onset, duration, pitch = (column[order] for column in notes)
    new = np.append(True, (np.diff(onset) != 0) | (np.diff(voice * 128 + pitch) != 0))[:len(order)]
    return Notes(voice[new], onset[new], duration[new], pitch[new])


def read_midi_notes(source):
    """Bytes or path of a MIDI file -> Notes in beats as written. Raises Rejected."""
    return score_notes(read_score(source))[0]


def bar_lines(score, end):
    """Score and length in ticks -> bar starts (B + 1,), and the metres as {bar: (numerator, denominator)}."""
    changes = {0: (4, 4)}
    for sign in score.time_signatures:
        beats = 4 * sign.numerator / max(1, sign.denominator)
        if 1.5 <= beats <= 16 and sign.denominator in (1, 2, 4, 8, 16, 32):  # others are noise in the file
            changes[round(sign.time / score.tpq * 8) * BEAT // 8] = (sign.numerator, sign.denominator)
    times = sorted(t for t in changes if t < max(end, 1))
    starts, metres = [], {}
    for start, stop in itertools.pairwise([*times, end]):
        num, den = changes[start]
        length = 4 * BEAT * num // den
        bars = list(range(start, max(stop, start + 1), length))
        metres[len(starts)] = (num, den)
        starts += bars
        last = bars[-1]
        if stop < last + length and stop != end:  # a change inside a bar cuts it: a metre of its own
            num, den = (stop - last) // 6, 32
            while num % 2 == 0 and den > 4:
                num, den = num // 2, den // 2
            metres[len(starts) - 1] = (num, den)
    return np.array([*starts, last + length]), metres


def bar_tempos(score, bars):
    """(quarter notes per minute of each bar, shape (B,), that keep its seconds; seconds in all)."""
    tempos = sorted(((t.time / score.tpq * BEAT, t.mspq) for t in score.tempos), key=lambda tempo: tempo[0])
    ticks = np.array([0.0, *(tick for tick, _ in tempos)])
    per_tick = np.array([500_000, *(max(1, us) for _, us in tempos)]) / BEAT / 1e6  # seconds
    seconds = np.concatenate([[0], np.cumsum(np.diff(ticks) * per_tick[:-1])])
    segment = np.searchsorted(ticks, bars, "right") - 1
    at_bars = seconds[segment] + (bars - ticks[segment]) * per_tick[segment]
    return 60 * np.diff(bars) / BEAT / np.diff(at_bars), at_bars[-1]


# --- quantising

def choose_grid(onset, key):
    """Step in ticks for a file, and whether it has triplet beats; `onset` ascends within each `key`."""
    same = key[1:] == key[:-1]
    merged = [np.count_nonzero(same & (np.diff(np.rint(onset * n)) == 0)) for n in (8, 16)]
    step = 3 if merged[0] - merged[1] > 0.006 * len(onset) else 6
    on8 = np.abs(onset * 8 - np.rint(onset * 8)) < 0.16  # within 1/50 beat of the grid
    on6 = np.abs(onset * 6 - np.rint(onset * 6)) < 0.12
    return step, np.mean(on8 | on6) > 0.9 and np.mean(on6 & ~on8) > 0.01


def triplet_beats(notes, n_beats, step):
    """Which beats of each voice lie nearer to the 1/6 than to the 1/8 grid: bool, shape (voices, n_beats)."""
    beat = np.floor(notes.onset + step / 2 / BEAT).astype(int)
    gain = (np.abs(notes.onset * 8 - np.rint(notes.onset * 8)) / 8
            - np.abs(notes.onset * 6 - np.rint(notes.onset * 6)) / 6)
    shape = (notes.voice.max() + 1, n_beats)
    total = np.bincount(notes.voice * n_beats + beat, gain, minlength=shape[0] * n_beats)
    return total.reshape(shape) > 1 / 48


def quantise(beats, voice, step, triplet):
    """Beats -> ticks on the file's grid, or on the 1/6 grid inside triplet beats."""
    ticks = np.rint(beats * (BEAT // step)).astype(int) * step
    if triplet is None:
        return ticks
    inside = triplet[voice, np.floor(beats + step / 2 / BEAT).astype(int)]
    return np.where(inside, np.rint(beats * 6).astype(int) * 8, ticks)


def snap_ends(voice, start, end, duration, bars):
    """Ends move to an onset of the voice, else a bar line, else a 1/4 beat: fewer rests, lengths and layers.

    Only as far as the length stays within 1/8 beat or 20 % of `duration`, the true one in ticks.
    """
    slack = np.maximum(BEAT / 8, duration / 5) + 1e-6
    span = bars[-1] + 10_000
    onsets = np.append(np.unique(voice * span + start), 2**60)
    after = np.searchsorted(onsets, voice * span + end)
    quarter, line = np.rint(end / 12).astype(int) * 12, bars[np.searchsorted(bars, end - BEAT // 8)]
    for target in (quarter, line, onsets[after - 1] - voice * span, onsets[after] - voice * span):
        fits = (np.abs(target - start - duration) <= slack) & (target > start)
        end = np.where(fits, target, end)
    return end


def grid_notes(notes, bars, step, triplet):
    """Notes by voice, pitch, onset -> (voice, pitch, start, end) in ticks, one note at a time per pitch."""
    key = notes.voice * 128 + notes.pitch
    start = quantise(notes.onset, notes.voice, step, triplet)
    if step == 3:  # a second stroke within one step of the fine grid moves to the next, still within 1/8 beat
        again = np.append(False, (np.diff(key) == 0) & (np.diff(start) == 0))
        start = start + step * (again & (start % step == 0))
    end = np.maximum(quantise(notes.onset + notes.duration, notes.voice, step, triplet), start + step)
    first = np.flatnonzero(np.append(True, (np.diff(key) != 0) | (np.diff(start) != 0)))  # one note per step
    end, duration = np.maximum.reduceat(end, first), np.maximum.reduceat(notes.duration, first) * BEAT
    voice, pitch, start, key = notes.voice[first], notes.pitch[first], start[first], key[first]
    end = snap_ends(voice, start, end, duration, bars)
    struck = np.append(np.where(np.diff(key) == 0, start[1:], 2**60), 2**60)
    if triplet is not None:  # a shortest note may have left the 1/6 grid
        end = np.where(triplet[voice, (end - 1) // BEAT], -(-end // 8) * 8, end)
    return voice, pitch, start, limit_layers(voice, start, np.minimum(end, struck), MAX_LAYERS)


def limit_layers(voice, start, end, most):
    """Cut ends so that at most `most` chords of a voice sound at once; what would end first ends early."""
    span = end.max() + 1
    chords, chord = np.unique((voice * span + start) * span + end, return_inverse=True)
    low, high = chords // span, chords // span**2 * span + chords % span  # starts and ends, voice after voice
    depth = np.arange(1, len(chords) + 1) - np.searchsorted(np.sort(high), low, "right")
    high_list, sounding = high.tolist(), []
    for i in np.flatnonzero(np.isin(low // span, low[depth > most] // span)).tolist():
        sounding = [(t, k) for t, k in sounding if t > low[i]]
        if len(sounding) == most:
            first = min(sounding)
            sounding.remove(first)
            if low[first[1]] < low[i]:
                high_list[first[1]] = int(low[i])
        sounding.append((high_list[i], i))
    return (np.array(high_list) % span)[chord]


# --- writing

def choose_key(pitch):
    """Pitches -> (index into KEYS of the signature with the fewest accidentals, name of the key)."""
    count = np.bincount(pitch % 12, minlength=12).astype(float)
    scale = np.array([[(7 * s + n) % 12 for n in NATURAL] for s in range(-5, 7)])
    best = int(np.argmax(count[scale].sum(1) - 1e-6 * np.abs(np.arange(12) - 5)))
    tonic = 7 * (best - 5) % 12
    major = np.dot(np.roll(MAJOR_PROFILE, tonic), count) / np.linalg.norm(MAJOR_PROFILE)
    minor = np.dot(np.roll(MINOR_PROFILE, tonic + 9), count) / np.linalg.norm(MINOR_PROFILE)
    return best, (MINOR if minor > major else KEYS)[best]


@functools.cache
def spelling(key, octave):
    """All pitches in a key: (128 names, then 128 with explicit marks; letters; which are foreign to it)."""
    sharps = key - 5
    low = min(max(sharps - 3, -8), 1)  # the twelve names in a row on the line of fifths, F flat to B sharp
    names, marked, letters, foreign = [], [], [], []
    for pitch in range(128):
        fifth = next(f for f in range(low, low + 12) if 7 * f % 12 == pitch % 12)
        alter = (fifth + 1) // 7
        letter = 4 * fifth % 7
        height = (pitch - alter) // 12 - 5 - octave  # 0 = the octave of middle C
        name = LETTERS[letter].lower() + "'" * (height - 1) if height > 0 else LETTERS[letter] + "," * -height
        away = not sharps - 1 <= fifth <= sharps + 5
        names.append(MARKS[alter] + name if away else name)
        marked.append(MARKS[alter] + name)
        letters.append(letter)
        foreign.append(away)
    return names + marked, np.array(letters), np.array(foreign)


@functools.lru_cache(maxsize=4096)
def length_text(ticks, unit):
    """A length as ABC writes it: '' for the unit, '3', '/', '3/', '/4', '3/4'."""
    divisor = math.gcd(ticks, unit)
    num, den = ticks // divisor, unit // divisor
    return (str(num) if num > 1 else "") + {1: "", 2: "/"}.get(den, f"/{den}")


def choose_units(voice, length, n_voices):
    """Lengths in ticks -> (the L: that suits the file, the L: of each voice, the text of each length)."""
    lengths, which = np.unique(length, return_inverse=True)
    texts = [[length_text(ticks, 4 * BEAT // den) for ticks in lengths.tolist()] for den in UNITS]
    count = np.bincount(voice * len(lengths) + which, minlength=n_voices * len(lengths)).reshape(n_voices, -1)
    cost = count @ np.array([[len(text) for text in row] for row in texts]).T  # (voices, units)
    common, best = cost.sum(0).argmin(), cost.argmin(1)
    best = np.where(cost.min(1) + len("\nL:1/16") < cost[:, common], best, common)
    texts = [text for row in texts for text in row]
    return (UNITS[common], [UNITS[unit] for unit in best.tolist()],
            [texts[i] for i in (best[voice] * len(lengths) + which).tolist()])


def split_at(cut, pieces, start, end):
    """Pieces (index, start, end) strictly around their `cut` become two."""
    hit = (start < cut) & (cut < end)
    return (np.concatenate([pieces, pieces[hit]]), np.concatenate([start, cut[hit]]),
            np.concatenate([np.where(hit, cut, end), end[hit]])) if hit.any() else (pieces, start, end)


def split_triplets(index, voice, start, end, triplet):
    """Cut what enters or leaves a triplet beat half-way at the border of that beat."""
    inside = triplet[voice[index], start // BEAT] & (start % BEAT != 0)
    index, start, end = split_at(np.where(inside, -(-start // BEAT) * BEAT, start), index, start, end)
    inside = triplet[voice[index], (end - 1) // BEAT] & (end % BEAT != 0)
    return split_at(np.where(inside, end // BEAT * BEAT, start), index, start, end)


def assign_layers(group, start, end):
    """Layer of each event: events of a group (one voice in one bar) that overlap get different layers."""
    layer = np.zeros(len(group), int)
    clash = (group[1:] == group[:-1]) & (start[1:] < end[:-1])
    todo = np.unique(group[1:][clash])
    lows, highs = np.searchsorted(group, todo), np.searchsorted(group, todo, "right")
    for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
        ends, chosen = [], []
        for s, e in zip(start[low:high].tolist(), end[low:high].tolist(), strict=True):
            free = [(s - t, k) for k, t in enumerate(ends) if t <= s]
            if free:
                k = min(free)[1]
                ends[k] = e
            else:
                k = len(ends)
                ends.append(e)
            chosen.append(k)
        layer[low:high] = chosen
    return layer


def bar_pieces(voice, start, end, bars, triplet):
    """Notes cut at bar lines and at the borders of triplet beats -> (note, bar, start, end) of each piece."""
    first, last = np.searchsorted(bars, start, "right") - 1, np.searchsorted(bars, end) - 1
    n = last - first + 1
    index = np.repeat(np.arange(len(start)), n)
    bar = np.repeat(first - np.cumsum(n) + n, n) + np.arange(len(index))
    low, high = np.maximum(start[index], bars[bar]), np.minimum(end[index], bars[bar + 1])
    if triplet is not None:
        index, low, high = split_triplets(index, voice, low, high, triplet)
        bar = np.searchsorted(bars, low, "right") - 1
    return index, bar, low, high


def name_pieces(voice, pitch, group, keys, octaves):
    """Note name of each piece; `group` numbers the bars of all voices.

    Where a bar has a letter in two forms both carry a mark: then it does not matter whether a reader lets
    accidentals last to the bar line (and in which octaves), and a name means one pitch wherever it stands.
    """
    tables = [spelling(key, octave) for key, octave in zip(keys, octaves, strict=True)]
    letters, foreign = np.array([t[1] for t in tables]), np.array([t[2] for t in tables])
    slot, away = group * 7 + letters[voice, pitch], foreign[voice, pitch]
    altered = np.zeros(slot.max() + 1, bool)
    altered[slot[away]] = True
    marked = pitch + 128 * (altered[slot] & ~away)
    return [tables[v][0][p] for v, p in zip(voice.tolist(), marked.tolist(), strict=True)]


def write_chords(notes, bars, keys, octaves, triplet):
    """Quantised notes -> (text without length, tied, line, start, end) of each chord, and layers per voice.

    A line is one layer of one voice in one bar: ((bar * voices) + voice) * layers + layer.
    """
    voice, pitch, start, end = notes
    index, bar, low, high = bar_pieces(voice, start, end, bars, triplet)
    group, span = bar * len(octaves) + voice[index], np.diff(bars).max() + 1
    slot = (group * span + low - bars[bar]) * span + high - bars[bar]
    order = np.argsort(slot * 128 + pitch[index])
    slot, index, group, low, high = (column[order] for column in (slot, index, group, low, high))
    names = name_pieces(voice[index], pitch[index], group, keys, octaves)
    heads = np.flatnonzero(np.append(True, np.diff(slot) != 0))  # equal start and end: a chord
    size = np.diff(np.append(heads, len(slot)))
    tied = end[index] > high
    n_tied = np.add.reduceat(tied.astype(int), heads)
    texts = chord_texts(names, tied.tolist(), heads.tolist(), size.tolist(), n_tied.tolist())
    layer = assign_layers(group[heads], low[heads], high[heads])
    n_layers = layer.max() + 1
    return texts, n_tied == size, group[heads] * n_layers + layer, low[heads], high[heads], n_layers


def add_rests(line, low, high, bar_start, bar_end):
    """Events sorted by line (bar, voice, layer) and start -> the rests between them: (line, low, high)."""
    head = np.append(True, line[1:] != line[:-1])
    tail = np.append(head[1:], True)
    before = np.where(head, bar_start, np.append(0, high[:-1]))
    gap, close = before < low, tail & (high < bar_end)
    return (np.concatenate([line[gap], line[close]]), np.concatenate([before[gap], high[close]]),
            np.concatenate([low[gap], bar_end[close]]))


def write_body(notes, bars, keys, octaves, triplet, fields):
    """Quantised notes -> (L of the file, L of each voice, body text)."""
    n_voices = len(octaves)
    texts, tied, line, low, high, n_layers = write_chords(notes, bars, keys, octaves, triplet)
    span = bars[-1] + 1
    order = np.argsort(line * span + low)
    line, low, high, bar = line[order], low[order], high[order], line[order] // (n_layers * n_voices)
    rest, rest_low, rest_high = add_rests(line, low, high, bars[bar], bars[bar + 1])
    if triplet is not None:
        index, rest_low, rest_high = split_triplets(
            np.arange(len(rest)), rest // n_layers % n_voices, rest_low, rest_high, triplet)
        rest = rest[index]
    item = np.append(order, np.full(len(rest), len(texts)))
    line, low, high = np.append(line, rest), np.append(low, rest_low), np.append(high, rest_high)
    order = np.argsort(line * span + low)
    item, line, low, high = item[order], line[order], low[order], high[order]
    length, tuplets = (high - low, []) if triplet is None else write_tuplets(line, low, high)
    unit, units, lengths = choose_units(line // n_layers % n_voices, length, n_voices)
    texts.append("z")
    tokens = [texts[i] + length for i, length in zip(item.tolist(), lengths, strict=True)]
    for i in np.flatnonzero(np.append(tied, False)[item]).tolist():
        tokens[i] += "-"
    for i, text in tuplets:
        tokens[i] = text + tokens[i]
    return unit, units, join_lines(tokens, line, n_layers, n_voices, fields)


def chord_texts(names, tied, heads, size, n_tied):
    """Names of the pieces -> a text per chord, without its length; ties inside where only some are tied."""
    texts = []
    for i, n, t in zip(heads, size, n_tied, strict=True):
        if n == 1:
            texts.append(names[i])
        elif t in (0, n):
            texts.append("[" + "".join(names[i:i + n]) + "]")
        else:
            texts.append("[" + "".join(names[j] + "-" * tied[j] for j in range(i, i + n)) + "]")
    return texts


def write_tuplets(line, low, high):
    """Written lengths, and (item, prefix) for each tuplet: the items of one beat that leave the 1/8 grid."""
    span = high.max() // BEAT + 1
    beat = line * span + low // BEAT
    off = (low % 3 != 0) | (high % 3 != 0)  # only thirds of a beat leave the 1/16 grid
    beats = np.unique(beat[off])
    inside = np.isin(beat, beats) & (high - low < BEAT)
    length = np.where(inside, (high - low) * 3 // 2, high - low)
    firsts = np.flatnonzero(inside & np.append(True, beat[1:] != beat[:-1]))
    counts = np.searchsorted(beat, beat[firsts], "right") - firsts
    prefixes = ["(3" if n == 3 else f"(3::{n}" for n in counts.tolist()]
    return length, list(zip(firsts.tolist(), prefixes, strict=True))


def join_lines(tokens, line, n_layers, n_voices, fields):
    """Tokens -> body: a line per bar, [V:n]layer&layer| for each voice that sounds, Zn for bars it missed."""
    heads = np.flatnonzero(np.append(True, np.diff(line) != 0))
    due = [0] * n_voices  # the next bar that each voice has to write
    now = -1  # the bar of the line being written
    for i, number in zip(heads.tolist(), line[heads].tolist(), strict=True):
        bar, voice, layer = number // (n_layers * n_voices), number // n_layers % n_voices, number % n_layers
        if layer:
            tokens[i] = "&" + tokens[i]
            continue
        text = "|" if now >= 0 else ""
        if bar != now:
            text += silent_bars(now + 1, bar, due, fields) + "\n" + fields.get(bar, "")
            now = bar
        text += f"[V:{voice + 1}]"
        if due[voice] < bar:
            text += f"Z{bar - due[voice]}|"
        due[voice] = bar + 1
        tokens[i] = text + tokens[i]
    return "".join(tokens) + "|\n"


def silent_bars(begin, end, due, fields):
    """Lines for bars in which nobody plays: the first voice rests, up to each change of metre or tempo."""
    out = ""
    while begin < end:
        stop = min([bar for bar in fields if begin < bar < end], default=end)
        missed = f"Z{begin - due[0]}|" if due[0] < begin else ""
        out += f"\n{fields.get(begin, '')}[V:1]{missed}Z{stop - begin}|"
        begin = due[0] = stop
    return out


def header_fields(metres, tempos):
    """Metres {bar: (num, den)}, tempo of each bar -> {bar: '[M:3/4][Q:1/4=90]'} where something changes."""
    fields, metre, tempo = {}, None, 1e-9
    for bar, qpm in enumerate(tempos.tolist()):
        if bar in metres and metres[bar] != metre:
            metre = metres[bar]
            fields[bar] = f"[M:{metre[0]}/{metre[1]}]"
        if abs(qpm / tempo - 1) > 0.03:  # smaller changes are below what listeners notice
            tempo = max(1, round(qpm))
            fields[bar] = fields.get(bar, "") + f"[Q:1/4={tempo}]"
    return fields


def choose_octaves(voice, pitch, n_voices):
    """Octave shift of each voice that needs the fewest commas and apostrophes."""
    height = np.arange(11)[:, None] - 5 - np.arange(-4, 5)  # (octave of the note, shift)
    cost = np.where(height <= 0, -height, height - 1)
    count = np.bincount(voice * 11 + pitch // 12, minlength=n_voices * 11).reshape(n_voices, 11)
    return (np.argmin(count @ cost * 10 + np.abs(np.arange(-4, 5)), axis=1) - 4).tolist()


def write_header(voices, octaves, unit, units, key, fields):
    """Everything above the first bar. What differs between voices stands below their V: fields."""
    lines = ["X:1", f"L:1/{unit}", *re.findall(r"\[(.*?)\]", fields), f"K:{key}"]
    for number, ((program, drum), octave) in enumerate(zip(voices, octaves, strict=True), 1):
        lines.append(f"V:{number}" + (f" octave={octave}" if octave else ""))
        if program:  # without it players take 0, the piano
            lines.append(f"%%MIDI program {program}")
        if drum:
            lines += ["%%MIDI channel 10", f"K:{KEYS[DRUM_KEY]}"]
        if units[number - 1] != unit:
            lines.append(f"L:1/{units[number - 1]}")
    return "\n".join(lines)


def score_to_abc(score, notes, voices, cfg):
    """Score and its notes -> dict(abc, n_bars, seconds). Raises Rejected."""
    if len(notes.pitch) < cfg.MIN_NOTES:
        raise Rejected("no_notes" if not len(notes.pitch) else "too_few_notes", f"{len(notes.pitch)}")
    length = float((notes.onset + notes.duration).max())
    if length > 20_000:
        raise Rejected("too_long", f"{length:.0f} beats")
    per_beat = np.bincount(notes.onset.astype(int))
    if np.mean(per_beat[per_beat > 0]) > 60:  # "black MIDI"
        raise Rejected("too_dense")
    notes = merge_duplicates(notes)
    if len(notes.pitch) > cfg.MAX_ABC_CHARS:  # a note takes more than a character
        raise Rejected("too_many_chars", f"{len(notes.pitch)} notes")
    bars, metres = bar_lines(score, int((length + 1) * BEAT))
    step, swing = choose_grid(notes.onset, notes.voice * 128 + notes.pitch)
    triplet = triplet_beats(notes, bars[-1] // BEAT + 2, step) if swing else None
    if swing:
        triplet[:, bars[bars % BEAT != 0] // BEAT] = False  # a bar line inside
    voice, pitch, start, end = grid_notes(notes, bars, step, triplet)
    tempos, seconds = bar_tempos(score, bars)
    drums = np.array([drum for _, drum in voices])
    sharps, key = choose_key(pitch[~drums[voice]])
    octaves = choose_octaves(voice, pitch, len(voices))
    fields = header_fields(metres, tempos)
    header = fields.pop(0)
    keys = np.where(drums, DRUM_KEY, sharps).tolist()
    unit, units, body = write_body((voice, pitch, start, end), bars, keys, octaves, triplet, fields)
    abc = write_header(voices, octaves, unit, units, key, header) + body
    if len(abc) > cfg.MAX_ABC_CHARS:
        raise Rejected("too_many_chars", f"{len(abc)}")
    return {"abc": abc, "n_bars": len(bars) - 1, "seconds": float(seconds)}


def midi_to_abc(source, cfg):
    """Bytes or path of a MIDI file -> ABC text, the same on every machine. Raises Rejected, nothing else."""
    score = read_score(source)
    notes, voices = score_notes(score)
    return score_to_abc(score, notes, voices, cfg)["abc"]


# --- reading ABC back

TOKEN = re.compile(r"(\[[^]]*\]?|[_^=]{0,2}[A-Ga-g][,']*|[zx])(\d*/*\d*)(-?)"  # chord or note, length, tie
                   r"|\((\d)(?::(\d*))?(?::(\d*))?|(\S)")  # (p:q:r, anything else
NOTE = re.compile(r"([_^=]{0,2})([A-Ga-g])([,']*)(\d*/*\d*)(-?)")
FIELD = re.compile(r"\[([A-Za-z]):([^]]*)\]")
# what other people's ABC has besides notes: chord names, decorations, grace notes, endings, repeats, comments
ORNAMENT = re.compile(r"\"[^\"]*\"|![^!]*!|\{[^}]*\}|\[\d|(?<=\|)\d|:+(?=\|)|(?<=\|):+|[~.`\\]|%.*")
MODES = {"m": -3, "min": -3, "aeo": -3, "dor": -2, "mix": -1, "lyd": 1, "phr": -4, "loc": -5}
TUPLETS = {2: 3, 4: 3, 8: 3, 3: 2, 6: 2}  # (p: p notes in the time of q


def whole(text, default=1, most=9999):
    """A number in the text, bounded: sampled texts hold absurd ones."""
    return min(int(text[:5]), most) if text and text.isdecimal() else default


@functools.lru_cache(maxsize=4096)
def length_value(text):
    """'3/2', '/', '//' ... -> multiple of the unit length."""
    num, slash, den = text.partition("/")
    if not slash:
        return float(whole(num))
    digits = den.lstrip("/")
    return whole(num) / (max(1, whole(digits)) if digits else 2 ** min(len(den) + 1, 8))


@functools.lru_cache(maxsize=8192)
def chord_value(text, sharps, octave):
    """'^c,' or '[CE-G]' -> (pitches, whether each is tied, length of the first note inside the brackets)."""
    pitches, ties, inner = [], [], 1.0
    for mark, letter, marks, length, tie in NOTE.findall(text):
        step = LETTERS.index(letter.upper())
        alter = mark.count("^") - mark.count("_") if mark else (sharps + 5 - (2 * step + 1) % 7 + 1) // 7
        height = 5 + octave + letter.islower() + marks.count("'") - marks.count(",")
        inner = inner if pitches else length_value(length)
        pitches.append(min(127, max(0, 12 * height + NATURAL[step] + alter)))
        ties.append(tie == "-")
    return pitches, ties, inner


def key_sharps(text):
    """'D', 'Bm', 'A dorian' ... -> sharps (flats negative), 0 for what is no key."""
    match = re.match(r"\s*([A-G])([#b]?)\s*([A-Za-z]{0,3})", text)
    if not match:
        return 0
    letter, accidental, mode = match.groups()
    sharps = "FCGDAEB".index(letter) - 1 + {"#": 7, "b": -7, "": 0}[accidental] + MODES.get(mode.lower(), 0)
    return min(7, max(-7, sharps))


def read_field(state, letter, value, report):
    """Apply one information field to the reader's state."""
    fraction = re.match(r"\s*(\d+)/(\d+)\s*(?:=\s*(\d+))?", value)
    num, den, per_minute = (whole(x, 0) for x in fraction.groups()) if fraction else (0, 0, 0)
    if letter == "L" and num and den:
        (current_voice(state) if state["key"] else state)["unit"] = 4 * num / den
    elif letter == "M":
        num, den = (num, den) if fraction else (2, 2) if "C|" in value else (4, 4)
        if 0 < num <= 64 and den in (1, 2, 4, 8, 16, 32, 64):
            state["metre"] = 4 * num / den
            state["metres"].append((state["clock"], num, den))
        else:
            report("bad_field")
    elif letter == "Q":
        qpm = 4 * num / den * per_minute if num and den and per_minute else whole(value.strip(), 120)
        state["tempos"].append((state["clock"], min(max(qpm, 4), 6000)))
    elif letter == "K":
        sharps = key_sharps(value)
        for voice in state["voices"].values() if not state["key"] else [current_voice(state)]:
            voice["sharps"] = sharps
        state["key"] = state["key"] or value.strip()
    elif letter == "V":
        state["now"] = (value.split() or ["1"])[0]
        octave = re.search(r"octave=(-?\d)", value)
        current_voice(state)["octave"] = int(octave[1]) if octave else current_voice(state)["octave"]


def current_voice(state):
    """The voice that the last V: field named; made when it is new."""
    voices = state["voices"]
    if state["now"] not in voices:
        voices[state["now"]] = {"index": len(voices), "program": 0, "drum": False, "octave": 0, "clock": 0.0,
                                "bars": 0, "sharps": key_sharps(state["key"]), "unit": state["unit"]}
    return voices[state["now"]]


def read_directive(state, line):
    """%%MIDI program n, %%MIDI channel 10."""
    words = line.split()
    if len(words) > 2 and words[1] == "program":
        current_voice(state)["program"] = whole(words[-1], 0, 127)
    elif words[1:3] == ["channel", "10"]:
        current_voice(state)["drum"] = True


@functools.lru_cache(maxsize=4096)  # music repeats itself: many bars of a song have been read before
def read_layer(music, unit, sharps, octave):
    """One layer of one bar -> ([(position, length, pitch, tied)], its length in beats, slugs of problems)."""
    notes, problems, position, left, factor = [], [], 0.0, 0, 1.0
    for text, length, tie, p, q, r, _ in TOKEN.findall(music):
        if text:
            beats = unit * length_value(length) if length else unit
            if left:
                left, beats = left - 1, beats * factor
            pitches, ties, inner = chord_value(text, sharps, octave)
            beats *= inner
            for pitch, tied in zip(pitches, ties, strict=True):
                notes.append((position, beats, pitch, tied or tie == "-"))
            position += beats
            if text[0] == "[" and text[-1] != "]":
                problems.append("open_bracket")
        elif p:
            factor, left = (whole(q, 0) or TUPLETS.get(int(p), 2)) / (int(p) or 1), whole(r, 0) or int(p)
        else:
            problems.append("bad_char")
    if left:
        problems.append("open_tuplet")
    return notes, position, problems


def read_bar(state, bar, start, report):
    """Add a bar of the current voice, from beat `start` on, to state["rows"]; returns its length in beats."""
    voice, longest = current_voice(state), 0.0
    full = state["metre"] if state["tagged"] else 1e9  # what hangs over the bar line is cut off there
    index, line = voice["index"], state["line"]
    for layer in bar.split("&"):
        notes, length, problems = read_layer(layer, voice["unit"], voice["sharps"], voice["octave"])
        state["rows"] += [(index, start + position, min(beats, full - position), pitch, tied, line)
                          for position, beats, pitch, tied in notes if position < full - 1e-6]
        longest = max(longest, length)
        for slug in [*problems, *["bar_length"] * (abs(length - state["metre"]) > 1e-6)]:
            report(slug)
    return longest


def read_music(state, music, report):
    """The bars of the current voice in one line; returns how many bars of the line they fill.

    With inline voices a line is one bar, or n bars of silence as Zn, and a bar line too early is ignored.
    In other tunes bars follow each other, whatever their length.
    """
    voice, full, tagged = current_voice(state), state["metre"], state["tagged"]
    bars = (music if tagged else ORNAMENT.sub("", music)).split("|")
    if not bars[-1].strip():
        bars.pop()
    elif tagged:
        report("no_bar_line")
    count, filled, missed = 0, 0.0, 0
    for i, bar in enumerate(bars):
        silent = re.fullmatch(r"\s*Z(\d*)\s*", bar)
        if silent and tagged and not i and len(bars) > 1:  # Zn before music: the bars this voice has missed
            missed = whole(silent[1])
        elif silent:
            count += whole(silent[1])
            voice["clock"] += full * whole(silent[1])
        else:
            length = read_bar(state, bar, state["clock"] + filled if tagged else voice["clock"], report)
            voice["clock"] += length
            filled = filled + length if filled + length < full - 1e-6 else 0.0
            count = 1 if tagged else count + 1
    if tagged and voice["bars"] + missed != state["bars"]:
        report("silent_bars")
    voice["bars"] = count + (max(state["bars"], voice["bars"]) if tagged else voice["bars"])
    return count


def merge_ties(rows, report):
    """Rows (voice, onset, duration, pitch, tied, line) -> Notes by voice, onset, pitch, ties merged."""
    table = np.array(rows, float).reshape(-1, 6)
    key = table[:, 0] * 128 + table[:, 3]
    table = table[np.lexsort((table[:, 1], key))]
    voice, onset, duration, pitch, tied, line = table.T
    end = onset + duration
    joined = (np.diff(voice * 128 + pitch) == 0) & (np.abs(onset[1:] - end[:-1]) < 1e-4) & (tied[:-1] > 0)
    first = np.flatnonzero(np.append(True, ~joined)[:len(onset)])
    for number in line[(tied > 0) & ~np.append(joined, False)[:len(onset)]].astype(int).tolist():
        report("open_tie", number)
    end = np.maximum.reduceat(end, first) if len(first) else end
    notes = Notes(voice[first].astype(int), onset[first], end - onset[first], pitch[first].astype(int))
    return Notes(*(a[np.lexsort((notes.pitch, notes.onset, notes.voice))] for a in notes))


def read_abc(text):
    """ABC text -> Tune. Never raises: what cannot be read is skipped and listed in `problems`."""
    problems, tagged = [], "[V:" in text
    state = {"unit": 0.5, "metre": 4.0, "clock": 0.0, "bars": 0, "key": "", "now": "1", "line": 0,
             "voices": {}, "rows": [], "tempos": [], "metres": [], "tagged": tagged}

    def report(slug, line=None):
        problems.append((state["line"] if line is None else line, slug))

    if tagged:  # a line broken inside a bar goes on
        text = re.sub(r"(\[V:[^\n]*[^|\s])\n(?!\[|[A-Za-z]:|%)", r"\1", text)
    for state["line"], line in enumerate(text.splitlines(), 1):
        if line.startswith("%%MIDI"):
            read_directive(state, line)
        elif line[1:2] == ":" and line[0].isalpha() and not (tagged and "|" in line):
            read_field(state, line[0], line[2:], report)
        elif line.strip() and line[0] != "%":
            read_line(state, line, report)
    if not state["key"]:
        report("no_header", 0)
    voices = [(v["program"], v["drum"]) for v in state["voices"].values()]
    notes = merge_ties(state["rows"], report)
    return Tune(notes, voices, state["key"], state["tempos"], state["metres"], state["bars"], problems)


def expected_bar(state, parts):
    """The bar that a line of inline voices is: the next one, unless all its voices have just played another.

    That puts right a line break that was lost or added. Voices that re-enter (Zn) or stand alone have no say.
    """
    names = [name for letter, name, music in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
             if letter == "V" and name in state["voices"] and music[:1] != "Z"]
    bars = {state["voices"][name]["bars"] for name in names}
    agreed = len(names) > 1 and len(bars) == 1 and abs(min(bars) - state["bars"]) == 1
    return min(bars) if agreed else state["bars"]


def read_line(state, line, report):
    """One line of music. In a tune with inline voices the clock then moves past its bar."""
    parts, counts = FIELD.split(line), [0]
    if state["tagged"]:
        bar = expected_bar(state, parts)
        state["clock"] += (bar - state["bars"]) * state["metre"]
        state["bars"] = bar
    for i in range(0, len(parts), 3):
        if parts[i].strip():
            counts.append(read_music(state, parts[i], report))
        if i + 1 < len(parts):
            read_field(state, parts[i + 1], parts[i + 2], report)
    if state["tagged"]:
        state["clock"] += max(counts) * state["metre"]
        state["bars"] += max(counts)
    else:
        voice = current_voice(state)
        state["clock"], state["bars"] = voice["clock"], max(state["bars"], voice["bars"])


def abc_to_midi(text):
    """ABC text -> bytes of a Standard MIDI File, one track per voice. Never raises on any string."""
    tune, score = read_abc(text), symusic.Score(480)
    notes = Notes(*(column[tune.notes.onset < 1e6] for column in tune.notes))  # MIDI counts ticks in 32 bits
    start = np.rint(notes.onset * 480).astype(np.int32)
    length = np.maximum(np.rint((notes.onset + notes.duration) * 480).astype(np.int32) - start, 1)
    velocity = np.full(len(start), 90, np.int8)
    for index, (program, drum) in enumerate(tune.voices):
        mine = notes.voice == index
        if mine.any():
            track = symusic.Track(program=program, is_drum=drum, name="")
            columns = start, length, notes.pitch.astype(np.int8), velocity
            track.notes = symusic.Note.from_numpy(*(column[mine] for column in columns))
            score.tracks.append(track)
    for beat, qpm in tune.tempos or [(0, 120)]:
        score.tempos.append(symusic.Tempo(round(min(beat, 1e6) * 480), qpm=float(qpm)))
    for beat, num, den in tune.metres or [(0, 4, 4)]:
        score.time_signatures.append(symusic.TimeSignature(round(min(beat, 1e6) * 480), num, den))
    return score.dumps_midi()


# --- strict export

def strict_ticks(beats):
    """Beats -> ticks on the 1/16 or the 1/6 grid, whichever is nearer; a sampled text may have others."""
    fine, third = np.rint(beats * 16).astype(int) * 3, np.rint(beats * 6).astype(int) * 8
    return np.where(np.abs(fine / BEAT - beats) <= np.abs(third / BEAT - beats) + 1e-6, fine, third)


def strict_bars(tune):
    """Bar starts in ticks that cover the tune, and {bar: '[M:3/4]'}."""
    notes = tune.notes
    end = float((notes.onset + notes.duration).max()) if len(notes.onset) else 0.0
    metres = [(round(beat * 8) * 6, num, den) for beat, num, den in tune.metres if beat < end]
    bars, fields, stop = [], {}, int(end * BEAT) + 1
    for (start, num, den), (until, *_) in itertools.pairwise([*(metres or [(0, 4, 4)]), (stop,)]):
        if until > start:
            length = max(3, 4 * BEAT * num // den)
            fields[len(bars)] = f"[M:{num}/{den}]"
            bars += range(start, until, length)
    return [*bars, bars[-1] + length], fields


def strict_layers(start, end, pitch, bars, effort):
    """Notes of one voice, in ticks -> layers [[(start, end, pitches)]] without overlaps.

    Readers differ on tied chords: one across a bar line becomes single notes with effort 2, ends there with
    effort 1; effort 0 makes one layer of everything, each chord lasting to the next at most.
    """
    chords = {}
    for s, e, p in zip(start, end, pitch, strict=True):
        chords.setdefault((s, e if effort else 0), []).append((e, p))
    starts = [*sorted({s for s, _ in chords}), bars[-1]]
    events = []
    for (s, _), notes in chords.items():
        e = max(e for e, _ in notes) if effort else min(starts[bisect(starts, s)], max(e for e, _ in notes))
        pitches = sorted({p for _, p in notes})
        crosses = e > bars[bisect(bars, s)]
        events += [(s, e, [p]) for p in pitches] if crosses and effort == 2 else [(s, e, pitches)]
    layers = []
    for event in sorted(events):
        for layer in layers:
            if layer[-1][1] <= event[0]:
                layer.append(event)
                break
        else:
            layers.append([event])
    return layers


def strict_items(events, bars):
    """One layer -> (items (start, end, pitches, tied) that fill it; which beats are triplets)."""
    thirds = {t // BEAT for event in events for t in event[:2] if t % 3}
    thirds -= {t // BEAT for t in bars if t % BEAT}
    cuts = sorted({*bars, *(t * BEAT for t in thirds), *((t + 1) * BEAT for t in thirds)})
    filled, now = [], 0
    for s, e, pitches in [*events, (bars[-1], bars[-1], [])]:
        s, e = (round(t / n) * n for t in (s, e) for n in [8 if t // BEAT in thirds else 3])
        filled += [(now, s, [])] * (s > now) + [(s, e, pitches)] * (e > s)
        now = max(now, e)
    items = []
    for s, e, pitches in filled:
        edges = [s, *cuts[bisect(cuts, s):bisect_left(cuts, e)], e]
        # 5/6 of a beat cannot be written as one note of a triplet
        fives = [a + 32 for a, b in itertools.pairwise(edges) if b - a == 40 and a // BEAT in thirds]
        for a, b in itertools.pairwise(sorted(edges + fives)):
            sounding = pitches if a == s or len(pitches) == 1 else []  # a chord ends instead of being tied
            items.append((a, b, sounding, len(sounding) == 1 and b < e))
    return items, thirds


def strict_name(pitches):
    """Pitches -> 'z', '^c,' or '[=C=E]': an accidental on every note, so that key and memory play no part."""
    names = [spelling(5, 0)[0][128 + p] for p in pitches]
    return "[" + "".join(names) + "]" if len(names) > 1 else names[0] if names else "z"


def strict_voice(events, bars, fields):
    """One layer -> its bars as text, ten to a line."""
    items, thirds = strict_items(events, bars)
    texts, bar, beat = [], -1, -1
    for i, (s, e, pitches, tied) in enumerate(items):
        if s >= bars[bar + 1]:
            bar += 1
            texts.append(("|" if bar else "") + ("" if bar % 10 else "\n") + fields.get(bar, ""))
        length = e - s
        if s // BEAT in thirds:
            length = length * 3 // 2
            if s // BEAT != beat:
                beat = s // BEAT
                texts.append(f"(3:2:{sum(item[0] // BEAT == beat for item in items[i:i + 7])}")
        texts.append(strict_name(pitches) + length_text(length, BEAT // 2) + "-" * tied)
    return "".join(texts) + "|"


def strict_blocks(tune, bars):
    """Voices cut into at most 30 layers (abc2midi breaks on more) -> [((program, is_drum), its events)]."""
    voice, start = tune.notes.voice, strict_ticks(tune.notes.onset)
    end = np.maximum(strict_ticks(tune.notes.onset + tune.notes.duration), start + np.where(start % 3, 8, 3))
    for effort in (2, 1, 0):
        blocks = []
        for index, sound in enumerate(tune.voices):
            mine = voice == index
            columns = (column[mine].tolist() for column in (start, end, tune.notes.pitch))
            blocks += [(sound, layer) for layer in strict_layers(*columns, bars, effort)]
        if len(blocks) <= 30:
            return blocks
    sounds = sorted(set(tune.voices), key=lambda sound: (not sound[1], sound))[:30]
    voice = np.array([sounds.index(sound) if sound in sounds else 29 for sound in tune.voices])[voice]
    return strict_blocks(tune._replace(notes=tune.notes._replace(voice=voice), voices=sounds), bars)


def strict_abc(text):
    """Any ABC text -> an export that abc2midi and music21 read alike: V: blocks, all accidentals written.

    abc2midi knows only lengths over powers of two; music21 no inline voices, &, Z, octave=, ties of chords.
    What exceeds 30 voices loses length, not notes: chords end at bar lines, then at the next onset; then
    voices of one sound are joined.
    """
    tune = read_abc(text)
    bars, metres = strict_bars(tune)
    first = dict(metres)
    for beat, qpm in tune.tempos:
        bar = min(max(0, bisect(bars, round(beat * BEAT)) - 1), len(bars) - 2)
        first[bar] = metres.get(bar, "") + f"[Q:1/4={max(1, round(qpm))}]"
    head = re.findall(r"\[(.*?)\]", first[0])
    lines = ["X:1", "L:1/8", *head, "%%MIDI chordattack 0", "K:C"]
    channels = {}
    blocks = strict_blocks(tune, bars) if len(tune.notes.pitch) else [((0, False), [])]
    for number, ((program, drum), events) in enumerate(blocks, 1):
        free = min(len(channels) + 1, 15)  # the tenth is for drums
        channel = 10 if drum else channels.setdefault(program, free + (free > 9))
        lines += [f"V:{number}", f"%%MIDI channel {channel}", f"%%MIDI program {program}", "K:C"]
        lines[-1] += strict_voice(events, bars, first if number == 1 else metres)
    return "\n".join(lines) + "\n"


def abc2midi_notes(text, timeout=30):
    """(Notes, [(program, is_drum)]) that abc2midi, an independent reader, finds in a text's strict export.

    The binary inside symusic may lack its run bit: a private copy is run. Raises SubprocessError, OSError.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = shutil.copy(next(Path(symusic.__file__).parent.glob("bin/abc2midi*")), folder)
        os.chmod(binary, 0o700)
        Path(folder, "tune.abc").write_text(strict_abc(text))
        subprocess.run([binary, "tune.abc", "-o", "tune.mid", "-silent"], cwd=folder, timeout=timeout,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return score_notes(read_score(Path(folder, "tune.mid")))


# --- scoring

def note_f1(reference, candidate, onset_tolerance=1 / 8, durations=False):
    """F1 of notes matched by pitch and onset (and length within 20 % or 1/8 beat), duplicates merged."""
    a, b = (sorted_notes(notes) for notes in (reference, candidate))
    if len(a) == len(b) and not durations and np.all(np.abs(a - b)[:, :2] <= [0, onset_tolerance + 1e-6]):
        return 1.0
    rows, others = a.tolist(), b.tolist()
    i = j = hits = 0
    while i < len(rows) and j < len(others):
        (pitch, onset, duration), (other_pitch, other_onset, other_duration) = rows[i], others[j]
        if pitch == other_pitch and abs(onset - other_onset) <= onset_tolerance + 1e-6:
            hits += not durations or abs(duration - other_duration) <= max(1 / 8, duration / 5) + 1e-6
            i, j = i + 1, j + 1
        elif (pitch, onset) < (other_pitch, other_onset):
            i += 1
        else:
            j += 1
    return 2 * hits / (len(a) + len(b)) if len(a) + len(b) else 1.0


def sorted_notes(notes):
    """Array (N, 3) of pitch, onset, duration, sorted in this order, duplicates merged."""
    notes = merge_duplicates(notes)
    order = np.lexsort((notes.duration, notes.onset, notes.pitch))
    return np.stack([notes.pitch, notes.onset, notes.duration], axis=1)[order]


def convert_one(data, cfg):
    """MIDI file (bytes or path) -> dict of its text, its round-trip score and its sizes. Raises Rejected."""
    score = read_score(data)
    notes, voices = score_notes(score)
    row = score_to_abc(score, notes, voices, cfg)
    f1 = note_f1(notes, read_abc(row["abc"]).notes)
    drums = np.array([drum for _, drum in voices])[notes.voice]
    return row | {"n_notes": len(notes.pitch), "n_chars": len(row["abc"]), "f1": f1, "n_tracks": len(voices),
                  "hash": content_hash(notes, drums), "signature": fingerprint(notes, drums).astype("<u4").tobytes().hex()}


# --- what tells one work from another

SHINGLE = 12  # melodic intervals per shingle
MIN_PITCHES = 5  # different pitches in a shingle; fewer is an accompaniment figure
NUM_PERM = 256  # MinHash values per file
MIN_JACCARD = 1 / 16  # estimated share of common shingles that makes two files one work ...
MIN_COMMON = 10  # ... and their estimated number: some 22 successive notes


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


def melodic_shingles(notes, drums):
    """(S,) uint32: hashes of the different runs of SHINGLE intervals between the top notes of each track.

    Intervals forget the key, and rhythm is left out: a work transposed, re-orchestrated, written in halved
    values or played by hand keeps its shingles. Drums have none.
    """
    pitched = ~drums
    tick = np.rint(480 * notes.onset[pitched]).astype(np.int64)
    # One sort of packed integers orders by track, onset and pitch, and is much faster than np.lexsort.
    packed = np.sort(notes.voice[pitched].astype(np.int64) << 40 | tick << 8 | notes.pitch[pitched])
    track, tick, pitch = packed >> 40, packed >> 8 & 0xFFFFFFFF, packed & 0xFF
    # A note within 1/16 beat of the one before belongs to its chord, so that strummed chords stay whole.
    chord = np.flatnonzero(np.diff(track, prepend=-1).astype(bool) | (np.diff(tick, prepend=-99) > 30))
    count = len(chord) - SHINGLE
    if count <= 0:
        return np.zeros(0, np.uint32)
    track, top = track[chord], np.maximum.reduceat(pitch, chord).astype(np.uint64)
    code, seen = np.zeros(count, np.uint64), np.uint64(1) << (top[SHINGLE:] & np.uint64(63))
    for k in range(SHINGLE):
        here = top[k : k + count]
        code = code * np.uint64(0x9E3779B97F4A7C15) + (top[k + 1 : k + 1 + count] - here)  # modulo 2^64
        seen |= np.uint64(1) << (here & np.uint64(63))
    keep = (track[:count] == track[SHINGLE:]) & (np.bitwise_count(seen) >= MIN_PITCHES)
    return np.unique((code[keep] >> np.uint64(32)).astype(np.uint32))


def fingerprint(notes, drums):
    """(NUM_PERM,) uint32 MinHash of the melodic shingles (Broder 1997), all 2^32 - 1 where there are none."""
    sketch = MinHash(num_perm=NUM_PERM, hashfunc=int)
    shingles = melodic_shingles(notes, drums)
    for start in range(0, len(shingles), 4096):  # bounds the (shingles, NUM_PERM) table of a huge file
        sketch.update_batch(shingles[start : start + 4096].tolist())
    return sketch.hashvalues


def convert_file(source, target, cfg):
    """In a worker: converts one MIDI file to `target`; returns its row of report.jsonl, a reject with its reason."""
    try:
        row = convert_one(Path(source).read_bytes(), cfg)
    except Rejected as reject:
        return {"reason": reject.reason}
    except MemoryError:
        return {"reason": "out_of_memory"}
    except OSError as error:
        return {"reason": f"unreadable_{type(error).__name__}"}
    write_text(target, row.pop("abc"))
    return {"abc": os.path.relpath(target, cfg.abc_root), **row}


def limit_worker():
    """A file that swells hits its worker's memory limit, not the machine's. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, OSError, ValueError):  # Linux only
        import resource
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, mapped + 2**30))


def convert_all(files, cfg):
    """Yields (file, row) for files relative to midi_root. A worker that crashes or hangs costs one file.

    Slices keep few files in flight, so that memory does not grow with their number.
    """
    with ProcessPool(max_workers=cfg.workers, initializer=limit_worker) as pool:
        try:
            for i in range(0, len(files), 512):
                slice_ = files[i:i + 512]
                rows = pool.map(convert_file, [cfg.midi_root / file for file in slice_],
                                [cfg.abc_root / f"{file}.abc" for file in slice_], [cfg] * len(slice_),
                                timeout=cfg.CONVERT_TIMEOUT).result()
                for file in slice_:
                    try:
                        yield file, next(rows)
                    except TimeoutError:
                        yield file, {"reason": "timeout"}
                    except ProcessExpired:
                        yield file, {"reason": "crashed"}
        except BaseException:
            pool.stop()
            raise


def read_journal(path, recipe):
    """The rows that an interrupted conversion of the same recipe left, {file: row}."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as lines:
        rows = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the line that was being written
                rows.append(json.loads(line))
        if rows and rows[0] == recipe:
            return {row["file"]: row for row in rows[1:]}
    return {}


@stage(version=1, knobs="CONVERT_TIMEOUT MAX_ABC_CHARS MIN_NOTES", after=extract)
def convert(cfg):
    """Converts every MIDI file in a worker process that may die; every file ends as text or as a counted reason."""
    files = read_json(Path(cfg.DATA_ROOT, "midi_index.json"))["files"]
    report, journal = cfg.abc_root / "report.jsonl", cfg.abc_root / "journal.jsonl"
    recipe = convert.recipe(cfg)
    rows = read_journal(journal, recipe)
    if not rows and report.exists():  # texts of an earlier recipe
        for row in read_jsonl(report):
            if "abc" in row:
                Path(cfg.abc_root, row["abc"]).unlink(missing_ok=True)
        report.unlink()
    write_text(journal, "".join(json.dumps(row) + "\n" for row in [recipe, *rows.values()]))
    todo = [file for file in files if file not in rows]
    with open(journal, "a", encoding="utf-8") as out, \
            progress(total=len(files), initial=len(rows), desc="convert", unit="file") as bar:
        for file, row in convert_all(todo, cfg):
            rows[file] = {"file": file, **row}
            out.write(json.dumps(rows[file]) + "\n")
            bar.update()
    accepted = [rows[file] for file in files if "abc" in rows[file]]
    packed = bytes.fromhex("".join(row.pop("signature") for row in accepted))
    signatures = np.frombuffer(packed, "<u4").reshape(len(accepted), -1)
    with atomic_path(cfg.abc_root / "signatures.npy") as partial, open(partial, "wb") as out:
        np.save(out, signatures)
    write_jsonl(report, [rows[file] for file in files])
    journal.unlink()
    reasons = Counter(row["reason"] for row in rows.values() if "reason" in row)
    need(len(files) == len(accepted) + reasons.total(), "the books of the conversion do not balance")
    say(f"convert   {len(accepted):,} of {len(files):,} files became ABC; rejected: {dict(reasons.most_common()) or 'none'}")
    return [report, cfg.abc_root]


# ============================================================================================================
# 5 Tokenize: abc/report.jsonl, abc/ -> tokens/train.bin val.bin test.bin vocab.json tunes.jsonl stats.json
# ============================================================================================================

START, END, UNKNOWN = 0, 1, 2  # ids of the symbols that are not characters


class Vocab(NamedTuple):
    """The symbols in the order of their ids: three special ones, then the characters of the training tunes, sorted."""
    chars: tuple

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
        """The text of ids; start and end have none, an unknown character shows as the replacement character."""
        return "".join(self.chars[i] if i > UNKNOWN else "\ufffd" if i == UNKNOWN else "" for i in ids)


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)


def read_jsonl(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def build_vocab(tunes, cfg):
    """The vocabulary of the tunes given; reads each once."""
    counts = np.zeros(0, np.int64)
    for tune in progress(tunes, "vocabulary", unit="tune"):
        found = np.bincount(code_points(read_abc_file(tune, cfg)))
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[:len(found)] += found
    return Vocab(("<start>", "<end>", "<unknown>", *map(chr, np.flatnonzero(counts))))


def read_abc_file(tune, cfg):
    return Path(cfg.abc_root, tune["abc"]).read_text(encoding="utf-8")


def write_tokens(split, tunes, vocab, cfg):
    """Writes <split>.bin, each tune as start, characters, end; returns the tunes with their place in it."""
    table, start, placed = vocab.table(), 0, []
    with atomic_path(cfg.tokens_root / f"{split}.bin") as partial, open(partial, "wb") as out:
        for tune in progress(tunes, split, unit="tune"):
            ids = table[code_points(read_abc_file(tune, cfg))]
            out.write(np.concatenate([[START], ids, [END]]).astype(vocab.dtype).tobytes())
            placed.append({"file": tune["file"], "split": split, "group": tune["group"], "start": start,
                           "chars": len(ids), "unknown": int((ids == UNKNOWN).sum()),
                           "notes": tune["n_notes"], "seconds": tune["seconds"]})
            start += len(ids) + 2
    return placed


def held_out_fractions(total_chars, cfg):
    """(validation, test) shares: 1 % each of a large corpus, up to 10 % of a small one to reach 200,000 characters."""
    enough = float(np.clip(200_000 / max(1, total_chars), 0.01, 0.1))
    val = cfg.VAL_FRAC or enough
    return val, cfg.TEST_FRAC or val


def similar_pairs(signatures):
    """(P, 2) rows i < j of (N, NUM_PERM) signatures that pass MIN_JACCARD and MIN_COMMON by estimate.

    Candidates are neighbours in the sorted order of any one column. Bands of two or more columns, as in
    MinHashLSH, miss re-arranged works, whose Jaccard similarity is about .08; and all pairs of one value
    would be billions for a common shingle, where neighbours are at most NUM_PERM * N.
    """
    n, codes = len(signatures), []
    for column in signatures.T:
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order][1:] == column[order][:-1])
        codes.append(order[same] * n + order[same + 1])
    pairs = np.stack(np.divmod(np.unique(np.concatenate(codes)), max(n, 1)), axis=1)
    size = 2.0**32 / signatures.mean(axis=1, dtype=np.float64) - 1  # of the set, from its mean minimum
    kept = []
    for chunk in np.array_split(pairs, len(pairs) // 2**15 + 1):  # bounds memory
        jaccard = (signatures[chunk[:, 0]] == signatures[chunk[:, 1]]).mean(axis=1)
        common = jaccard / (1 + jaccard) * size[chunk].sum(axis=1)
        kept.append(chunk[(jaccard >= MIN_JACCARD) & (common >= MIN_COMMON)])
    return np.concatenate(kept)


def group_works(signatures, hashes):
    """(N,) group ids for N files: the smallest content hash in each file's group, in any order of files.

    Files with equal hashes or similar signatures, and what a chain of such files connects, are one group.
    Files with little melody (drums, a few notes) are grouped by their hash alone.
    """
    unique, which, count = np.unique(np.asarray(hashes), return_inverse=True, return_counts=True)
    by_hash = signatures[np.argsort(which, kind="stable")]
    # Equal notes on other tracks differ in signature; the MinHash of a union is the minimum of the MinHashes.
    i, j = similar_pairs(np.minimum.reduceat(by_hash, np.cumsum(count) - count)).T
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(unique), len(unique)))
    _, component = connected_components(graph, directed=False)
    smallest = np.unique(component, return_index=True)[1]  # first in a component, because hashes are sorted
    return unique[smallest[component]][which]


def split_groups(group_ids, sizes_in_chars, val_frac, test_frac, seed):
    """(N,) 'train', 'val' or 'test' for N files: a group never crosses, fractions are of characters.

    Groups are drawn in the order of a hash of seed and id, so new files move few of the old ones. A group
    larger than a held-out share comes last: it goes to training unless nothing else is left to hold out.
    No side is empty with 3 groups or more.
    """
    ids, which = np.unique(np.asarray(group_ids), return_inverse=True)
    chars = np.bincount(which, weights=sizes_in_chars)
    digests = (hashlib.blake2b(f"{seed}:{g}".encode(), digest_size=6).digest() for g in ids)
    draw = np.array([int.from_bytes(d, "big") / 2.0**48 for d in digests])
    budgets = {"test": test_frac * chars.sum(), "val": val_frac * chars.sum()}
    large = chars > min((b for b in budgets.values() if b > 0), default=0)
    order = np.argsort(np.where(large, 1 + chars, draw), kind="stable")
    side = np.full(len(ids), "train")
    for name, budget in budgets.items():
        if budget > 0 and len(order) > 1:
            fit = np.searchsorted(np.cumsum(chars[order]), budget, side="right")
            taken = max(1, min(fit, len(ids) // 3))  # leaves a group for the other sides
            side[order[:taken]], order = name, order[taken:]
    return side[which]


def leak_of_file_split(group_ids, sizes_in_chars, val_frac, test_frac):
    """Expected share of held-out files, and of their characters, that a split file by file would leak.

    A file in a group of g has one of the other g - 1 in training with probability 1 - p^(g - 1), where p is
    the share held out. Pass content hashes as ids for the leak by exact duplicates alone.
    """
    _, which, members = np.unique(np.asarray(group_ids), return_inverse=True, return_counts=True)
    leak = 1 - (val_frac + test_frac) ** (members[which] - 1.0)
    return {
        "files": len(which),
        "groups": len(members),
        "largest_group": int(members.max()),
        "leaked_files": float(leak.mean()),
        "leaked_chars": float(np.average(leak, weights=sizes_in_chars)),
    }


@stage(version=1, knobs="VAL_FRAC TEST_FRAC SEED", after=convert)
def tokenize(cfg):
    """Splits the tunes by work, so that no version of a held-out tune is trained on, and writes them as token ids."""
    report = read_jsonl(cfg.abc_root / "report.jsonl")
    tunes = [row for row in report if "abc" in row]
    need(len(tunes) >= 3, f"only {len(tunes)} tunes were converted, and a study needs at least three; see "
                          f"{cfg.abc_root / 'report.jsonl'} for the reasons")
    chars = np.array([tune["n_chars"] for tune in tunes])
    hashes = [tune["hash"] for tune in tunes]
    groups = group_works(np.load(cfg.abc_root / "signatures.npy"), hashes)
    fractions = held_out_fractions(chars.sum(), cfg)
    splits = split_groups(groups, chars, *fractions, cfg.SEED)
    members = {"train": [], "val": [], "test": []}
    for tune, group, split in sorted(zip(tunes, groups, splits, strict=True), key=lambda x: shuffle_key(x[0], cfg)):
        members[split].append({**tune, "group": str(group)})
    need(all(members.values()), "too few different works to hold any out; add MIDI files or raise VAL_FRAC")
    vocab = build_vocab(members["train"], cfg)
    placed = {split: write_tokens(split, members[split], vocab, cfg) for split in members}
    write_jsonl(cfg.tokens_root / "tunes.jsonl", [tune for split in placed.values() for tune in split])
    write_json(cfg.tokens_root / "vocab.json", {"chars": vocab.chars})
    stats = corpus_statistics(report, placed, vocab, chars, groups, fractions, cfg)
    write_json(cfg.tokens_root / "stats.json", stats)
    plot_lengths(chars, cfg.tokens_root / "length_distribution.png")
    summary = stats["splits"]
    say(f"tokenize  {len(vocab.chars)} symbols; " + ", ".join(
        f"{split} {row['tunes']:,} tunes {row['chars']:,} characters" for split, row in summary.items()))
    names = ("train.bin", "val.bin", "test.bin", "vocab.json", "tunes.jsonl", "stats.json", "length_distribution.png")
    return [cfg.tokens_root / name for name in names]


def shuffle_key(tune, cfg):
    """A fixed shuffle: by a hash of the seed and the notes, whatever the order of files on the disk."""
    return digest([cfg.SEED, tune["hash"], tune["file"]])


def corpus_statistics(report, placed, vocab, chars, groups, fractions, cfg):
    """What the report tells of the data: counts that balance, lengths, duplicates, the leak that the split avoids."""
    reasons = Counter(row["reason"] for row in report if "reason" in row)
    need(len(report) == len(chars) + sum(reasons.values()), "the books of the conversion do not balance: re-run convert")
    splits = {split: {"tunes": len(rows), "groups": len({row["group"] for row in rows}),
                      **{key: sum(row[key] for row in rows) for key in ("chars", "notes", "seconds", "unknown")}}
              for split, rows in placed.items()}
    _, sizes = np.unique(groups, return_counts=True)
    return {"files": len(report), "converted": len(chars), "rejected": dict(reasons.most_common()),
            "converted_share": len(chars) / len(report), "vocabulary": vocab.chars, "vocabulary_size": len(vocab.chars),
            "splits": splits, "fractions": fractions,
            "round_trip_f1": {"mean": float(np.mean([row["f1"] for row in report if "abc" in row])),
                              "share_above_0.99": float(np.mean([row["f1"] > 0.99 for row in report if "abc" in row]))},
            "chars_per_note": chars.sum() / sum(row["n_notes"] for row in report if "abc" in row),
            "length_quantiles": dict(zip(("min", "5%", "25%", "50%", "75%", "95%", "99%", "max"), np.quantile(
                chars, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)).tolist(), strict=True)),
            "longest_1%_hold": float(np.sort(chars)[-max(1, len(chars) // 100):].sum() / chars.sum()),
            "works": {"groups": len(sizes), "largest": int(sizes.max()), "in_groups_of_several": int(sizes[sizes > 1].sum()),
                      "leak_of_split_by_file": leak_of_file_split(groups, chars, *fractions)}}


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
# state = model.empty_state(B, T) is sampling: tokens may come a few at a time and the state remembers all before them.


def rms_norm(x):
    """Root-mean-square norm without weights (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of x (B, heads, T, head width)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and squared-ReLU MLP (So et al. 2021, https://arxiv.org/abs/2109.08668)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qkv.weight.stacked = 3  # three matrices in one, told to the optimiser
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for output in (self.proj, self.down):  # a new block is the identity: depth costs nothing at the start
            nn.init.zeros_(output.weight)

    def forward(self, x, cos, sin, past=None, length=0):  # x (B, T, C)
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(rms_norm(x)).chunk(3, dim=-1))
        # normalised queries and keys keep the logits in range at high learning rates (https://arxiv.org/abs/2302.05442)
        q, k = rotary(rms_norm(q), cos, sin), rotary(rms_norm(k), cos, sin)
        if past is not None:
            past[0, :, :, length:length + T], past[1, :, :, length:length + T] = k, v
            k, v = past[:, :, :, :length + T]
        mask = None if length == 0 or T == 1 else torch.ones(T, length + T, dtype=torch.bool, device=x.device).tril(length)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=length == 0 and T > 1)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(rms_norm(x))).square())


class GPT(nn.Module):
    def __init__(self, size, vocab_size, seq_len):
        super().__init__()
        self.size, self.seq_len = size, seq_len
        self.embed = nn.Embedding(vocab_size, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        half = size.width // size.heads // 2
        angles = torch.outer(torch.arange(seq_len), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def empty_state(self, batch, length):
        """Room for the keys and values of `length` characters: [filled, (layers, 2, B, heads, length, head width)]."""
        s = self.size
        return [0, self.head.weight.new_zeros(s.layers, 2, batch, s.heads, length, s.width // s.heads)]

    def forward(self, tokens, state=None):  # (B, T) -> (B, T, V)
        start, past = state or (0, [None] * len(self.blocks))
        span = slice(start, start + tokens.size(1))
        x = rms_norm(self.embed(tokens))
        for block, kv in zip(self.blocks, past, strict=True):
            x = block(x, self.cos[span].to(x.dtype), self.sin[span].to(x.dtype), kv, start)
        return self.head(rms_norm(x)), state and [span.stop, past]

    def matmul_params(self):
        """Weights that every character is multiplied with: all but the embedding."""
        return 12 * self.size.layers * self.size.width**2 + self.head.weight.numel()

    def flops_per_token(self):
        """Forward and backward: 6 per weight, and the attention over half of the window (PaLM, appendix B)."""
        return 6 * self.matmul_params() + 6 * self.size.layers * self.seq_len * self.size.width


class LSTM(nn.Module):
    def __init__(self, size, vocab_size, seq_len):
        super().__init__()
        self.size, self.seq_len = size, seq_len
        self.embed = nn.Embedding(vocab_size, size.width)
        self.lstm = nn.LSTM(size.width, size.width, size.layers, batch_first=True)
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        for name, weight in self.lstm.named_parameters():
            if weight.dim() == 2:
                weight.stacked = 4  # the gates i, f, g, o of one layer in one matrix, told to the optimiser
            elif name.startswith("bias_ih"):  # remember by default (Jozefowicz et al. 2015)
                nn.init.zeros_(weight)
                nn.init.ones_(weight.data[size.width:2 * size.width])
            else:
                nn.init.zeros_(weight)

    def empty_state(self, batch, length):
        zeros = self.head.weight.new_zeros(self.size.layers, batch, self.size.width)
        return zeros, zeros

    def forward(self, tokens, state=None):  # (B, T) -> (B, T, V)
        x, after = self.lstm(rms_norm(self.embed(tokens)), state)
        return self.head(rms_norm(x)), state and after

    def matmul_params(self):
        """Weights that every character is multiplied with: all but embedding and biases."""
        return 8 * self.size.layers * self.size.width**2 + self.head.weight.numel()

    def flops_per_token(self):
        return 6 * self.matmul_params()


def build_model(size, vocab_size, cfg):
    """A new model for `size` (a Size, or the name of one in cfg.ladder), initialised from torch's global generator."""
    if isinstance(size, str):
        size = next((row for row in cfg.ladder if row.name == size), None) or need(False, f"no model {size} in the ladder")
    return {"gpt": GPT, "lstm": LSTM}[size.family](size, vocab_size, cfg.seq_len)


def count_params(model):
    """Parameters three ways: all, without the embedding (the N of the fits: head included), without embedding and head."""
    total = sum(p.numel() for p in model.parameters())
    n_fit = total - model.embed.weight.numel()
    return {"n_params": total, "n_fit": n_fit, "n_non_embedding": n_fit - model.head.weight.numel()}


# ============================================================================================================
# 7 Train: tokens/ -> gpt_*.pt, lstm_*.pt, scaling_results.json, training_curves.json
# ============================================================================================================


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    torch.optim.Muon works in bfloat16, one matrix at a time: on a CPU without bfloat16 that is 35 times slower than this,
    which takes all matrices of one shape together, in float32 where bfloat16 is not native.
    A parameter with an attribute `stacked` = n is n matrices stacked along its rows, each orthogonalised on its own.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                parts = update.view(getattr(p, "stacked", 1), -1, p.size(1))
                by_shape.setdefault(parts.shape[1:], []).append((p, parts))
            for (rows, columns), members in by_shape.items():
                updates = orthogonalise(torch.cat([parts for _, parts in members]))
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for (p, _), update in zip(members, updates.split([len(parts) for _, parts in members]), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(p.shape).to(p.dtype), alpha=-scale)


def orthogonalise(matrices):
    """The nearest semi-orthogonal matrices, roughly: five Newton-Schulz steps. (n, rows, columns) -> the same."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if x.size(1) > x.size(2) else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.size(1) > matrices.size(2) else x


def make_optimizers(model, cfg):
    """Muon for the matrices inside the network, AdamW for embedding, head and biases."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith(("embed", "head"))]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [Muon(matrices, lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY),
            torch.optim.AdamW(others, lr=cfg.LR_ADAM, betas=tuple(cfg.BETAS), weight_decay=0.0)]


@functools.lru_cache(maxsize=2)
def epoch_order(n_windows, seed, epoch):
    """The order of the windows in one pass over the data, and the shift of their grid as a share of a window."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n_windows), rng.random()


def batch_starts(n_tokens, seq_len, batch, step, seed):
    """First characters of the windows of one step (counted from 0): a function of (seed, step) and nothing else.

    Every pass over the data visits each window once, on a grid shifted anew.
    """
    n_windows = (n_tokens - seq_len) // seq_len
    epoch, place = np.divmod(np.arange(step * batch, (step + 1) * batch), n_windows)
    starts = np.empty(batch, np.int64)
    for e in np.unique(epoch):
        order, shift = epoch_order(n_windows, seed, int(e))
        starts[epoch == e] = order[place[epoch == e]] * seq_len + int(shift * seq_len)
    return starts


def windows(tokens, starts, length):
    """(len(starts), length) int64 from a memory map."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


def autocast(cfg):
    """bfloat16 where the GPU has it (is_bf16_supported() is also true of emulation), else float16; float32 on a CPU."""
    if cfg.device == "cpu":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=amp_dtype(cfg))


def amp_dtype(cfg):
    if cfg.device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


@torch.no_grad()
def token_losses(model, tokens, cfg):
    """The loss in nats of every character but the first: (n,) -> (n - 1,) float32, in order.

    Windows of seq_len characters side by side, each predicted from its own beginning on: the result does not depend on
    the batch size, and GPT and LSTM see the same context.
    """
    T, n = model.seq_len, len(tokens) - 1
    device = next(model.parameters()).device
    padded = np.concatenate([tokens, np.zeros(-n % T, tokens.dtype)])
    losses, batch = [], max(1, (cfg.MICRO_TOKENS or cfg.batch_tokens) // T)
    model.eval()
    for i in range(0, n, batch * T):
        chunk = windows(padded, np.arange(i, min(i + batch * T, n), T), T + 1).to(device)
        with autocast(cfg):
            logits = model(chunk[:, :-1])[0]
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), chunk[:, 1:].flatten(), reduction="none").cpu())
    model.train()
    return torch.cat(losses).numpy()[:n]


def mean_loss(losses, tokens):
    """(mean loss per character, its standard error over tunes, which are the independent pieces of evidence)."""
    tune = np.cumsum(tokens[:-1] == END)  # the losses are those of tokens[1:]: the end token still belongs to its tune
    total, count = np.bincount(tune, losses), np.bincount(tune)
    mean = float(losses.mean(dtype=np.float64))
    spread = ((total - mean * count) ** 2).sum() * len(count) / max(1, len(count) - 1)
    return mean, float(spread**0.5 / count.sum()) if len(count) > 1 else None


class Run(NamedTuple):
    """One model to train: a row of the ladder and a seed."""
    size: Size
    seed: int
    name: str

    def path(self, kind, cfg):
        """kind: "model" (the finished one), "record" (its results), "log"; "resume" and "trunk" while it trains."""
        save = Path(cfg.SAVE_DIR)
        return {"model": save / f"{self.name}.pt", "record": save / "runs" / f"{self.name}.json",
                "log": save / "runs" / f"{self.name}.log.jsonl",
                "resume": save / "resume" / f"{self.name}.pt", "trunk": save / "resume" / f"{self.name}.trunk.pt"}[kind]


def planned_runs(cfg):
    """Every (size, seed) of the study, from small to large, so that the largest can be predicted before it is trained."""
    def weights(size):
        return size.layers * size.width**2 * (12 if size.family == "gpt" else 8)
    return [Run(size, cfg.SEED + i, size.name + (f"_seed{cfg.SEED + i}" if i else ""))
            for size in sorted(cfg.ladder, key=weights) for i in range(cfg.SEEDS)]


def legs(cfg):
    """The stretches of a run: [(step at which it stops, end of the decay or 0 on the trunk)].

    One trunk at constant rate, and from it a branch with a decay for each of cfg.BUDGETS, so that a run gives the losses
    of several token budgets. Only the ends of branches are results.
    """
    ends = sorted({max(1, round(share * cfg.steps)) for share in cfg.BUDGETS})
    return [leg for end in ends for leg in ((end - decay_steps(end, cfg), 0), (end, end))]


def decay_steps(end, cfg):
    return max(1, round(cfg.DECAY_FRAC * end))


def lr_scale(step, end, cfg):
    """The share of the peak rate in `step` (from 1): warm-up, stable, and if `end` a fall as 1 - sqrt to zero after it.

    Hagele et al. 2024, https://arxiv.org/abs/2405.18392. The warm-up is that of the full budget, so that all branches
    leave one and the same trunk.
    """
    rising = min(1.0, step / max(1, round(cfg.WARMUP_FRAC * cfg.steps)))
    falling = (step - end + decay_steps(end, cfg)) / (decay_steps(end, cfg) + 1) if end else 0.0
    return rising * (1 - max(0.0, falling) ** 0.5)


class Trainer:
    """What a training run owns; `state()` is all of it: a run goes on from a checkpoint as if it had never stopped."""

    def __init__(self, run, vocab, cfg):
        self.run, self.vocab, self.cfg = run, vocab, cfg
        self.recipe = run_recipe(run, cfg)
        torch.manual_seed(run.seed)
        self.model = build_model(run.size, len(vocab.chars), cfg).to(cfg.device)
        self.forward = self.model
        if cfg.device == "cuda" and cfg.COMPILE and run.size.family == "gpt":  # cuDNN's LSTM needs no compiler
            torch._dynamo.config.suppress_errors = True  # where compiling fails: a warning and the plain model
            self.forward = torch.compile(self.model)
        self.optimizers = make_optimizers(self.model, cfg)
        self.scaler = torch.amp.GradScaler(cfg.device, enabled=amp_dtype(cfg) == torch.float16)
        self.train_data = np.memmap(cfg.tokens_root / "train.bin", vocab.dtype, "r")
        self.val_data = read_tokens("val", vocab, cfg)
        need(len(self.train_data) > 2 * cfg.seq_len and len(self.val_data) > 1,
             f"the corpus has {len(self.train_data):,} characters, too few for windows of {cfg.seq_len}; add MIDI files")
        self.step = self.leg = 0
        self.curve = {"tokens": [], "train_loss": [], "lr": []}
        self.rows = []  # one result for each branch that has ended
        self.trained, self.seconds = 0, 0.0  # characters and time, those of branches included
        self.batch = cfg.batch_tokens // cfg.seq_len  # windows per step
        self.micro = max(1, (cfg.MICRO_TOKENS or cfg.batch_tokens) // cfg.seq_len)  # windows per forward pass

    def state(self):
        return {"recipe": self.recipe, "model": self.model.state_dict(), "scaler": self.scaler.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "step": self.step,
                "curve": self.curve, "leg": self.leg, "rows": self.rows, "trained": self.trained, "seconds": self.seconds}

    def save(self, kind):
        with atomic_path(self.run.path(kind, self.cfg)) as partial:
            torch.save(self.state(), partial)

    def restore(self, kind):
        """Goes back to a checkpoint of this very recipe; False where there is none."""
        path = self.run.path(kind, self.cfg)
        state = load_checkpoint(path, self.cfg.device) if path.exists() else {}
        if state.get("recipe") != self.recipe:
            return False
        self.model.load_state_dict(state["model"])
        self.scaler.load_state_dict(state["scaler"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.curve = state["step"], state["curve"]
        if kind == "resume":  # going back to the trunk keeps the results of the branch
            self.leg, self.rows, self.trained, self.seconds = (state[k] for k in ("leg", "rows", "trained", "seconds"))
        return True

    def train_step(self, lr_share):
        """One optimiser step; returns the loss of its batch (a tensor). Out of memory: the same step in smaller pieces."""
        starts = batch_starts(len(self.train_data), self.cfg.seq_len, self.batch, self.step, self.run.seed)
        chunk = windows(self.train_data, starts, self.cfg.seq_len + 1).to(self.cfg.device)
        try:
            loss = self.backward(chunk)
        except torch.OutOfMemoryError:
            need(self.micro > 1, "out of GPU memory with a single window; lower SEQ_LEN or leave the model out of MODELS")
            self.micro //= 2
            say(f"{self.run.name}: out of memory, going on with {self.micro} windows per forward pass")
            torch.cuda.empty_cache()
            return self.train_step(lr_share)
        for optimizer, peak in zip(self.optimizers, (self.cfg.LR, self.cfg.LR_ADAM), strict=True):
            self.scaler.unscale_(optimizer)  # before clipping, or the clip would act on scaled gradients
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_share
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.CLIP_NORM)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        self.trained += self.cfg.batch_tokens
        return loss

    def backward(self, chunk):
        """Gradients of the mean loss over the windows (B, T + 1), `micro` windows at a time."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total = 0.0
        for part in chunk.split(self.micro):
            with autocast(self.cfg):
                logits = self.forward(part[:, :-1])[0]
            loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) * (len(part) / len(chunk))
            self.scaler.scale(loss).backward()
            total = total + loss.detach()
        return total

    def result(self):
        """The row of scaling_results.json for the branch that has just ended."""
        mean, error = mean_loss(token_losses(self.model, self.val_data, self.cfg), self.val_data)
        tokens, flops = self.step * self.cfg.batch_tokens, self.model.flops_per_token()
        unique = min(tokens, len(self.train_data))
        memory = torch.cuda.max_memory_allocated() if self.cfg.device == "cuda" else None
        return {"run": self.run.name, "family": self.run.size.family, "size": self.run.size.size, "seed": self.run.seed,
                "layers": self.run.size.layers, "width": self.run.size.width, **count_params(self.model),
                "tokens": tokens, "unique_tokens": unique, "epochs": tokens / len(self.train_data),
                "flops_per_token": flops, "flops": flops * tokens, "lr": self.cfg.LR, "val_loss": mean,
                "val_loss_se": error, "val_bpc": mean / math.log(2), "val_chars": len(self.val_data) - 1,
                "tokens_per_s": self.trained / max(self.seconds, 1e-9), "wall_s": self.seconds,
                "peak_memory_bytes": memory, "precision": str(amp_dtype(self.cfg)).removeprefix("torch."),
                "checkpoint": f"{self.run.name}.pt", "main": self.step == self.cfg.steps}


def train_model(run, vocab, cfg, bar):
    """Trains one model through all its legs, from its checkpoint if there is one; writes model and record."""
    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(run, vocab, cfg)
    trainer.restore("resume")
    bar.update(work_per_token(trainer.model) * trainer.trained)
    stops = legs(cfg)
    while trainer.leg < len(stops):
        stop, end = stops[trainer.leg]
        train_leg(trainer, stop, end, bar)
        trainer.leg += 1
        if not end:
            trainer.save("trunk")
        else:
            trainer.rows.append(trainer.result())
            if trainer.leg < len(stops):
                need(trainer.restore("trunk"), f"{run.path('trunk', cfg)} is lost; delete {run.path('resume', cfg)} too")
        trainer.save("resume")
    with atomic_path(run.path("model", cfg)) as partial:
        torch.save({"format": CHECKPOINT_FORMAT, "model": trainer.model.state_dict(), "size": list(run.size),
                    "seq_len": cfg.seq_len, "vocab": list(vocab.chars), "result": trainer.rows[-1]}, partial)
    write_json(run.path("record", cfg), {"recipe": trainer.recipe, "rows": trainer.rows, "curve": trainer.curve})
    for kind in ("resume", "trunk"):
        run.path(kind, cfg).unlink(missing_ok=True)


def train_leg(trainer, stop, end, bar):
    """Steps on to `stop`; a line of the log every half per cent, a checkpoint every SAVE_EVERY_S."""
    cfg, run = trainer.cfg, trainer.run
    work = work_per_token(trainer.model) * cfg.batch_tokens
    log = run.path("log", cfg)
    log.parent.mkdir(parents=True, exist_ok=True)
    began = saved = time.monotonic()
    while trainer.step < stop:
        share = lr_scale(trainer.step + 1, end, cfg)
        loss = trainer.train_step(share)
        bar.update(work)
        if trainer.step % max(1, cfg.steps // 200) and trainer.step < stop:
            continue
        loss, now = loss.item(), time.monotonic()
        trainer.seconds, began = trainer.seconds + now - began, now
        if not loss < 2 * math.log(len(trainer.vocab.chars)):  # worse than guessing, or not a number
            raise Diverged(f"{run.name} diverged: loss {loss:.3g} in step {trainer.step}. Lower LR ({cfg.LR}) or LR_ADAM "
                           f"({cfg.LR_ADAM}); the last good state is {run.path('resume', cfg)}")
        point = {"tokens": trainer.step * cfg.batch_tokens, "train_loss": loss, "lr": cfg.LR * share}
        for key, value in point.items():
            trainer.curve[key].append(value)
        with open(log, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({**point, "step": trainer.step, "branch": end}) + "\n")
        bar.set_postfix_str(f"{run.name} loss {loss:.3f} {trainer.trained / trainer.seconds:,.0f} char/s", refresh=False)
        if now - saved > cfg.SAVE_EVERY_S:
            trainer.save("resume")
            saved = now


class Diverged(RuntimeError):
    """A training loss that is no number or worse than guessing."""


CHECKPOINT_FORMAT = "LakhMIDI model 1"
SHARED_KNOBS = ("train_tokens batch_tokens seq_len BUDGETS LR LR_ADAM BETAS WEIGHT_DECAY CLIP_NORM WARMUP_FRAC DECAY_FRAC "
                "EVAL_TOKENS device")  # what a run depends on besides its row of the ladder, its seed and the data


def run_recipe(run, cfg):
    return digest([run, {knob: getattr(cfg, knob) for knob in SHARED_KNOBS.split()}, tokenize.recipe(cfg)])


def read_tokens(split, vocab, cfg):
    """The characters of a held-out split that losses are taken over, as ids."""
    return np.array(np.memmap(cfg.tokens_root / f"{split}.bin", vocab.dtype, "r")[:cfg.EVAL_TOKENS])


def read_vocab(cfg):
    return Vocab(tuple(read_json(cfg.tokens_root / "vocab.json")["chars"]))


def load_checkpoint(path, device):
    """A dict of tensors and plain values; nothing in the file is executed."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types for a file that is cut off or none of its own
        raise UserError(f"{path} is not a whole checkpoint of this study ({type(error).__name__}); delete it and run "
                        "again") from error


def load(path, device="cpu"):
    """A trained model from its .pt file: (model, vocab, the result that scaling_results.json holds of it)."""
    saved = load_checkpoint(path, device)
    need(isinstance(saved, dict) and saved.get("format") == CHECKPOINT_FORMAT, f"{path} is not a model of this study")
    size, vocab = Size(*saved["size"]), Vocab(tuple(saved["vocab"]))
    model = build_model(size, len(vocab.chars), Cfg(SEQ_LEN=saved["seq_len"])).to(device)
    model.load_state_dict(saved["model"])
    return model.eval(), vocab, saved["result"]


@stage(version=1, knobs=SHARED_KNOBS + " ladder SEEDS SEED", after=tokenize, root="SAVE_DIR")
def train(cfg):
    """Trains every model of the study on the same characters in the same order, from small to large."""
    vocab, runs = read_vocab(cfg), planned_runs(cfg)
    tokens = steps_with_branches(cfg) * cfg.batch_tokens
    work = [work_per_token(build_model(run.size, len(vocab.chars), cfg)) * tokens for run in runs]
    bar_format = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"
    with progress(total=sum(work), desc="train", bar_format=bar_format) as bar:
        for run, share in zip(runs, work, strict=True):
            record = read_json(run.path("record", cfg), {})
            if record.get("recipe") == run_recipe(run, cfg) and run.path("model", cfg).exists():
                bar.update(share)
                continue
            state_prediction_first(run, runs, cfg)
            train_model(run, vocab, cfg, bar)
            row = read_json(run.path("record", cfg))["rows"][-1]
            say(f"  {run.name:12s} {row['n_fit']:>11,} parameters  validation loss {row['val_loss']:.4f} nats = "
                f"{row['val_bpc']:.4f} bits per character  {row['tokens_per_s']:>9,.0f} char/s {row['wall_s']:6.0f} s")
            write_results(runs, cfg)
    write_results(runs, cfg)
    save = Path(cfg.SAVE_DIR)
    return [save / "scaling_results.json", save / "training_curves.json", *(run.path("model", cfg) for run in runs)]


def state_prediction_first(run, runs, cfg):
    """Before the largest model of a family is trained, writes down what the others say its loss will be."""
    family = [r for r in runs if r.size.family == run.size.family]
    path, largest = Path(cfg.SAVE_DIR, "prediction.json"), family[-1].size
    if run.size != largest or run is not next(r for r in family if r.size == largest):
        return
    rows = [record["rows"][-1] for r in family if r.size != largest
            if (record := read_json(r.path("record", cfg))) and record["recipe"] == run_recipe(r, cfg)]
    points = {"N": [row["n_fit"] for row in rows], "L": [row["val_loss"] for row in rows]}
    n = count_params(build_model(largest, len(read_vocab(cfg).chars), cfg))["n_fit"]
    stated = {**state_prediction(points, n, runs=cfg.SEEDS), "model": largest.name, "recipe": run_recipe(run, cfg),
              "stated_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(path, {**read_json(path, {}), run.size.family: stated})
    if stated["predicted"]:
        say(f"  {largest.name:12s} is predicted to reach {stated['predicted']:.4f} nats, from the smaller ones")


def work_per_token(model):
    """What a bar of progress counts: FLOPs, and a constant for what a small model costs besides."""
    return model.flops_per_token() + 1_000_000


def steps_with_branches(cfg):
    """Steps that one model trains in all: the trunk, and a decay for each budget."""
    ends = [end for _, end in legs(cfg) if end]
    return ends[-1] + sum(decay_steps(end, cfg) for end in ends[:-1])


def write_results(runs, cfg):
    """Gathers the records of the runs trained so far into the two files that later stages read."""
    records = {run.name: record for run in runs if (record := read_json(run.path("record", cfg)))
               and record["recipe"] == run_recipe(run, cfg)}
    write_json(Path(cfg.SAVE_DIR, "scaling_results.json"), {
        "study": cfg.study, "corpus": cfg.corpus, "device": device_name(cfg), "torch": torch.__version__,
        "knobs": {knob: getattr(cfg, knob) for knob in knob_names()}, "schedule_steps": cfg.steps,
        "batch_tokens": cfg.batch_tokens, "seq_len": cfg.seq_len,
        "runs": [row for record in records.values() for row in record["rows"]]})
    write_json(Path(cfg.SAVE_DIR, "training_curves.json"), {name: {
        **record["curve"], "val_tokens": [row["tokens"] for row in record["rows"]],
        "val_loss": [row["val_loss"] for row in record["rows"]]} for name, record in records.items()})


def device_name(cfg):
    return torch.cuda.get_device_name() if cfg.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ============================================================================================================
# 8 Fit: scaling_results.json -> fits.json, scaling_points.csv, *_scaling.png
# ============================================================================================================


class Table(NamedTuple):
    """Losses ready to fit, one entry per trained model."""
    x: np.ndarray  # log(N / smallest N)
    y: np.ndarray  # log L
    w: np.ndarray  # 1 / standard deviation of y where that is known, else 1
    origin: float  # log(smallest N)


def loss_table(N, L, seed_sd=None, least=4):
    """A Table of the losses L at the sizes N; raises UserError where no falling law can be meant."""
    N, L = np.atleast_1d(np.asarray(N, float)), np.atleast_1d(np.asarray(L, float))
    need(N.ndim == 1 and N.shape == L.shape, f"N and L must have one length, not {N.shape} and {L.shape}")
    need(np.isfinite([N, L]).all(), "a size or a loss is missing or not finite: leave it out")
    need((N > 0).all() and (L > 0).all(), "sizes and losses must be positive")
    sizes = len(np.unique(N))
    need(sizes >= least, f"a power law with an offset needs at least four sizes, this table has {sizes}")
    sd = np.broadcast_to(np.asarray(1.0 if seed_sd is None else seed_sd, float), L.shape)
    need(np.isfinite(sd).all() and (sd > 0).all(), "seed_sd, the noise of log L, must be a positive number")
    x, y = np.log(N) - np.log(N.min()), np.log(L)
    slope = np.polyfit(x, y, 1, w=1 / sd)[0]
    need(slope < -1e-9 and y[x == x.max()].mean() < y[x == 0].mean(),
         "the loss does not fall with size, so there is no power law to fit")
    order = np.lexsort((sd, y, x))  # not even rounding may depend on the order of the rows
    return Table(x[order], y[order], 1 / sd[order], np.log(N.min()))


def log_law(q, x):
    """log(a exp(-alpha x) + c) for q = (log alpha, log a, log c): a power law in exp(x)."""
    return np.logaddexp(q[1] - exponent(q[0]) * x, q[2])


def exponent(log_alpha):
    return np.exp(np.clip(log_alpha, -30, 30))  # finite wherever a search may wander


def least_squares(table, law, start, offset=True):
    """min over u of sum((w (y - log_law(law(u), x)))^2); returns (minimum, u).

    The last entry of u is log c unless `offset` is False; c = 0, its -infinity, is tried too.
    """
    def residual(u):
        return table.w * (table.y - log_law(law(u), table.x))

    options = {"xtol": 1e-11, "ftol": 1e-13, "maxfev": 500, "full_output": True}
    u = optimize.leastsq(residual, start, **options)[0]
    best = np.sum(residual(u) ** 2), u
    if offset and law(u)[2] < table.y.min() - 5:  # c is small: is it nothing?
        u = optimize.leastsq(lambda v: residual([*v, -np.inf]), u[:-1], **options)[0]
        plain = np.sum(residual([*u, -np.inf]) ** 2)
        if plain <= best[0] * (1 + 1e-9):
            best = plain, np.append(u, -np.inf)
    return best


def best_law(table):
    """Variable projection: at a fixed alpha the law is linear in (a, c) >= 0; the best alphas are
    polished."""
    starts = []
    for alpha in np.geomspace(0.03, 60, 32) / table.x.max():
        design = np.stack([np.exp(-alpha * table.x), np.ones_like(table.x)], 1) * np.exp(-table.y)[:, None]
        (a, c), _ = optimize.nnls(design * table.w[:, None], table.w)  # relative residuals: 1 - (a x + c) / L
        q = np.log([alpha, max(a, 1e-9), max(c, 1e-3 * np.exp(table.y.min()))])
        starts.append((np.sum((table.w * (table.y - log_law(q, table.x)))**2), *q))
    starts = [np.array(s[1:]) for s in sorted(starts)[:6:3]]
    return min((least_squares(table, lambda u: u, start) for start in starts), key=lambda fit: fit[0])


def pinned(table, q, name, at=None):
    """v -> the least sum of squares of the laws whose log `name` (or log loss at x = `at`) is v."""
    q = np.maximum(q, [-np.inf, -np.inf, table.y.min() - 7])  # a finite start for log c
    if name == "alpha":
        return lambda v: least_squares(table, lambda u: (v, u[0], u[1]), q[1:])[0]
    if name == "c":
        return lambda v: least_squares(table, lambda u: (u[0], u[1], v), q[:2], offset=False)[0]
    if name == "a":  # of L = a N^-alpha + c, that is at N = 1
        def law(v):
            return lambda u: (u[0], v - exponent(u[0]) * table.origin, u[1])
        return lambda v: least_squares(table, law(v), q[::2])[0]

    def through(v):  # u[1]: the log odds of c in the loss exp(v) at `at`
        return lambda u: (u[0], v - np.logaddexp(0, u[1]) + exponent(u[0]) * at, v - np.logaddexp(0, -u[1]))
    start = [q[0], q[2] - q[1] + exponent(q[0]) * at]
    return lambda v: least_squares(table, through(v), start)[0]


def noise_variance(table, S):
    """(variance of a weighted residual, its degrees of freedom, where it comes from)."""
    if (table.w != 1).any():
        return 1.0, np.inf, "seed_sd"
    groups = [table.y[table.x == x] for x in np.unique(table.x)]
    groups = [g for g in groups if len(g) > 1]
    if len(groups) >= 3:  # seeds tell the noise without trusting the law
        dof = sum(len(g) - 1 for g in groups)
        return sum(((g - g.mean())**2).sum() for g in groups) / dof, dof, "seeds"
    dof = len(table.y) - 3
    return (S / dof if dof > 0 else np.inf), dof, "residuals"


def allowance(table, S, level):
    """How far the sum of squares may rise above its minimum S inside a profile interval of one parameter.

    chi-square where the noise is known, F where it is estimated (Bates & Watts 1988, ch. 6).
    """
    variance, dof, _ = noise_variance(table, S)
    if dof <= 0:
        return np.inf
    quantile = stats.chi2.ppf(level, 1) if np.isinf(dof) else stats.f.ppf(level, 1, dof)
    return max(variance, 1e-16 / np.median(table.w)**-2) * quantile  # a table without noise: 1e-8 of the loss


def profile_ends(rise, best, step, limits):
    """[lo, hi] around `best` where `rise` reaches 0, by root finding; None for an end beyond its limit."""
    ends = []
    for sign, limit in zip((-1, 1), limits, strict=True):
        inner, outer = best, best + sign * step
        while sign * (limit - outer) > 0 and rise(outer) < 0:
            inner, outer = outer, best + 3 * (outer - best)
        if sign * (limit - outer) <= 0:
            outer = limit
        shut = sign * (outer - inner) > 0 and rise(outer) > 0
        ends.append(optimize.brentq(rise, inner, outer, xtol=1e-12, rtol=1e-7) if shut else None)
    return ends


def profile_interval(table, fit, name, level=0.95, at=None):
    """[lo, hi] of a parameter, or of the loss at x = `at`: what the table does not exclude at `level`."""
    S, q = fit
    extra = allowance(table, S, level)
    if not np.isfinite(extra):
        return [None, None]
    best = {"alpha": q[0], "a": q[1] + exponent(q[0]) * table.origin, "c": q[2]}.get(name)
    best = log_law(q, at) if best is None else best
    profile = pinned(table, q, name, at)

    def rise(v):  # nearly straight on either side of the optimum
        return np.sqrt(max(profile(v) - S, 0)) - np.sqrt(extra)
    if name == "c":  # a lower end of 0 is an open one
        top, floor = np.exp(table.y.max()), np.exp(table.y.min()) * 1e-11
        return profile_ends(lambda c: rise(np.log(c)), max(np.exp(best), floor), 1e-3 * top, (floor, 2 * top))
    if name == "a" and None in profile_interval(table, fit, "alpha", level):
        return [None, None]  # a is the reducible loss at N = 1, far outside the table: it is as open as alpha
    span, gap = table.x.max(), np.diff(np.unique(table.x)).min()
    limits = np.log([1e-3 / span, 40 / gap]) if name == "alpha" else (best - 100, best + 100)
    return [None if end is None else float(np.exp(end)) for end in profile_ends(rise, best, 0.05, limits)]


def held_out(N, L, seed_sd=None, level=0.95):
    """The largest size predicted from all others: loss, prediction interval, relative error.

    lo and hi hold the mean of as many new runs as were held out: the profile interval of the law and the
    noise of the runs, added in quadrature on the log scale. They are None where three sizes leave nothing to
    judge the noise by.
    """
    N, L = np.asarray(N, float), np.asarray(L, float)
    last = N == N.max()
    observed = float(np.exp(np.sort(np.log(L[last])).mean()))
    sd = None if seed_sd is None else np.broadcast_to(seed_sd, L.shape)
    stated = state_prediction({"N": N[~last], "L": L[~last], "seed_sd": None if sd is None else sd[~last]},
                              N.max(), level=level, runs=int(last.sum()))
    if stated["predicted"] is None:
        return {**stated, "observed": observed, "error": None, "inside": None}
    inside = None if stated["lo"] is None else bool(stated["lo"] <= observed <= stated["hi"])
    return {**stated, "observed": observed, "error": stated["predicted"] / observed - 1, "inside": inside}


def state_prediction(points, largest, *, level=0.95, runs=1):
    """The loss of a model of `largest` parameters from points = {"N", "L"[, "seed_sd"]} of smaller ones.

    Returns {"n", "predicted", "lo", "hi", "level", "reason"}; "predicted" is None, with the reason, where the
    points allow no law. The interval is for the mean of `runs` runs, see held_out.
    """
    stated = {"n": float(largest), "predicted": None, "lo": None, "hi": None, "level": level, "reason": ""}
    try:
        table = loss_table(points["N"], points["L"], points.get("seed_sd"), least=3)
    except UserError as error:
        return {**stated, "reason": str(error)}
    fit = best_law(table)
    at = np.log(largest) - table.origin
    lo, hi = profile_interval(table, fit, "loss", level, at)
    middle = log_law(fit[1], at)
    stated["predicted"] = float(np.exp(middle))
    if lo is not None and hi is not None:
        noise = allowance(table, fit[0], level) * np.median(table.w)**-2 / runs
        stated["lo"] = float(np.exp(middle - np.hypot(middle - np.log(lo), np.sqrt(noise))))
        stated["hi"] = float(np.exp(middle + np.hypot(np.log(hi) - middle, np.sqrt(noise))))
    return stated


def predict_loss(N, L, at, *, seed_sd=None, level=0.95):
    """The fitted law and its profile band at the sizes `at`: arrays (loss, lo, hi), nan where open.

    With level=None the law alone, which takes a hundredth of the time.
    """
    table = loss_table(N, L, seed_sd)
    fit = best_law(table)
    at = np.log(np.atleast_1d(at).astype(float)) - table.origin
    if level is None:
        return np.exp(log_law(fit[1], at))
    ends = np.array([profile_interval(table, fit, "loss", level, x) for x in at], float)
    return np.exp(log_law(fit[1], at)), ends[:, 0], ends[:, 1]


def rival_laws(table):
    """{name: (sum of squares, parameters)} of laws without a power of N, fitted as the power law is."""
    ones, relative = np.ones_like(table.x), np.exp(-table.y)
    rivals = {}
    for name, powers in (("constant", 0), ("log-linear", 1), ("log-quadratic", 2)):  # L a polynomial in log N
        design = np.stack([table.x**k for k in range(powers + 1)], 1)
        coef = np.linalg.lstsq(design * (relative * table.w)[:, None], ones * table.w, rcond=None)[0]
        for _ in range(20):  # Gauss-Newton from relative to log residuals
            loss = np.maximum(design @ coef, 1e-9 / relative)
            rest = table.w * (table.y - np.log(loss))
            coef = coef + np.linalg.lstsq(design * (table.w / loss)[:, None], rest, rcond=None)[0]
        rest = table.w * (table.y - np.log(np.maximum(design @ coef, 1e-9)))
        rivals[name] = float(rest @ rest), powers + 1
    slope, level = np.polyfit(table.x, table.y, 1, w=table.w)
    rivals["pure power"] = float(np.sum((table.w * (table.y - level - slope * table.x))**2)), 2
    size = np.expm1(table.x)  # the same law of N instead of log N is an exponential
    rivals["exponential"] = float(best_law(table._replace(x=size / np.median(size[size > 0])))[0]), 3
    return rivals


def evidence(table, S, rivals):
    """{rival: log Bayes factor in its favour by BIC}: positive where it beats the power law."""
    n, floor = len(table.y), 1e-16 * np.sum(table.w**2)  # differences below 1e-8 of the loss are rounding
    if (table.w != 1).any():
        return {k: 0.5 * (S - s) + (3 - p) / 2 * np.log(n) for k, (s, p) in rivals.items()}
    gain = {k: n / 2 * np.log((S + floor) / (s + floor)) for k, (s, _) in rivals.items()}
    return {k: gain[k] + (3 - p) / 2 * np.log(n) for k, (_, p) in rivals.items()}


def lack_of_fit(table, S):
    """p-value of noise alone explaining the residuals; None where the noise is not known apart."""
    variance, dof, source = noise_variance(table, S)
    if source == "residuals":
        return None
    if source == "seed_sd":
        return float(stats.chi2.sf(S, max(len(table.y) - 3, 1)))
    spare = len(np.unique(table.x)) - 3
    return float(stats.f.sf((S - dof * variance) / spare / max(variance, 1e-16), spare, dof))


def verdict(table, S, alpha, c, sigma, holdout, odds):
    """(status, reason): may the table be said to have an exponent? Every rule was set by simulation."""
    width = None if None in (alpha["lo"], alpha["hi"]) else alpha["hi"] - alpha["lo"]
    missed = holdout["error"] or 0
    p, rival = lack_of_fit(table, S), max(("log-quadratic", "exponential"), key=odds.get)
    plain = max(("constant", "log-linear"), key=odds.get)
    faults = [
        (width is None, "the data do not bound alpha"),
        (abs(missed) > 0.03, f"the largest model is missed by {abs(missed):.1%}"),
        (sigma > 0.03, f"the residual scatter is {sigma:.1%} of the loss"),
        (p is not None and p < 0.01, "the law misses the points by more than the noise of the runs explains"),
        (odds[plain] > 0, f"a {plain} law, which has no exponent, does as well with fewer parameters"),
        (odds[rival] > np.log(100), f"a {rival} law fits these points far better"),
    ]
    ridge = [
        (width is not None and width > alpha["value"], "the interval of alpha is wider than alpha"),
        (width is not None and c["lo"] is None and width > alpha["value"] / 2, "c is not told from 0"),
        (odds["log-linear"] > -3, "a straight line in log N is not excluded"),
    ]
    for status, rules in (("not_identified", faults), ("ridge", ridge)):
        reasons = [reason for broken, reason in rules if broken]
        if reasons:
            return status, "; ".join(reasons)
    return "identified", "alpha is bounded on both sides and no rival law does as well"


def fit_power_law(N, L, *, seed_sd=None, level=0.95):
    """Fits L = a N^-alpha + c, all >= 0, to losses L (nats, one per trained model) at sizes N; several seeds
    repeat N.

    Least squares on log L by variable projection; the intervals are profile-F ones (chi-square where seed_sd,
    the known standard deviation of log L, is given; from the pooled seed variance where three or more sizes
    have several seeds). Returns a dict: "alpha", "a" and "c" = {"value", "lo", "hi"}, an end that the data
    leave open is None (for c: 0 is not excluded); "status" identified | ridge | not_identified and "reason";
    "sigma_log", the residual standard deviation of log L; "holdout", the largest size predicted from the
    others; "loo_alpha", alpha without each size in turn; "objective", the sum of squared log residuals (over
    seed_sd^2 if given); "n_points"; "noise"; "baselines", other laws on the same points. Raises UserError for
    fewer than four sizes, values that are not finite and positive, and losses that do not fall.
    """
    table = loss_table(N, L, seed_sd)
    S, q = fit = best_law(table)
    alpha = min(exponent(q[0]), 40 / np.diff(np.unique(table.x)).min())
    log_a = q[1] + alpha * table.origin
    values = {"alpha": alpha, "a": np.exp(log_a) if log_a < 700 else None, "c": np.exp(q[2])}
    out = {}
    for name, value in values.items():
        lo, hi = profile_interval(table, fit, name, level)
        out[name] = {"value": None if value is None else float(value), "lo": lo, "hi": hi}
    sigma = float(np.sqrt(np.sum((table.y - log_law(q, table.x))**2) / max(len(table.y) - 3, 1)))
    holdout = held_out(N, L, seed_sd, level)
    rivals = rival_laws(table)
    odds = evidence(table, S, rivals)
    status, reason = verdict(table, S, out["alpha"], out["c"], sigma, holdout, odds)
    variance, dof, source = noise_variance(table, S)
    loo = [best_law(without(table, x))[1][0] for x in np.unique(table.x)]
    laws = {k: {"objective": s, "parameters": p, "log_odds": float(odds[k])} for k, (s, p) in rivals.items()}
    return {**out, "status": status, "reason": reason, "sigma_log": sigma, "holdout": holdout,
            "loo_alpha": [float(np.exp(a)) if a < 10 else None for a in loo], "objective": float(S),
            "n_points": len(table.y), "level": level, "baselines": laws,
            "noise": {"sd": float(np.sqrt(variance) / np.median(table.w)), "source": source,
                      "dof": None if np.isinf(dof) else dof}}


def without(table, x):
    keep = table.x != x
    return Table(table.x[keep] - table.x[keep].min(), table.y[keep], table.w[keep], table.origin)


def huber_sum(p, u, v, y, weight, delta):
    """(sum of weight * Huber(r / delta), its gradient) of r = y - log(e^p0 e^(-p3 u) + e^p1 e^(-p4 v) +
    e^p2)."""
    terms = np.stack([p[0] - p[3] * u, p[1] - p[4] * v, np.full_like(u, p[2])])
    top = terms.max(0)
    share = np.exp(terms - top)
    total = share.sum(0)
    share /= total
    r = (y - top - np.log(total)) / delta
    size = np.abs(r)
    value = weight @ np.where(size <= 1, r * r / 2, size - 0.5)
    pull = share * (-weight * np.clip(r, -1, 1) / delta)
    return value, np.array([*pull.sum(1), -pull[0] @ u, -pull[1] @ v])


def polish(start, data, weight, delta):
    """The minimum of huber_sum near `start`: (value, p). alpha and beta are kept within 0..20."""
    best = optimize.minimize(huber_sum, start, (*data, weight, delta), "L-BFGS-B", jac=True,
                             bounds=[(-60, 60)] * 3 + [(0, 20)] * 2,
                             options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000, "maxcor": 20})
    return best.fun, best.x


def best_parametric(data, delta, starts=3):
    """Variable projection on a grid of (alpha, beta) gives the starts, of which the best are polished."""
    u, v, y = data
    ones, found = np.ones_like(y), []
    for alpha, beta in np.stack(np.meshgrid(*[np.geomspace(0.05, 1.5, 8)] * 2), -1).reshape(-1, 2):
        design = np.stack([np.exp(-alpha * u), np.exp(-beta * v), ones], 1)
        coef, _ = optimize.nnls(design * np.exp(-y)[:, None], ones)  # relative residuals
        p = np.array([*np.log(np.maximum(coef, 1e-4 * np.exp(y.min()))), alpha, beta])
        found.append((huber_sum(p, *data, ones, delta)[0], *p))
    found = [np.array(f[1:]) for f in sorted(found)[:starts]]
    return min((polish(start, data, ones, delta) for start in found), key=lambda fit: fit[0])


def refit_draws(p, data, weight, delta, steps=100):
    """The optimum p followed to each row of `weight` (draws, points), all at once: (draws, 5).

    Levenberg-Marquardt on reweighted least squares, while the width of the quadratic zone of the Huber loss
    shrinks to delta: next to the spread of the draws the error is nothing, and the time is a hundredth of one
    search per draw.
    """
    u, v, y = data
    p, damp = np.tile(p, (len(weight), 1)), np.full(len(weight), 1e-3)

    def residuals(p):
        terms = np.stack([p[:, :1] - p[:, 3:4] * u, p[:, 1:2] - p[:, 4:] * v,
                          np.repeat(p[:, 2:3], len(u), 1)], 1)
        log_loss = np.logaddexp.reduce(terms, axis=1)
        return y - log_loss, np.exp(terms - log_loss[:, None])  # (draws, points), (draws, 3, points)

    for width in np.maximum(delta, np.geomspace(0.05, delta / 4, steps)):
        r, share = residuals(p)
        jacobian = np.concatenate([share, -share[:, :1] * u, -share[:, 1:2] * v], 1)  # (draws, 5, points)
        pull = jacobian * (weight * np.minimum(1, width / np.maximum(np.abs(r), 1e-300)))[:, None]
        hessian = pull @ jacobian.transpose(0, 2, 1)
        hessian += np.eye(5) * (damp[:, None, None] * hessian + 1e-12)
        new = p + np.linalg.solve(hessian, pull @ r[:, :, None])[:, :, 0]
        new = np.clip(new, [-60] * 3 + [0] * 2, [60] * 3 + [20] * 2)
        cost = [np.sum(weight * np.where(np.abs(e) <= width, e * e / 2, width * (np.abs(e) - width / 2)), 1)
                for e in (r, residuals(new)[0])]
        better = cost[1] <= cost[0]
        p = np.where(better[:, None], new, p)
        damp = np.clip(np.where(better, damp / 4, damp * 6), 1e-9, 1e6)
    return p


def bootstrap_runs(p, data, run_id, size_id, delta, n_boot, rng):
    """(n_boot, 5) refits of whole training runs drawn with replacement: the branches of one run share its
    noise.

    A draw with fewer than three sizes can't hold the law and is drawn again.
    """
    runs = np.unique(run_id, return_inverse=True)[1]
    rng, count, weights = np.random.default_rng(rng), runs.max() + 1, []
    while len(weights) < n_boot:
        weight = np.bincount(rng.integers(count, size=count), minlength=count)[runs].astype(float)
        if len(np.unique(size_id[weight > 0])) >= 3:
            weights.append(weight)
    return refit_draws(p, data, np.array(weights), delta)


def parametric_table(N, D, L, run_id):
    """Checked arrays N, D, L, run_id; raises UserError where E + A / N^alpha + B / D^beta can't be told
    apart."""
    N, D, L = (np.atleast_1d(np.asarray(values, float)) for values in (N, D, L))
    run_id = np.arange(len(L)) if run_id is None else np.asarray(run_id)
    need(N.ndim == 1 and N.shape == D.shape == L.shape == run_id.shape, "N, D and L must have one length")
    need(all(np.isfinite(a).all() and a.min() > 0 for a in (N, D, L)), "N, D, L must be finite and positive")
    need(len(np.unique(N)) >= 4, f"L(N, D) needs at least four sizes, this table has {len(np.unique(N))}")
    need(len(np.unique(D)) >= 3, f"L(N, D) needs three token budgets, this table has {len(np.unique(D))}")
    need(len(L) >= 6, f"L(N, D) has five parameters and needs at least six points, this table has {len(L)}")
    together = np.corrcoef(np.log(N), np.log(D))[0, 1]
    need(abs(together) < 0.999, "sizes and token budgets rise together: vary one alone")
    slopes = np.linalg.lstsq(np.stack([np.log(N), np.log(D), np.ones_like(N)], 1), np.log(L), rcond=None)[0]
    need(max(slopes[:2]) < -1e-9, "the loss does not fall with size and with tokens: no law to fit")
    return N, D, L, run_id


def parametric_loss(p, N, D, centre):
    """E + A / N^alpha + B / D^beta for rows p = (log A', log B', log E, alpha, beta) at centred log N and log
    D."""
    p = np.atleast_2d(p)[:, :, None]
    u, v = np.log(np.atleast_1d(N)) - centre[0], np.log(np.atleast_1d(D)) - centre[1]
    return np.exp(p[:, 0] - p[:, 3] * u) + np.exp(p[:, 1] - p[:, 4] * v) + np.exp(p[:, 2])


def parametric_rivals(data):
    """{name: (sum of |log residual|, parameters)} of laws with neither an offset nor an exponent per axis."""
    u, v, y = data
    design, loss = np.stack([np.ones_like(u), u, v], 1), np.exp(y)
    product = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    linear = design @ np.linalg.lstsq(design / loss[:, None], np.ones_like(y), rcond=None)[0]
    return {"constant": (float(np.abs(y - np.median(y)).sum()), 1),
            "product of powers": (float(np.abs(y - product).sum()), 3),
            "log-linear": (float(np.abs(y - np.log(np.maximum(linear, 1e-9))).sum()), 3)}


def fit_parametric_loss(N, D, L, *, run_id=None, delta=1e-3, n_boot=1000, rng=0):
    """Fits L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556) to losses L of
    N-parameter models after D tokens: Huber loss on log residuals, as a sum of (r / delta) so that no
    tolerance stops it early.

    run_id names the training run of a point; branches of one trunk share it. The 95 % intervals are
    percentiles of a bootstrap over runs; an open end is None (for E: 0 is not excluded). Returns the keys of
    fit_power_law for "alpha", "beta", "A", "B", "E", and "draws", {parameter: n_boot values} for what follows
    from them.
    """
    N, D, L, run_id = parametric_table(N, D, L, run_id)
    order = np.lexsort((L, D, N))
    N, D, L, run_id = N[order], D[order], L[order], run_id[order]
    centre = np.log(N).mean(), np.log(D).mean()
    data = np.log(N) - centre[0], np.log(D) - centre[1], np.log(L)
    objective, p = best_parametric(data, delta)
    draws = bootstrap_runs(p, data, run_id, N, delta, n_boot, rng)
    residual = data[2] - np.log(parametric_loss(p, N, D, centre)[0])
    names = "alpha", "beta", "A", "B", "E"
    out = {name: parametric_interval(name, p, draws, centre, L.min()) for name in names}
    sigma = float(np.sqrt(np.sum(residual**2) / (len(L) - 5)))
    holdout = parametric_holdout(N, D, L, run_id, delta, min(n_boot, 200), rng, sigma)
    rivals, runs, error = parametric_rivals(data), len(np.unique(run_id)), np.abs(residual).sum() + 1e-8
    odds = {k: float(runs * np.log(error / (other + 1e-8)) + (5 - count) / 2 * np.log(runs))
            for k, (other, count) in rivals.items()}
    status, reason = parametric_verdict(out, holdout, odds)
    loo = [best_parametric([d[N != n] for d in data], delta, 1)[1][3] for n in np.unique(N)]
    laws = {k: {"objective": s, "parameters": n, "log_odds": odds[k]} for k, (s, n) in rivals.items()}
    return {**out, "status": status, "reason": reason, "sigma_log": sigma, "holdout": holdout,
            "loo_alpha": [float(a) for a in loo], "objective": float(objective), "n_points": len(L),
            "n_runs": runs, "level": 0.95, "delta": delta, "baselines": laws,
            "draws": {"log_A": draws[:, 0] + draws[:, 3] * centre[0], "alpha": draws[:, 3],
                      "log_B": draws[:, 1] + draws[:, 4] * centre[1], "beta": draws[:, 4],
                      "log_E": draws[:, 2]}}


def parametric_interval(name, p, draws, centre, least):
    """{"value", "lo", "hi"} of one parameter from the optimum p and its bootstrap draws."""
    def value(rows):
        log_value = {"A": rows[:, 0] + rows[:, 3] * centre[0], "B": rows[:, 1] + rows[:, 4] * centre[1],
                     "E": rows[:, 2]}
        if name not in log_value:
            return rows[:, 3 if name == "alpha" else 4]
        return np.exp(np.minimum(log_value[name], 700))
    lo, hi = np.quantile(value(draws), [0.025, 0.975])
    least = 1e-3 * least
    shut = {"E": (least, np.inf), "A": (least, 1e30), "B": (least, 1e30)}.get(name, (1e-2, 5))
    return {"value": float(value(p[None])[0]), "lo": float(lo) if lo > shut[0] else None,
            "hi": float(hi) if hi < shut[1] else None}


def parametric_holdout(N, D, L, run_id, delta, n_boot, rng, sigma):
    """The largest size at its largest budget predicted from all smaller sizes, as held_out does for L(N)."""
    last = N == N.max()
    full = last & (D == D[last].max())
    observed = float(np.exp(np.log(L[full]).mean()))
    rest = [a[~last] for a in (N, D, L, run_id)]
    centre = np.log(rest[0]).mean(), np.log(rest[1]).mean()
    data = np.log(rest[0]) - centre[0], np.log(rest[1]) - centre[1], np.log(rest[2])
    _, p = best_parametric(data, delta)
    draws = bootstrap_runs(p, data, rest[3], rest[0], delta, n_boot, rng)
    at = N.max(), D[full][0], centre
    predicted = float(parametric_loss(p, *at)[0, 0])
    band = np.log(np.quantile(parametric_loss(draws, *at), [0.025, 0.975]) / predicted)
    noise = 1.96 * sigma / np.sqrt(full.sum())
    lo, hi = predicted * np.exp(-np.hypot(band[0], noise)), predicted * np.exp(np.hypot(band[1], noise))
    return {"n": float(N.max()), "d": float(D[full][0]), "predicted": predicted, "lo": float(lo),
            "hi": float(hi), "level": 0.95, "observed": observed, "error": predicted / observed - 1,
            "inside": bool(lo <= observed <= hi)}


def parametric_verdict(out, holdout, odds):
    width = {k: None if None in out[k].values() else out[k]["hi"] - out[k]["lo"] for k in ("alpha", "beta")}
    rival = max(odds, key=odds.get)
    for name, symbol in width.items():
        if symbol is None:
            return "not_identified", f"the data do not bound {name}"
    if abs(holdout["error"]) > 0.03:
        return "not_identified", f"the largest model is missed by {abs(holdout['error']):.1%}"
    if odds[rival] > 0:
        return "not_identified", f"a {rival} law does as well with fewer parameters"
    for name in width:
        if width[name] > out[name]["value"]:
            return "ridge", f"the interval of {name} is wider than {name}"
    return ("ridge", "E is not told from 0") if out["E"]["lo"] is None else (
        "identified", "alpha and beta are bounded on both sides and no simpler law does as well")


def power_family(runs, size="n_fit", cost=None):
    """N, L of the full-budget runs of one family; with `cost` another column stands in for N."""
    return [r[cost or size] for r in runs if r["main"]], [r["val_loss"] for r in runs if r["main"]]


def loss_ratio(first, second, at, level=0.95):
    """First family's loss over the second's at the sizes `at`, for two tables (N, L): arrays ratio, lo, hi.

    The two profile bands are combined by MOVER (Zou & Donner 2008, doi 10.1002/sim.3095) on the log scale.
    """
    (a, a_lo, a_hi), (b, b_lo, b_hi) = (np.log(predict_loss(*t, at, level=level)) for t in (first, second))
    below, above = np.hypot(a - a_lo, b_hi - b), np.hypot(a_hi - a, b - b_lo)
    return np.exp(a - b), np.exp(a - b - below), np.exp(a - b + above)


def shared_alpha(first, second, drop_smallest=False):
    """F test of one alpha for two tables (N, L) against one each: {"alpha", "each", "f", "p"}."""
    tables = []
    for N, L in (first, second):
        keep = np.asarray(N) > min(N) * drop_smallest
        tables.append(loss_table(np.asarray(N)[keep], np.asarray(L)[keep], least=4 - drop_smallest))
    fits = [best_law(table) for table in tables]
    profiles = [pinned(table, q, "alpha") for table, (_, q) in zip(tables, fits, strict=True)]
    logs = sorted(q[0] for _, q in fits)
    joint = optimize.minimize_scalar(lambda v: sum(p(v) for p in profiles), method="bounded",
                                     bounds=(logs[0] - 0.1, logs[1] + 0.1), options={"xatol": 1e-8})
    spare, apart = sum(len(t.y) for t in tables) - 6, sum(S for S, _ in fits)
    each = [float(np.exp(q[0])) for _, q in fits]
    out = {"alpha": float(np.exp(joint.x)), "each": each, "f": None, "p": None}
    if spare > 0:
        f = max(joint.fun - apart, 0) / max(apart / spare, 1e-16)
        out |= {"f": float(f), "p": float(stats.f.sf(f, 1, spare))}
    return out


def crossover(first, second, level=0.95):
    """Where the fitted losses of two tables meet, within ten times the range of sizes: {"value", "lo", "hi",
    "reason"}.

    The interval holds the sizes around the crossing at which the ratio of the losses is not told from 1.
    """
    sizes = np.concatenate([first[0], second[0]])
    at = np.geomspace(sizes.min() / 10, sizes.max() * 10, 41)
    ratio, lo, hi = loss_ratio(first, second, at, level)
    crossing = np.flatnonzero(np.diff(np.sign(np.log(ratio))))
    if not len(crossing):
        better = "first" if ratio[-1] < 1 else "second"
        reason = f"none in range: the {better} family stays ahead"
        return {"value": None, "lo": None, "hi": None, "reason": reason}
    i = min(crossing, key=lambda k: abs(np.log(at[k]) - np.log(sizes).mean()))  # two laws may meet twice
    value = np.exp(np.interp(0, *[a[np.argsort(np.log(ratio[i:i + 2]))] for a in
                                  (np.log(ratio[i:i + 2]), np.log(at[i:i + 2]))]))
    unsure = ~((lo > 1) | (hi < 1))
    below, above = np.flatnonzero(~unsure[:i + 1]), np.flatnonzero(~unsure[i + 1:])
    return {"value": float(value), "lo": float(at[below[-1]]) if len(below) else None,
            "hi": float(at[i + 1 + above[0]]) if len(above) else None,
            "reason": "" if len(crossing) == 1 else f"the best supported of {len(crossing)} crossings"}


def compare_families(first, second, *, level=0.95):
    """How two families of runs (rows of scaling_results.json) differ: exponents, losses at equal cost,
    crossover.

    Returns {"shared_alpha", "shared_alpha_without_smallest", "equal_parameters", "equal_flops", "crossover"};
    ratios are the first family's loss over the second's at the largest size (cost) that both have reached. A
    part that the runs do not allow is {"status": "refused", "reason"}.
    """
    by_size, by_cost = ([power_family(runs, cost=c) for runs in (first, second)] for c in (None, "flops"))

    def ratio(tables):
        at = min(max(N) for N, _ in tables)
        value, lo, hi = (None if np.isnan(a[0]) else float(a[0]) for a in loss_ratio(*tables, [at], level))
        return {"at": float(at), "value": value, "lo": lo, "hi": hi}
    return {"shared_alpha": attempt(shared_alpha, *by_size),
            "shared_alpha_without_smallest": attempt(shared_alpha, *by_size, drop_smallest=True),
            "equal_parameters": attempt(ratio, by_size), "equal_flops": attempt(ratio, by_cost),
            "crossover": attempt(crossover, *by_size, level)}


def attempt(law, *args, **kwargs):
    """The result of `law`, or why it was refused."""
    try:
        return law(*args, **kwargs)
    except UserError as error:
        return {"status": "refused", "reason": str(error)}


def effective_tokens(D, unique, r_star=15.39):
    """Tokens' worth of D tokens, `unique` of them distinct (Muennighoff et al. 2023, arXiv 2305.16264, eq.
    5)."""
    D, unique = np.asarray(D, float), np.asarray(unique, float)
    repeats = np.maximum(D / unique - 1, 0)
    return np.where(repeats > 0, unique + unique * r_star * -np.expm1(-repeats / r_star), D)


def compute_frontier(fit, flops_budgets, flops_per_parameter_token=6.0):
    """The best split of each budget C (FLOPs) into N parameters and D tokens, C = flops_per_parameter_token N
    D.

    N* = G (C/6)^(beta/(alpha+beta)), G = (alpha A / (beta B))^(1/(alpha+beta)) (Hoffmann et al. 2022, eq. 4),
    for the fit and for every bootstrap draw of it. Returns a list of {"flops", "n", "d", "loss", each with
    _lo and _hi}.
    """
    def best(log_A, log_B, log_E, alpha, beta, pairs):
        log_n = (np.log(alpha / beta) + log_A - log_B + beta * np.log(pairs)) / (alpha + beta)
        log_d = np.log(pairs) - log_n
        loss = np.exp(log_E) + np.exp(log_A - alpha * log_n) + np.exp(log_B - beta * log_d)
        return {"n": np.exp(log_n), "d": np.exp(log_d), "loss": loss}

    names = "log_A", "log_B", "log_E", "alpha", "beta"
    value = {k: fit[k]["value"] if k in fit else np.log(fit[k[-1]]["value"]) for k in names}
    draws = {k: np.asarray(fit["draws"][k]) for k in names}
    sound = (draws["alpha"] > 1e-3) & (draws["beta"] > 1e-3)
    rows = []
    for flops in np.atleast_1d(flops_budgets):
        pairs = flops / flops_per_parameter_token
        row = {"flops": float(flops)}
        row |= {k: float(v) for k, v in best(*(value[k] for k in names), pairs).items()}
        for key, values in best(*(draws[k][sound] for k in names), pairs).items():
            row[key + "_lo"], row[key + "_hi"] = (float(v) for v in np.quantile(values, [0.025, 0.975]))
        rows.append(row)
    return rows


def describe(law):
    """One sentence on a fitted law, for people."""
    def number(v):
        return "open" if v is None else f"{v:.3g}"
    if law["status"] == "refused":
        return f"No law: {law['reason']}."
    alpha, holdout = law["alpha"], law["holdout"]
    interval = f"[{number(alpha['lo'])}, {number(alpha['hi'])}]"
    missed = "" if holdout["error"] is None else f"; largest model missed by {abs(holdout['error']):.1%}"
    if law["status"] == "not_identified":
        return f"This range of sizes cannot support an exponent: {law['reason']}."
    return f"alpha = {alpha['value']:.3g} {interval}{missed}: {law['status']}" + (
        f" ({law['reason']}: only the pair of alpha and c is known)." if law["status"] == "ridge" else ".")


def fit_family(runs, stated):
    """Everything that fits.json says about one family; `stated` is the prediction made before its largest
    run."""
    total = [r["n_params"] for r in runs if r["main"]]
    N, L = power_family(runs)
    law = attempt(fit_power_law, N, L)
    columns = [np.array([r[k] for r in runs]) for k in ("n_fit", "tokens", "val_loss")]
    names = [r["run"] for r in runs]
    surface = attempt(fit_parametric_loss, *columns, run_id=names)
    worth = effective_tokens(columns[1], [r["unique_tokens"] for r in runs])
    out = {"verdict": describe(law), "power_law": law, "power_law_total_n": attempt(fit_power_law, total, L),
           "power_law_flops": attempt(fit_power_law, *power_family(runs, cost="flops")),
           "parametric": surface,
           "parametric_effective": attempt(fit_parametric_loss, columns[0], worth, columns[2], run_id=names,
                                           n_boot=200),
           "flops_per_parameter_token": np.median([r["flops"] / r["n_fit"] / r["tokens"] for r in runs]),
           "flops_per_s": max((r["flops_per_token"] * (r.get("tokens_per_s") or 0) for r in runs), default=0)}
    if surface["status"] != "refused" and out["flops_per_s"]:
        hours = [0.25, 1, 4, 24]
        budgets = np.array(hours) * 3600 * out["flops_per_s"]
        rows = compute_frontier(surface, budgets, out["flops_per_parameter_token"])
        out["frontier"] = [{"hours": h, **row} for h, row in zip(hours, rows, strict=True)]
    if stated and stated.get("predicted"):
        largest = [loss for n, loss in zip(N, L, strict=True) if n == max(N)]
        observed = float(np.exp(np.mean(np.log(largest))))
        hit = None if stated["lo"] is None else stated["lo"] <= observed <= stated["hi"]
        out["prediction"] = {**stated, "observed": observed, "error": stated["predicted"] / observed - 1,
                             "hit": hit}
    return out


METHOD = {
    "power_law": "L = a N^-alpha + c, all free; least squares on log L by variable projection, profile-F",
    "parametric": "L = E + A / N^alpha + B / D^beta; Huber loss (delta 1e-3) on log residuals; L-BFGS-B from "
                  "the best 3 of 64 starts, ftol 1e-15; percentiles of a bootstrap over training runs",
    "parametric_effective": "D replaced by effective tokens, R* = 15.39 (Muennighoff et al. 2023)",
    "N": "n_fit: all but the input embedding; n_params: all; n_non_embedding: without embedding and head",
    "D": "tokens: training characters; unique_tokens: distinct ones",
    "L": "validation loss at the decayed end of a run, nats per character",
    "left_out": "no run; L(N) takes the runs with main = true, L(N, D) all", "level": 0.95}


@stage(version=1, knobs="", after=train, root="SAVE_DIR")
def fit(cfg):
    """Laws, comparison and figures: scaling_results.json -> fits.json, scaling_points.csv, *.png, all in
    SAVE_DIR."""
    folder = Path(cfg.SAVE_DIR)
    study = read_json(folder / "scaling_results.json")
    stated = read_json(folder / "prediction.json") or {}
    families = {}
    for run in study["runs"]:
        families.setdefault(run["family"], []).append(run)
    fits = {"study": study["study"], "corpus": study["corpus"], "method": METHOD,
            "families": {name: fit_family(runs, stated.get(name)) for name, runs in families.items()}}
    if len(families) == 2:
        fits["comparison"] = {"families": list(families), **compare_families(*families.values())}
    write_json(folder / "fits.json", {**fits, "points": study["runs"]})
    with (atomic_path(folder / "scaling_points.csv") as path,
          open(path, "w", newline="", encoding="utf-8") as file):
        table = csv.DictWriter(file, list(study["runs"][0]))
        table.writeheader()
        table.writerows(study["runs"])
    for name, runs in families.items():
        save_figure(draw_family(name, runs, fits["families"][name]), folder / f"{name}_scaling.png")
    save_figure(draw_combined(families, fits), folder / "combined_scaling.png")
    curves = read_json(folder / "training_curves.json") or {}
    save_figure(draw_curves(families, curves), folder / "training_curves.png")
    for name, law in fits["families"].items():
        say(f"  {name:12s} {law['verdict']}")
    names = ("fits.json", "scaling_points.csv", "combined_scaling.png", "training_curves.png")
    return [folder / name for name in (*names, *(f"{family}_scaling.png" for family in families))]


# Okabe-Ito colours; markers and lines differ in grey, too
COLOURS = {"gpt": ("#0072B2", "o", "-"), "lstm": ("#D55E00", "s", "--")}
N_LABEL = "N, parameters without embedding, with head"
L_LABEL = "validation loss (nats per character)"


def save_figure(figure, path):
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def panel(axes, title, x, y, log="x"):
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.grid(True, which="major", alpha=0.25)


def draw_law(axes, N, L, name, law, reach=10):
    """The runs, the law within its 95 % band, dotted beyond the largest size."""
    colour, marker, line = COLOURS.get(name, ("#009E73", "^", "-."))
    N, L = np.asarray(N, float), np.asarray(L, float)
    axes.plot(N, L, marker, color=colour, label=f"{name.upper()}: {len(N)} runs", zorder=3)
    if law["status"] == "refused":
        return
    at = np.geomspace(N.min() / 1.3, N.max() * reach, 41)
    loss, lo, hi = predict_loss(N, L, at)
    axes.fill_between(at, np.where(np.isnan(lo), 0, lo), np.where(np.isnan(hi), 9 * L.max(), hi),
                      color=colour, alpha=0.15, lw=0)
    axes.plot(at[at <= N.max()], loss[at <= N.max()], line, color=colour)
    axes.plot(at[at >= N.max()], loss[at >= N.max()], ":", color=colour)
    room = L.max() - L.min()
    lowest = np.nanmin(lo[at < 3 * N.max()], initial=L.min())
    axes.set_ylim(max(lowest - 0.1 * room, 0), L.max() + 0.15 * room)


def draw_family(name, runs, fits):
    """Four panels: the law and its held-out test, L - c, the ridge of (alpha, c), the residuals."""
    N, L = (np.array(a, float) for a in power_family(runs))
    law, colour, marker = fits["power_law"], *COLOURS.get(name, ("#009E73", "^"))[:2]
    refused = law["status"] == "refused"
    figure = Figure(figsize=(6.5, 4.6) if refused else (11, 8.2), layout="constrained")
    first, *others = [figure.subplots()] if refused else figure.subplots(2, 2).flat
    figure.suptitle(f"{name.upper()}  {fits['verdict']}", fontsize=10, wrap=True)
    panel(first, "a  loss against size, 95 % band, extrapolation dotted", N_LABEL, L_LABEL)
    draw_law(first, N, L, name, law)
    if refused:
        return figure
    second, third, fourth = others
    held = law["holdout"]
    if held["predicted"]:
        last = N == N.max()
        first.plot(N[last], L[last], marker, mfc="white", mec=colour, mew=1.6, ms=8, zorder=4,
                   label="held out")
        at = held["predicted"]
        error = None if held["lo"] is None else [[at - held["lo"]], [held["hi"] - at]]
        first.errorbar(held["n"] * 1.3, held["predicted"], error, fmt="D", ms=5, color="black", capsize=3,
                       label=f"predicted from the smaller ones ({held['error']:+.1%})")
    first.legend(fontsize=8)
    draw_excess(second, N, L, colour, marker, law)
    draw_ridge(third, N, L, colour, law)
    panel(fourth, "d  residuals of the law; grey: one standard deviation", N_LABEL, "loss / law - 1 (%)")
    fourth.axhspan(-100 * law["sigma_log"], 100 * law["sigma_log"], color="0.9")
    fourth.axhline(0, color="0.4", lw=1)
    fourth.plot(N, 100 * (L / predict_loss(N, L, N, level=None) - 1), marker, color=colour)
    return figure


def draw_excess(axes, N, L, colour, marker, law):
    """L - c in log-log, where a power law is a line, with the lines that the ends of c's interval induce."""
    panel(axes, "b  reducible loss; band: 95 % interval of c", N_LABEL, "L - c (nats per character)", "xy")
    table = loss_table(N, L)
    _, q = best_law(table)
    at = np.linspace(0, table.x.max() + 1, 61)
    ends = [0 if law["c"]["lo"] is None else law["c"]["lo"], law["c"]["hi"] or law["c"]["value"]]
    lines = []
    for c in ends:
        u = least_squares(table, lambda u, c=c: (*u, np.log(max(c, 1e-9))), q[:2], offset=False)[1]
        lines.append(np.exp(u[1] - exponent(u[0]) * at))
    sizes = np.exp(at + table.origin)
    axes.fill_between(sizes, *lines, color=colour, alpha=0.15, lw=0)
    axes.plot(sizes, np.exp(q[1] - exponent(q[0]) * at), color=colour)
    excess, least = L - law["c"]["value"], 1e-3 * L.min()
    bars = [np.clip(excess - (L - ends[1]), 0, excess - least), L - ends[0] - excess]
    shown = excess > least
    axes.errorbar(N[shown], excess[shown], [b[shown] for b in bars], fmt=marker, color=colour, capsize=2)
    axes.set_ylim(max(excess[shown].min() / 4, least), (L - ends[0]).max() * 1.3)


def draw_ridge(axes, N, L, colour, law):
    """The joint region of (alpha, c): its shadows on the axes are the 95 % intervals."""
    panel(axes, "c  the outer contour casts the 95 % intervals", "alpha", "c (nats per character)", "")
    table = loss_table(N, L)
    S, q = best_law(table)
    value, lo, hi = (law["alpha"][k] for k in ("value", "lo", "hi"))
    alphas = np.linspace((lo or 0.05 * value) * 0.8, (hi or 3 * value) * 1.1, 61)
    low, high = law["c"]["lo"] or 0, law["c"]["hi"] or L.min()
    offsets = np.linspace(max(low - 0.15 * (high - low), 1e-6), high + 0.15 * (high - low), 61)
    def rise_at(a, c):
        return least_squares(table, lambda u: (np.log(a), u[0], np.log(c)), q[1:2], offset=False)[0] - S
    rise = np.array([[rise_at(a, c) for a in alphas] for c in offsets])
    levels = [allowance(table, S, level) for level in (0.8, 0.95)]
    if np.isfinite(levels[1]):
        axes.contourf(alphas, offsets, rise, [0, *levels], colors=[colour], alpha=0.2)
        axes.contour(alphas, offsets, rise, levels, colors=[colour], linestyles=["--", "-"])
    axes.plot(value, law["c"]["value"], "+", color="black", ms=10)


def draw_combined(families, fits):
    """Both families: loss against size and against FLOPs, and the map of L(N, D) with the frontier of
    each."""
    maps = [name for name in families if fits["families"][name]["parametric"]["status"] != "refused"]
    figure = Figure(figsize=(11, 8.2 if maps else 4.4), layout="constrained")
    axes = figure.subplots(1 + bool(maps), 2, squeeze=False)
    panel(axes[0, 0], "a  loss against size", N_LABEL, L_LABEL)
    panel(axes[0, 1], "b  loss against compute", "training FLOPs", L_LABEL)
    for name, runs in families.items():
        draw_law(axes[0, 0], *power_family(runs), name, fits["families"][name]["power_law"], 3)
        by_cost = power_family(runs, cost="flops")
        draw_law(axes[0, 1], *by_cost, name, fits["families"][name]["power_law_flops"], 3)
    losses = [r["val_loss"] for runs in families.values() for r in runs if r["main"]]
    room = max(losses) - min(losses)
    for upper in axes[0]:
        upper.set_ylim(max(min(losses) - 0.4 * room, 0), max(losses) + 0.15 * room)
        upper.legend(fontsize=8)
    for lower, name in zip(axes[1] if maps else (), maps, strict=False):
        draw_map(lower, name, families[name], fits["families"][name])
    for lower in axes[1][len(maps):] if maps else ():
        lower.set_axis_off()
    return figure


def draw_map(axes, name, runs, fits):
    """Lines of equal loss of L(N, D), the runs, and the compute-optimal frontier with its 95 % band."""
    law, (colour, marker, _) = fits["parametric"], COLOURS.get(name, ("#009E73", "^", "-."))
    letter = "c" if name == "gpt" else "d"
    panel(axes, f"{letter}  {name.upper()}: lines of equal loss (nats / character) and the frontier",
          N_LABEL, "D, training characters", "xy")
    N, D = (np.array([r[k] for r in runs], float) for k in ("n_fit", "tokens"))
    n, d = np.geomspace(N.min() / 2, N.max() * 3, 80), np.geomspace(D.min() / 2, D.max() * 8, 80)
    A, B, E, alpha, beta = (law[k]["value"] for k in ("A", "B", "E", "alpha", "beta"))
    lines = axes.contour(n, d, E + A * n**-alpha + (B * d**-beta)[:, None], 10, colors="0.5", linewidths=0.8)
    axes.clabel(lines, fontsize=7)
    axes.plot(N, D, marker, color=colour)
    factor = fits["flops_per_parameter_token"]
    rows = compute_frontier(law, np.geomspace(factor * n[0] * d[0], factor * n[-1] * d[-1], 41), factor)
    n_, d_, lo, hi = (np.array([row[k] for row in rows]) for k in ("n", "d", "n_lo", "n_hi"))
    axes.plot(n_, d_, "-", color="black", lw=1.5)
    axes.fill_betweenx(d_, lo, hi, color="black", alpha=0.12, lw=0)
    axes.set_xlim(n[0], n[-1])
    axes.set_ylim(d[0], d[-1])


def draw_curves(families, curves):
    """Training (thin) and validation (marked) loss of every run, from light to dark with size."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(1, max(len(families), 1), sharey=True, squeeze=False)[0],
                                  families.items(), strict=True):
        panel(axes, f"{name.upper()}: training loss (thin), validation loss (marked)", "training characters",
              "loss (nats per character)")
        shown = sorted((r for r in runs if r["main"] and r["run"] in curves), key=lambda r: r["n_fit"])
        for run, shade in zip(shown, colormaps["viridis"](np.linspace(0.85, 0, len(shown))), strict=True):
            curve = curves[run["run"]]
            axes.plot(curve["tokens"], curve["train_loss"], color=shade, lw=0.6, alpha=0.6)
            axes.plot(curve["val_tokens"], curve["val_loss"], COLOURS.get(name, "^^")[1], ls="-", color=shade,
                      ms=4, label=run["run"])
        if shown:
            axes.legend(fontsize=8)
    return figure


# ============================================================================================================
# 9 Sample and evaluate: checkpoints, tokens/test.bin -> evaluation.json, samples.jsonl, two sample folders
# ============================================================================================================


# --- sampling

SAMPLE_BATCH = 64  # tunes sampled side by side; it bounds the memory of the attention's keys and values
CLOSING_CHARS = 1_000  # room that constrained sampling has to come to an end after max_chars


@torch.inference_mode()
def sample(model, vocab, prompts, *, max_chars=1_500, temperature=1.0, top_k=0, top_p=1.0, seed=0,
           constrained=False):
    """Continues each prompt to its end token, or by `max_chars` characters.

    Returns [{"text", "ended", "forced"}], prompts included; "forced" counts the characters that a grammar
    chose. A character costs one step, since the model's state keeps what was read. When the window of
    model.seq_len is full, the model starts anew from half a window: the beginning of the tune's header, which
    says what lengths and bars mean, and the newest characters. Row i draws from its own stream (seed, i),
    whatever else is in the batch. temperature 0 takes the likeliest character. `constrained` (for all, or one
    for each prompt) keeps to the notation of the converter, see Grammar. Raises UserError for characters that
    the model does not know.
    """
    unknown = sorted(set("".join(prompts)) - set(vocab.chars[3:]))
    need(not unknown, f"the prompt has characters unknown to the model: {' '.join(map(repr, unknown))}")
    rows, tunes = [np.append(START, vocab.encode(prompt)) for prompt in prompts], []
    bound = np.broadcast_to(constrained, len(rows))
    total = max(map(len, rows), default=0) + max_chars + CLOSING_CHARS
    for low in range(0, len(rows), SAMPLE_BATCH):
        batch = range(low, min(low + SAMPLE_BATCH, len(rows)))
        grammars = [Grammar(vocab, prompts[i], max_chars) if bound[i] else None for i in batch]
        chance = np.stack([np.random.default_rng([seed, i]).random(total) for i in batch])
        room = np.where(bound[batch], max_chars + CLOSING_CHARS, max_chars)
        tokens, ends = continue_rows(model, [rows[i] for i in batch], room, grammars, vocab, chance,
                                     (temperature, top_k, top_p))
        tunes += [{"text": vocab.decode(row[1:end]), "ended": bool(end < len(row) and row[end] == END),
                   "forced": grammar.forced if grammar else 0}
                  for row, end, grammar in zip(tokens, ends, grammars, strict=True)]
    return tunes


def continue_rows(model, rows, room, grammars, vocab, chance, rule):
    """Rows of ids, characters to add at most (R,) -> tokens (R, T), the place where each row ends (R,).

    All rows advance together; a row's own prompt overrules what is sampled for it. Rows that have ended leave
    the batch when the window is read anew.
    """
    given = np.array([len(row) for row in rows])
    tokens = np.full((len(rows), (given + room).max()), UNKNOWN)
    for row, ids in zip(tokens, rows, strict=True):
        row[:len(ids)] = ids
    device, ends = next(model.parameters()).device, given + room
    live, held, state, filled = np.arange(len(rows)), 0, None, given.min()
    while (ends > filled).any():
        new = tokens[live, filled - 1:filled]
        if state is None or held == model.seq_len:
            live = np.flatnonzero(ends > filled)
            new, held = window_after(tokens[live, :filled], model.seq_len, vocab), 0
            state = model.empty_state(len(live), model.seq_len)
        logits, state = model(torch.from_numpy(new).to(device), state)
        held += new.shape[1]
        writes = (filled >= given[live]) & (ends[live] > filled)
        choice = pick(logits[:, -1].float().cpu().numpy(), chance[live, filled], rule,
                      [grammars[i] if write else None for i, write in zip(live, writes, strict=True)])
        tokens[live[writes], filled] = choice[writes]
        ends[live[writes & ((choice == END) | (choice == UNKNOWN))]] = filled
        filled += 1
    return tokens, ends


def window_after(tokens, seq_len, vocab):
    """(R, n) tokens of tunes -> what a model reads to go on: all of them, or what sample()'s rule leaves."""
    n, half = tokens.shape[1], seq_len // 2
    if n <= seq_len:
        return tokens
    renewed = n - (n - seq_len - 1) % (seq_len - half + 1)  # when the window was full the last time
    newline, bracket = vocab.encode("\n[")
    music = (tokens[:, :renewed - 1] == newline) & (tokens[:, 1:renewed] == bracket)
    header = np.minimum(np.where(music.any(1), music.argmax(1) + 1, 0), half * 3 // 4)
    return np.stack([np.append(row[:h], row[renewed - half + h:])
                     for row, h in zip(tokens, header, strict=True)])


def pick(logits, chance, rule, grammars):
    """One symbol per row: logits (R, V), chance (R,) in [0, 1) -> (R,). Never start or unknown.

    Where a grammar refuses a symbol, the likeliest of those that it allows is taken; unknown where the
    vocabulary has none of them, and there the tune stops.
    """
    logits[:, [START, UNKNOWN]] = -np.inf
    choice = draw(logits, chance, *rule)
    for i, grammar in enumerate(grammars):
        if grammar and not grammar.feed(choice[i]):
            grammar.forced += 1
            choice[i] = next((n for n in np.argsort(-logits[i]) if grammar.feed(n)), UNKNOWN)
    return choice


def draw(logits, chance, temperature, top_k, top_p):
    """Logits (R, V), chance (R,) -> (R,): symbols by their probability, among the likeliest."""
    order = np.argsort(-logits, axis=1, kind="stable")
    if temperature == 0:
        return order[:, 0]
    ranked = np.take_along_axis(logits, order, 1) / temperature
    share = np.exp(ranked - ranked[:, :1])
    share /= share.sum(1, keepdims=True)
    share[np.cumsum(share, 1) - share >= top_p] = 0  # nucleus: Holtzman et al. 2020, arXiv 1904.09751
    share[:, top_k or share.shape[1]:] = 0
    place = (np.cumsum(share, 1) <= (chance * share.sum(1))[:, None]).sum(1)
    return order[np.arange(len(order)), np.minimum(place, (share > 0).sum(1) - 1)]


# --- the grammar of constrained sampling: the notation that section 4 writes, symbol by symbol

def words(template, values):
    """The set of symbols that a template makes of some values."""
    return frozenset(template.format(value) for value in values)


METRES = {f"{n}/{d}": 4 * BEAT * n // d for d in (1, 2, 4, 8, 16, 32) for n in range(1, min(4 * d, 64) + 1)
          if n / d >= 1 / 8}
TEMPOS, LINE_OF_L, MAX_CHORD = [f"1/4={qpm}" for qpm in range(1, 1_000)], words("L:1/{}\n", UNITS), 12
DRUMS = f"%%MIDI channel 10\nK:{KEYS[DRUM_KEY]}\n"
PROGRAMS = words("%%MIDI program {}\n", range(1, 128)) | {""}
HEADER = {  # place: what may stand there ("" if it may be missing), and the next place
    "X": (words("X:1\nL:1/{}\n", UNITS), "M"), "M": (words("M:{}\n", METRES), "Q"),
    "Q": (words("Q:{}\n", TEMPOS), "K"), "K": (words("K:{}\n", KEYS + MINOR), "V"),
    "sound": (PROGRAMS | {program + DRUMS for program in PROGRAMS}, "unit"), "unit": (LINE_OF_L | {""}, "V")}
OCTAVES = ["", *(f" octave={octave}" for octave in range(-4, 5) if octave)]
NEW_METRE, NEW_TEMPO = words("[M:{}]", METRES), words("[Q:{}]", TEMPOS)
SILENCE, TRIPLETS = words("Z{}|", range(1, 100)), words("(3{}", ["", "::2", "::4", "::5", "::6"])
THE_END = "\0"  # stands for the end token


@functools.lru_cache(maxsize=4096)
def note_names(sharps, octave, banned, only=frozenset(range(12, 121)), tie=""):
    """All names of the pitches `only`, by default those that every reader takes, without those banned."""
    names = [mark + letter + marks for mark in ("", *MARKS.values()) for letter in LETTERS + LETTERS.lower()
             for marks in [",'"[letter.islower()] * n for n in range(6)]]
    return frozenset(name + tie for name in names
                     if chord_value(name, sharps, octave)[0][0] in only - banned)


@functools.lru_cache(maxsize=4096)
def note_lengths(unit, left, events=0, beat=0):
    """{text: ticks as written} of the lengths after which `left` ticks of the bar can still be filled.

    In a beat of triplets: `events` are to come in it, with `beat` ticks as written.
    """
    ticks = range(3, left + 1, 3)
    if events:
        ticks = range(12, beat - 12 * (events - 1) + 1, 12) if events > 1 else [beat]
    return {length_text(t, unit): t for t in ticks}


@functools.lru_cache(maxsize=4096)
def beginnings(symbols, chars):
    """The beginnings of those symbols that are spelt in `chars`."""
    return frozenset(symbol[:n] for symbol in symbols if chars.issuperset(symbol)
                     for n in range(1, len(symbol) + 1))


class Place(NamedTuple):
    """Where a text stands: what it said and what it still owes."""
    at: str = "X"  # the kind of symbol that comes next
    header: str = ""
    voices: tuple = ()  # (unit in ticks, sharps, octave) of each
    metre: int = 0  # ticks of a bar
    bar: int = 0
    due: tuple = ()  # the next bar that each voice has to write
    voice: int = -1  # the one being written
    layer: int = 0
    left: int = 0  # ticks left in the layer
    tuplet: tuple = ()  # (events, ticks as written) left of a beat of triplets
    head: str = ""  # the note or chord whose length comes next
    held: frozenset = frozenset()  # pitches that a tie demands next
    owed: frozenset = frozenset()  # (voice, pitch): ties over the bar line, to be taken up at once
    ties: frozenset = frozenset()  # the same, into the next bar
    used: frozenset = frozenset()  # (layer, pitch, tied) so far in the bar of this voice

    def symbols(self, closing):
        """Sets of the symbols that may come next; `closing` leaves the shortest way to the end."""
        at, v = self.at, self.voice
        if at in HEADER:
            return [HEADER[at][0]]
        if at == "V":
            n = self.header.count("V:")
            more = OCTAVES if n < 64 and not (n and closing) else []
            return [words(f"V:{n + 1}{{}}\n", more), words("[V:{}]", range(1, n + 1))]
        if at in ("line", "metre", "tempo", "next"):
            last = -1 if closing and at in ("line", "next") else len(self.voices) - 1
            last = min(self.owed)[0] if self.owed else last  # no line may pass by a voice that owes a note
            close = {"line": THE_END, "next": "\n"}.get(at, "") if not self.owed else ""
            return [words("[V:{}]", range(v + 2, last + 2)), frozenset(close),
                    *([NEW_METRE] if at == "line" and not closing else []),
                    *([NEW_TEMPO] if at in ("line", "metre") and not closing else [])]
        if at == "silence":
            return [frozenset("\n")]
        if at == "bar" and self.bar > self.due[v]:
            return [frozenset([f"Z{self.bar - self.due[v]}|"])]
        mine = frozenset(pitch for voice, pitch in self.owed if voice == v)
        if at == "end":
            last = closing or self.layer + 1 == MAX_LAYERS
            return [frozenset("&" if mine else "|" if last else "&|")]
        return self.notes(closing, mine)

    def notes(self, closing, mine):
        """What may come next inside a layer of a voice that owes the pitches `mine` from the bar before."""
        at, v, at_start = self.at, self.voice, self.left == self.metre
        others = [(pitch, tied) for layer, pitch, tied in self.used if layer != self.layer]
        # a tie counts for the next note of its pitch, in whatever layer: no other may come between
        untied = frozenset(pitch for pitch, _ in others) | (frozenset() if at_start else mine)
        here = frozenset(chord_value(self.head, *self.voices[v][1:])[0])
        if at == "length":
            lengths = list(note_lengths(self.voices[v][0], self.left, *self.tuplet))
            ties = self.head != "z" and "-" not in self.head and not closing and not untied & here
            return [frozenset(lengths + [length + "-" for length in lengths] * ties)]
        last = closing or self.layer + 1 == MAX_LAYERS
        must = self.held or (mine if at_start and last else frozenset())
        names = functools.partial(note_names, *self.voices[v][1:])
        banned = here | {pitch for pitch, tied in others if tied}
        if at == "chord":
            only = {"only": must - here} if len(here) >= MAX_CHORD or (closing and must - here) else {}
            return [names(banned, **only), *([] if closing else [names(banned | untied, **only, tie="-")]),
                    frozenset("]" if len(here) > 1 and must <= here else "")]
        triplet = not self.tuplet and self.left >= BEAT and (self.metre - self.left) % BEAT == 0
        alone = at == "bar" and v == 0 and not self.owed and not closing
        single = names(banned, only=must) if must else names(banned)
        return [frozenset("[" if must else "z["), single if len(must) < 2 else frozenset(),
                *([TRIPLETS] if triplet else []), *([SILENCE] if alone else [])]

    def after(self, symbol):
        """The place behind a symbol."""
        at, move = self.at, self._replace
        if at in HEADER or (at == "V" and symbol[0] == "V"):
            return move(at=HEADER[at][1] if at in HEADER else "sound", header=self.header + symbol)
        if symbol[:3] == "[V:":
            place = self.read_header() if at == "V" else self
            return place.open_layer(int(symbol[3:-1]) - 1, 0, "bar")
        if symbol in NEW_TEMPO or symbol in NEW_METRE:
            return move(at="tempo") if symbol in NEW_TEMPO else move(at="metre", metre=METRES[symbol[3:-1]])
        if symbol == "\n":
            return move(at="line", bar=self.bar + 1, voice=-1, owed=self.ties, ties=frozenset())
        if symbol[:1] == "Z" and self.bar > self.due[self.voice]:
            return move(at="event", due=self.due_at(self.bar))
        if symbol in SILENCE:
            end = self.bar + int(symbol[1:-1])
            return move(at="silence", bar=end - 1, due=self.due_at(end))
        if symbol == "|":
            return move(at="next", due=self.due_at(self.bar + 1))
        if symbol == "&":
            return self.open_layer(self.voice, self.layer + 1, "event")
        if symbol in TRIPLETS:
            return move(at="event", tuplet=(int(symbol[-1]), BEAT * 3 // 2))
        if at == "chord" or symbol == "[":
            return move(at="length" if symbol == "]" else "chord", head=self.head + symbol)
        return move(at="length", head=symbol) if at in ("bar", "event") else self.after_length(symbol)

    def after_length(self, symbol):
        events, beat = self.tuplet or (1, 0)
        ticks = note_lengths(self.voices[self.voice][0], self.left, *self.tuplet)[symbol.rstrip("-")]
        left = self.left - (ticks * 2 // 3 if self.tuplet else ticks)
        pitches, inner, _ = chord_value(self.head, *self.voices[self.voice][1:])
        tied = frozenset(pitches if symbol[-1:] == "-" else itertools.compress(pitches, inner))
        taken = {(self.voice, pitch) for pitch in pitches if self.left == self.metre}
        return self._replace(
            at="event" if left else "end", left=left, head="", held=tied if left else frozenset(),
            tuplet=(events - 1, beat - ticks) if events > 1 else (), owed=self.owed - taken,
            ties=self.ties | {(self.voice, pitch) for pitch in tied if not left},
            used=self.used | {(self.layer, pitch, pitch in tied) for pitch in pitches})

    def due_at(self, bar):
        return (*self.due[:self.voice], bar, *self.due[self.voice + 1:])

    def open_layer(self, voice, layer, at):
        used = self.used if layer else frozenset()
        return self._replace(at=at, voice=voice, layer=layer, left=self.metre, used=used)

    def read_header(self):
        unit, metre, key = re.search(r"L:1/(\d+)\nM:(.*)\nQ:.*\nK:(.*)\n", self.header).groups()
        voices = []
        for part in self.header.split("V:")[1:]:
            own, octave = re.search(r"L:1/(\d+)", part), re.search(r"octave=(-?\d)", part)
            sharps = key_sharps(KEYS[DRUM_KEY] if "K:" in part else key)
            voices.append((4 * BEAT // int(own[1] if own else unit), sharps, int(octave[1]) if octave else 0))
        return self._replace(voices=tuple(voices), due=(0,) * len(voices), metre=METRES[metre])


class Grammar:
    """Follows a tune while it is written and refuses characters after which it could not become whole: every
    bar adds up, every bracket, tuplet and tie is closed, and after max_chars it comes to its end."""

    def __init__(self, vocab, prompt, max_chars):
        self.chars = [None, THE_END, None, *vocab.chars[3:]]
        self.known = frozenset(filter(None, self.chars))
        self.place, self.symbol, self.room, self.forced = Place(), "", max_chars + len(prompt), 0
        self.closing = False  # as it was when the symbol began
        for i, n in enumerate(vocab.encode(prompt)):
            need(self.feed(n), "constrained sampling goes on only from the notation of the converter, which "
                               f"the prompt leaves with {prompt[max(0, i - 20):i + 1]!r}")

    def feed(self, n):
        """Go on by the character with id n; False, and nothing changes, where it may not come."""
        place, symbol, closing = self.place, self.symbol, self.closing
        while self.chars[n]:
            sets = place.symbols(closing)
            if any(symbol + self.chars[n] in beginnings(some, self.known) for some in sets):
                self.place, self.symbol, self.closing = place, symbol + self.chars[n], closing
                self.room -= 1
                return True
            if not any(symbol in some for some in sets):
                return False
            place, symbol, closing = place.after(symbol), "", self.room <= 0
        return False


# --- strict validity

MIN_TUNE_NOTES = 8  # fewer notes, or fewer than three pitches, are no tune


def check_abc(text, ended=True, prompt=""):
    """Judges a tune; never raises. {"valid", "reasons", "notes", "pitches", "bars", "bad_bars"}: valid means
    without a reason.

    "bar_length", "open_tie", "open_bracket", "open_tuplet", "bad_char" and others are what read_abc reports.
    "cut": the tune had not ended when it was stopped; it is judged up to its last whole bar, and a tie into
    what is missing is no fault. "silent", "mostly_rests": after the prompt too little was composed, or less
    than half of the time sounds. "abc2midi", "music21": that reader does not find the same notes in the
    strict export; the two are slow, and asked only about tunes that have no other fault.
    """
    text = text if ended else whole_bars(text)
    tune, last = read_abc(text), text.count("\n")
    faults = {slug for line, slug in tune.problems if ended or slug != "open_tie" or line < last}
    begin = end_of_notes(read_abc(whole_bars(prompt)).notes)
    new = Notes(*(column[tune.notes.onset >= begin - 1e-6] for column in tune.notes))
    n, pitches = len(new.pitch), len(set(new.pitch.tolist()))
    if n < MIN_TUNE_NOTES or pitches < 3:
        faults.add("silent")
    elif sounding_beats(new) < (max(bar_starts(tune)[-1], end_of_notes(new)) - begin) / 2:
        faults.add("mostly_rests")
    if not faults:
        readers = {"abc2midi": lambda text: abc2midi_notes(text)[0], "music21": music21_notes}
        faults = {name for name, reader in readers.items() if not agrees(reader, text, tune.notes)}
    reasons = sorted(faults) + ["cut"] * (not ended)
    bad_bars = len({line for line, slug in tune.problems if slug == "bar_length"})
    return {"valid": not reasons, "reasons": reasons, "notes": n, "pitches": pitches, "bars": tune.n_bars,
            "bad_bars": bad_bars}


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


def agrees(reader, text, notes):
    """Whether another program finds the notes that read_abc found; voices in unison count once."""
    try:
        other = reader(text)
        return note_f1(*(some._replace(voice=np.zeros_like(some.voice)) for some in (notes, other))) > 0.99
    except Exception:  # a judge must survive any text, and music21 raises what it likes
        return False


def music21_score(text):
    import music21  # takes seconds, and only here
    with contextlib.redirect_stderr(io.StringIO()):  # it comments on every beam
        return music21.converter.parse(strict_abc(text), format="abc")


def music21_notes(text):
    """Notes that music21 reads from the strict export of a text."""
    score = music21_score(text)
    score.stripTies(inPlace=True)
    found = [(float(element.getOffsetInHierarchy(score)), float(element.quarterLength), pitch.midi)
             for element in score.flatten().notes for pitch in element.pitches]
    onset, duration, pitch = np.array(found).reshape(-1, 3).T
    return Notes(np.zeros(len(found), int), onset, duration, pitch.astype(int))


def wilson(successes, n):
    """95 % interval of a share (Wilson 1927), as {"value", "lo", "hi"}; all None for n = 0."""
    if not n:
        return dict(NO_ESTIMATE)
    p, z = successes / n, 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"value": p, "lo": max(0.0, middle - half), "hi": min(1.0, middle + half)}


NO_ESTIMATE = {"value": None, "lo": None, "hi": None}


# --- what the music is like, and whether it was copied

def music_metrics(tune):
    """{metric: number, None where it is not defined} of a Tune; {} of one without pitched notes.

    As in MusPy (Dong et al. 2020, arXiv 2008.01951) and MGEval (Yang and Lerch 2020); groove as in Wu and
    Yang 2020 (arXiv 2008.01307). pitch_class_entropy: bits. scale_consistency: share of notes in the best
    major or minor scale. polyphony: notes at once, where any sounds. groove_consistency: 1 - share of the
    steps of 1/12 beat in which the onsets of a bar and the next differ. empty_bars: share of bars in which no
    note begins. repeated_bars: share of the others that were heard before. Drums count in all but the first
    three.
    """
    drums, bars = np.array([*(drum for _, drum in tune.voices), False]), bar_starts(tune)
    pitched = Notes(*(column[~drums[tune.notes.voice]] for column in tune.notes))
    if not len(pitched.pitch) or len(bars) < 2:
        return {}
    share = np.bincount(pitched.pitch % 12, minlength=12) / len(pitched.pitch)
    contents, steps = bar_contents(tune.notes, bars), np.rint(12 * np.diff(bars))
    rhythms = [{onset for onset, *_ in notes} for notes in contents]
    changes = [len(rhythms[i] ^ rhythms[i + 1]) / steps[i] for i in range(len(steps) - 1)
               if steps[i] == steps[i + 1]]
    full = [notes for notes in contents if notes]
    return {"pitch_class_entropy": stats.entropy(share, base=2),
            "scale_consistency": max(share[np.add(NATURAL, root) % 12].sum() for root in range(12)),
            "polyphony": pitched.duration.sum() / sounding_beats(pitched),
            "groove_consistency": 1 - np.mean(changes) if changes else None,
            "notes_per_beat": len(tune.notes.pitch) / bars[-1],
            "empty_bars": 1 - len(full) / len(contents), "repeated_bars": 1 - len(set(full)) / len(full)}


def bar_contents(notes, bars):
    """For each bar the set of its (onset in the bar, duration, pitch), in 1/12 beats."""
    bar = np.minimum(np.searchsorted(bars, notes.onset + 1e-3, "right") - 1, len(bars) - 2)
    columns = np.rint(12 * (notes.onset - bars[bar])), np.rint(12 * notes.duration), notes.pitch
    contents = [set() for _ in bars[1:]]
    for b, *note in zip(bar, *columns, strict=True):
        contents[b].add(tuple(note))
    return [frozenset(notes) for notes in contents]


def melody(notes, drums):
    """(S,) uint8: the steps in semitones between the top notes of each pitched voice, + 128; 0 ends a voice.

    Steps forget the key. Repeated notes count once: long runs of them are in everybody's music.
    """
    pitched = ~np.append(drums, False).astype(bool)[notes.voice]
    voice, pitch = notes.voice[pitched].astype(np.int64), notes.pitch[pitched]
    packed = np.sort(voice << 40 | np.rint(48 * notes.onset[pitched]).astype(np.int64) << 8 | pitch)
    # a note within 1/16 beat of the one before belongs to its chord
    new = np.diff(packed >> 40, prepend=-1).astype(bool) | (np.diff(packed >> 8, prepend=-99) > 3)
    chord = np.flatnonzero(new)
    voice, top = packed[chord] >> 40, np.maximum.reduceat(packed & 0xFF, chord) if len(chord) else chord
    step, same = np.diff(top), np.diff(voice) == 0
    return np.append(np.where(same, step + 128, 0)[~same | (step != 0)], 0).astype(np.uint8)


def training_melodies(cfg, most=2**26):
    """The melodies of the training tunes in one array; beyond `most` steps (64 MB) tunes are left out."""
    parts, size = [], 0
    for tune in read_jsonl(cfg.tokens_root / "tunes.jsonl"):
        if tune["split"] == "train" and size < most:
            notes, voices = score_notes(read_score(cfg.midi_root / tune["file"]))
            parts.append(melody(notes, np.array([drum for _, drum in voices])))
            size += len(parts[-1])
    return np.concatenate(parts)


def longest_runs(tunes, corpus, most=256):
    """Melodies -> (n,) notes in the longest run, in any key, that each shares with the corpus, up to `most`.

    Bisection over the length, for all tunes at once, by hashes of the runs. Memory: a byte per step of the
    corpus, and about 50 MB for the slice of it that is being hashed.
    """
    queries, owner = np.concatenate(tunes), np.repeat(np.arange(len(tunes)), [len(tune) for tune in tunes])
    cut = np.append(0, np.cumsum(queries == 0))
    low, high = np.zeros(len(tunes), int), np.full(len(tunes), most)  # in steps: shared, and too long
    while (high - low > 1).any():
        middle = np.where(high == most, np.minimum(2 * low + 8, most - 1), (low + high) // 2)
        for length in np.unique(middle[high - low > 1]):
            n = max(0, len(queries) - length + 1)
            asked = np.flatnonzero((cut[length:] == cut[:n]) & (middle == length)[owner[:n]])
            hashes = run_hashes(queries, length)[asked]
            shared = np.isin(hashes, shared_hashes(np.unique(hashes), corpus, length))
            found = np.isin(np.arange(len(tunes)), owner[asked[shared]])
            now = (middle == length) & (high - low > 1)
            low[now & found], high[now & ~found] = length, length
    return low + 1


def shared_hashes(wanted, corpus, length, slice_=2**20):
    """Those of the sorted hashes `wanted` that some run of `length` steps of the corpus has."""
    found = np.zeros(len(wanted), bool)
    for i in range(0, len(corpus) if len(wanted) else 0, slice_):
        hashes = run_hashes(corpus[i:i + slice_ + length - 1], length)
        place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        found[place[wanted[place] == hashes]] = True
    return wanted[found]


def run_hashes(steps, length):
    """(n,) uint8 -> (n - length + 1,) uint64: polynomials of the runs modulo 2^64, equal for equal runs."""
    base, inverse = (np.multiply.accumulate(np.append(np.uint64(1), np.full(len(steps), x, np.uint64)))
                     for x in (HASH_BASE, pow(HASH_BASE, -1, 2**64)))
    sums = np.append(np.uint64(0), np.cumsum(STEP_CODES[steps] * base[:-1]))
    n = max(0, len(steps) - length + 1)
    return (sums[length:] - sums[:n]) * inverse[:n]


HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
STEP_CODES = np.random.default_rng(0).integers(2**63, size=256, dtype=np.uint64)


# --- loss where it matters

KIND = re.compile(r"(?P<header>\0[^\[]*)|(?P<voice_tag>\[V:\d+\])|(?P<other>\[[A-Z]:[^]]*\]|\(\d(?:::\d)?)"
                  r"|(?P<accidental>[_^=]+)|(?P<pitch>[A-Ga-g][,']*)|(?P<length>[\d/]+)|(?P<rest>[zZ])"
                  r"|(?P<bar>[|\n]+)|(?P<end>\x01)")
KINDS = ("header", "pitch", "accidental", "length", "rest", "bar", "voice_tag", "end", "other")


def char_kinds(tokens, vocab):
    """Ids of whole tunes -> (n,) index into KINDS of each; "other": chords, ties, tuplets, fields."""
    text = "".join([("\0", "\1", "\2", *vocab.chars[3:])[i] for i in tokens])
    kinds = np.full(len(text), KINDS.index("other"))
    for match in KIND.finditer(text):
        kinds[match.start():match.end()] = KINDS.index(match.lastgroup)
    return kinds


def test_loss(model, test, kinds, whole, cfg):
    """Loss on the test tokens: per character, note and second, by kind of character, by place in the window.

    `whole` are the rows of tunes.jsonl for the tunes that are whole in the tokens.
    """
    losses = token_losses(model, test, cfg)
    bits, place = losses / math.log(2), np.arange(len(losses)) % model.seq_len
    loss, error = mean_loss(losses, test)
    in_whole = bits[:whole[-1]["start"] + whole[-1]["chars"] + 1].sum(dtype=np.float64)
    edges = [0, *(2**k for k in range(int(math.log2(model.seq_len)) + 1))]
    spans = {span: (span[0] <= place) & (place < span[1]) for span in itertools.pairwise(edges)}
    return {"test_loss": loss, "test_loss_se": error, "test_bpc": loss / math.log(2),
            "test_perplexity": math.exp(loss),
            **{f"bits_per_{unit}": in_whole / sum(tune[f"{unit}s"] for tune in whole)
               for unit in ("note", "second")},
            "by_kind": {kind: {"share": np.mean(kinds == i), "bits": bits[kinds == i].mean(dtype=np.float64)}
                        for i, kind in enumerate(KINDS) if np.any(kinds == i)},
            "by_position": [{"from": low, "to": high, "bits": bits[here].mean(dtype=np.float64)}
                            for (low, high), here in spans.items() if here.any()]}


# --- samples of every model, judged beside real music

SAMPLE_FOLDERS = ("best_samples", "samples")


def opening(text, most):
    """The beginning of a tune up to a bar line: about a third of it, and at most so many characters."""
    return whole_bars(text[:min(len(text) // 3, most)]) or text[:text.find("|\n") + 2]


def write_music(models, best, real, cfg):
    """Yields the real tunes, then each model's: lists of {"run", "kind", "prompt", "text", "ended"}."""
    most = cfg.sample_chars
    yield [{"run": "real", "kind": "real", "prompt": "", "text": text[:most], "ended": len(text) <= most,
            "forced": 0} for text in real]
    for run, (model, vocab, _) in models:
        n = cfg.samples if run == best else min(cfg.samples, 100)
        wanted = [("unprompted", "")] * n + [("constrained", "")] * n
        wanted += [("prompted", opening(text, most // 2)) for text in real] if run == best else []
        found = sample(model, vocab, [prompt for _, prompt in wanted], max_chars=most, seed=cfg.SEED,
                       temperature=cfg.TEMPERATURE, top_p=cfg.TOP_P,
                       constrained=[kind == "constrained" for kind, _ in wanted])
        yield [{"run": run, "kind": kind, "prompt": prompt, **tune}
               for (kind, prompt), tune in zip(wanted, found, strict=True)]


def name_shown(tunes, best, cfg):
    """Adds "name" and "shown", the folder that a tune is written to: of the best model the first SHOWN of
    each kind, of the others and the real ones the first. They are not selected."""
    count = Counter()
    for tune in tunes:
        count[tune["kind"]] += 1
        tune["name"] = f"{tune['run']}_{tune['kind']}_{count[tune['kind']]:02d}"
        few, home = (cfg.SHOWN, "best_samples") if tune["run"] == best else (1, "samples")
        skipped = home == "samples" and tune["kind"] == "constrained"
        tune["shown"] = home if count[tune["kind"]] <= few and not skipped else ""
    return tunes


def judge(tune, cfg):
    """In a worker: verdict, metrics and melody of a tune; writes the files of one that is shown."""
    text = tune["text"] if tune["ended"] else whole_bars(tune["text"])
    if tune["shown"]:
        path = Path(cfg.SAVE_DIR, tune["shown"], tune["name"])
        write_tune(path, text, score=tune["shown"] == "best_samples")
    parsed = read_abc(text)
    return {"check": check_abc(tune["text"], tune["ended"], tune["prompt"]), "metrics": music_metrics(parsed),
            "melody": melody(parsed.notes, np.array([drum for _, drum in parsed.voices]))}


def judge_all(groups, best, cfg):
    """All tunes with "check", "metrics" and "longest_run"; workers judge while more are sampled."""
    judged, melodies, nothing = [], [], {"notes": 0, "pitches": 0, "bars": 0, "bad_bars": 0}
    with ProcessPool(max_workers=cfg.workers) as pool:
        waiting = [(tunes, pool.map(judge, name_shown(tunes, best, cfg), [cfg] * len(tunes), timeout=60))
                   for tunes in groups]
        for tunes, future in waiting:
            results = future.result()
            for tune in tunes:
                try:
                    found = next(results)
                except (TimeoutError, ProcessExpired) as error:
                    reason = "timeout" if isinstance(error, TimeoutError) else "crashed"
                    found = {"check": {"valid": False, "reasons": [reason], **nothing}, "metrics": {},
                             "melody": np.zeros(1, np.uint8)}
                melodies.append(found.pop("melody"))
                judged.append({**tune, **found})
    runs = longest_runs(melodies, training_melodies(cfg))
    for tune, steps, run in zip(judged, melodies, runs, strict=True):
        tune["longest_run"], tune["melody_notes"] = int(run), int(np.count_nonzero(steps)) + 1
    return judged


def is_copy(tune, real_limit):
    """Whether a tune shares with training more than real tunes do, or all that it has."""
    whole = max(MIN_TUNE_NOTES, tune["melody_notes"])
    return tune["longest_run"] > real_limit or tune["longest_run"] >= whole


def bootstrap_mean(values, draws, rng):
    """Mean of the numbers among `values` with a 95 % percentile interval over tunes."""
    values = np.array([value for value in values if value is not None])
    if not len(values):
        return dict(NO_ESTIMATE)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    return dict(zip(("value", "lo", "hi"), (values.mean(), *np.quantile(means, (0.025, 0.975))), strict=True))


def emergence_row(tunes, real_limit, cfg):
    """One row of the emergence table; 95 % of the real tunes have a longest run of at most `real_limit`."""
    n, rng, checks = len(tunes), np.random.default_rng(cfg.SEED), [tune["check"] for tune in tunes]
    reasons = [check["reasons"] for check in checks]
    metrics = dict.fromkeys(name for tune in tunes for name in tune["metrics"])
    forced = [t["forced"] / max(1, len(t["text"]) - len(t["prompt"])) for t in tunes]
    return {"run": tunes[0]["run"], "kind": tunes[0]["kind"], "n": n, "ended": sum(t["ended"] for t in tunes),
            "valid": wilson(sum(not some for some in reasons), n),
            "valid_or_cut": wilson(sum(some in ([], ["cut"]) for some in reasons), n),
            "reasons": dict(Counter(itertools.chain(*reasons)).most_common()),
            "bars_right": 1 - sum(c["bad_bars"] for c in checks) / max(1, sum(c["bars"] for c in checks)),
            "longest_run": np.median([tune["longest_run"] for tune in tunes]),
            "copied": wilson(sum(is_copy(tune, real_limit) for tune in tunes), n),
            "forced_share": np.median(forced),
            "metrics": {name: bootstrap_mean([t["metrics"].get(name) for t in tunes], cfg.BOOTSTRAP, rng)
                        for name in metrics}}


@stage(version=2, knobs="SAMPLES SHOWN SAMPLE_CHARS TEMPERATURE TOP_P SEED EVAL_TOKENS BOOTSTRAP", after=fit,
       root="SAVE_DIR")
def evaluate(cfg):
    """Test losses of every model; its tunes, judged, compared with real ones, searched for copies, shown."""
    save, vocab = Path(cfg.SAVE_DIR), read_vocab(cfg)
    rows = [row for row in read_json(save / "scaling_results.json")["runs"] if row["main"]]
    best = min(rows, key=lambda row: row["val_loss"])["run"]
    for folder in SAMPLE_FOLDERS:
        shutil.rmtree(save / folder, ignore_errors=True)
        (save / folder).mkdir()
    held_out = [tune for tune in read_jsonl(cfg.tokens_root / "tunes.jsonl") if tune["split"] == "test"]
    test = read_tokens("test", vocab, cfg)
    whole = [tune for tune in held_out if tune["start"] + tune["chars"] + 2 <= len(test)] or held_out[:1]
    models = {row["run"]: load(save / row["checkpoint"], cfg.device) for row in rows}
    kinds = char_kinds(test, vocab)[1:]
    tested = [{"run": row["run"], "n_fit": row["n_fit"], "val_loss": row["val_loss"],
               **test_loss(models[row["run"]][0], test, kinds, whole, cfg)}
              for row in progress(rows, "test loss", unit="model")]
    real = [read_abc_file({"abc": f"{tune['file']}.abc"}, cfg) for tune in held_out if not tune["unknown"]]
    music = write_music(progress(models.items(), "samples", unit="model"), best, real[:cfg.samples], cfg)
    tunes, groups = judge_all(music, best, cfg), {}
    for tune in tunes:
        groups.setdefault((tune["run"], tune["kind"]), []).append(tune)
    limit = float(np.quantile([tune["longest_run"] for tune in groups["real", "real"]], 0.95))
    table = [emergence_row(group, limit, cfg) for group in groups.values()]
    for folder in SAMPLE_FOLDERS:
        write_json(save / folder / "metadata.json", [tune for tune in tunes if tune["shown"] == folder])
    write_jsonl(save / "samples.jsonl", tunes)
    write_json(save / "evaluation.json", {
        "models": tested, "best": best, "test_chars": len(test) - 1, "sample_chars": cfg.sample_chars,
        "real_run_95": limit, "music": table})
    for row in table:
        if row["run"] in ("real", best):
            say(f"  {row['run']:12s} {row['kind']:12s} {row['valid']['value']:.0%} of {row['n']} tunes valid")
    return [save / "evaluation.json", save / "samples.jsonl", *(save / folder for folder in SAMPLE_FOLDERS)]


# --- tunes as files

AUDIO_SECONDS, AUDIO_RATE = 30, 22_050


def write_tune(path, text, score=False):
    """ABC text -> path.abc, .mid, .mp3, .png (piano roll) and, if asked for and possible, .svg (score)."""
    write_text(f"{path}.abc", text)
    Path(f"{path}.mid").write_bytes(abc_to_midi(text))
    tune = read_abc(text)
    if len(tune.notes.pitch):
        soundfile.write(f"{path}.mp3", audio(text), AUDIO_RATE, bitrate_mode="VARIABLE",
                        compression_level=0.8)
        draw_roll(tune).savefig(f"{path}.png", dpi=110)
    if score:
        with contextlib.suppress(Exception):  # music21 refuses some tunes that others read
            Path(f"{path}.svg").write_text(engrave(text), encoding="utf-8")


def audio(text):
    """ABC text -> (n,) samples in [-1, 1], AUDIO_SECONDS at most."""
    score, rng = symusic.Score.from_midi(abc_to_midi(text)).to("second"), np.random.default_rng(0)
    wave = np.zeros(int((min(score.end(), AUDIO_SECONDS) + 1) * AUDIO_RATE))
    for track in score.tracks:
        columns = [track.notes.numpy()[name] for name in ("time", "duration", "pitch")]
        for start, length, pitch in zip(*columns, strict=True):
            if start < AUDIO_SECONDS:
                sound = tone(length, pitch, rng if track.is_drum else None)
                place = slice(int(start * AUDIO_RATE), int(start * AUDIO_RATE) + len(sound))
                wave[place] += sound[:len(wave[place])]
    return 0.8 * wave / np.abs(wave).max()


def tone(seconds, pitch, rng=None):
    """A plucked tone of six harmonics; with a generator, a drum of noise."""
    t = np.arange(int((min(seconds, 6) + 0.2) * AUDIO_RATE)) / AUDIO_RATE
    hertz = 440 * 2 ** ((pitch - 69) / 12) * np.arange(1, 7)
    if rng:
        sound = rng.normal(size=len(t)) * np.exp(-25 * t)
    else:
        harmonics = [np.sin(2 * np.pi * f * t) / k**2 for k, f in enumerate(hertz, 1) if f < AUDIO_RATE / 2]
        sound = sum(harmonics, np.zeros(len(t))) * np.exp(-2 * t)
    return sound * np.minimum(1, t / 0.005) * np.exp(-30 * np.maximum(0, t - seconds))


def draw_roll(tune):
    """A piano roll: pitch over bars, a colour per voice."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes, bars, notes = figure.subplots(), bar_starts(tune), tune.notes
    colours = colormaps["tab10"](notes.voice % 10)
    axes.barh(notes.pitch, notes.duration * 0.95, 0.8, notes.onset, color=colours)
    every = max(1, len(bars) // 12)
    axes.set_xticks(bars[:-1:every], range(1, len(bars), every))
    octaves = range(notes.pitch.min() // 12 * 12, notes.pitch.max() + 12, 12)
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set(xlabel="bar", xlim=(0, max(bars[-1], 1)))
    axes.grid(alpha=0.4)
    return figure


def engrave(text):
    """The score of a text as SVG. Raises what music21 raises."""
    import music21
    import verovio
    verovio.enableLog(verovio.LOG_OFF)
    page = verovio.toolkit()
    page.setOptions({"pageWidth": 1600, "pageHeight": 60_000, "adjustPageHeight": True, "scale": 40,
                     "svgViewBox": True, "svgRemoveXlink": True, "header": "none", "footer": "none",
                     "xmlIdSeed": 1})
    score = music21_score(text)
    for bar in score.recurse().getElementsByClass("Measure"):  # the strict export marks all notes: too many
        bar.makeAccidentals(inPlace=True, overrideStatus=True, cautionaryNotImmediateRepeat=False)
    xml = music21.musicxml.m21ToXml.GeneralObjectExporter(score).parse()
    page.loadData(xml.decode())
    return re.sub(r">\s+<", "><", page.renderToSVG(1))


# --- on demand: python LakhMIDI.py --sample 8 --prompt mine.mid

def read_prompt(prompt, cfg):
    """A prompt in the notation of the models: ABC text as it is, an .abc or MIDI file converted.

    The last bar of a file is left out: a tune that has come to its close would be followed by its end.
    """
    path = Path(prompt)
    if "\n" in prompt or path.suffix.lower() not in (".abc", ".mid", ".midi", ".kar"):
        return prompt.replace("\\n", "\n")
    need(path.is_file(), f"there is no file {prompt}")
    try:
        text = path.read_text("utf-8", "replace") if path.suffix.lower() == ".abc" else midi_to_abc(path, cfg)
        text = text if "[V:" in text else midi_to_abc(abc_to_midi(text), cfg)
    except Rejected as reject:
        raise UserError(f"{prompt} holds no music to go on from ({reject})") from reject
    return whole_bars(text.rstrip()[:-1]) or text


def compose(cfg, count, prompt="", constrained=False):
    """Writes tunes by the best model to SAVE_DIR/my_samples/, see write_tune; prints paths and verdicts."""
    runs = read_json(Path(cfg.SAVE_DIR, "scaling_results.json"), {"runs": []})["runs"]
    need(runs, f"there is no trained model in {cfg.SAVE_DIR}; run the study first")
    best = min((row for row in runs if row["main"]), key=lambda row: row["val_loss"])
    model, vocab, _ = load(Path(cfg.SAVE_DIR, best["checkpoint"]), cfg.device)
    prompt, folder = read_prompt(prompt, cfg), Path(cfg.SAVE_DIR, "my_samples")
    folder.mkdir(exist_ok=True)
    tunes = sample(model, vocab, [prompt] * count, max_chars=cfg.sample_chars, temperature=cfg.TEMPERATURE,
                   top_p=cfg.TOP_P, seed=cfg.SEED, constrained=constrained)
    for i, tune in enumerate(tunes, 1):
        path = folder / f"{best['run']}_{cfg.SEED}_{i:02d}"
        write_tune(path, tune["text"] if tune["ended"] else whole_bars(tune["text"]))
        check = check_abc(tune["text"], tune["ended"], prompt)
        print(f"{path}.mid  {check['bars']} bars  {', '.join(check['reasons']) or 'valid'}")


# ============================================================================================================
# 10 Report and main: every JSON of the run -> runs_lakh/report.html
# ============================================================================================================

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>Lakh MIDI Scaling Study</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --line: #8884; --accent: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #d8dee6; --paper: #14181d; --accent: #56b4e9 }
  img { background: #fff; filter: brightness(.88) } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2 } h2 { margin-top: 2.8rem; border-bottom: 2px solid var(--accent) }
img { max-width: 100%; height: auto; border-radius: 4px } figure { margin: 1rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: 1rem 0 }
h3 { font-size: .95rem; margin: 1.4rem 0 -.6rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
pre { background: #8881; padding: .7rem; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 24rem; overflow-y: auto }
.verdict { border-left: 4px solid var(--accent); padding-left: .8rem }
.note { font-size: .88rem; opacity: .85 } .tune p { margin: .2rem 0 }
.tunes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem }
.tune { border: 1px solid var(--line); border-radius: 6px; padding: .7rem; min-width: 0 }
audio { width: 100%; height: 2.4rem } summary { cursor: pointer }
@media print { :root { --ink: #000; --paper: #fff } body { max-width: none; font-size: 10px; padding: 0 }
  audio, details { display: none } .scroll { overflow: visible } td { white-space: normal }
  table { font-size: 8px } figure, tr, .tune { break-inside: avoid } img { filter: none }
  h2, h3 { break-after: avoid } }
</style></head><body>
{%- macro table(caption, rows) %}{% if rows %}<h3>{{ caption }}</h3><div class="scroll"><table>
<tr>{% for name in rows[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value | show }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}{% endmacro %}
{%- macro picture(name, alt) %}{% if images[name] %}
<figure><img src="{{ images[name] }}" alt="{{ alt }}"></figure>{% endif %}{% endmacro %}
{%- macro gallery(tunes) %}<div class="tunes">{% for tune in tunes %}
<div class="tune"><strong>{{ tune.name }}</strong>
<p class="note">{{ tune.verdict }}</p>
{% if tune.png %}<img src="{{ tune.png }}" alt="Piano roll of {{ tune.name }}">{% endif %}
{% if tune.mp3 %}<audio controls preload="metadata" src="{{ tune.mp3 }}"></audio>{% endif %}
{% if tune.svg %}<details><summary>Score</summary>
<img src="{{ tune.svg }}" alt="Score of {{ tune.name }}"></details>{% endif %}
<details><summary>ABC</summary><pre>{{ tune.abc }}</pre></details></div>{% endfor %}</div>{% endmacro %}
<h1>How loss falls with size: Transformers and LSTMs on symbolic music</h1>
<p>{{ tables.training | length }} models on {{ results.corpus }}, {{ tables.training[-1].tokens | show }}
training characters each; {{ results.device }}, torch {{ results.torch }}.</p>
<h2>In short</h2>
<ul>{% for sentence in summary %}<li>{{ sentence }}</li>{% endfor %}</ul>
<h2>Listen</h2>
<p>Tunes by {{ evaluation.best }}, the best model: the first of each kind, not selected. “Prompted” ones go
on from the beginning of a tune that no model has seen; “constrained” ones were held to the notation by a
grammar.</p>
{{ gallery(tunes.best_samples) }}
<h2>Size by size</h2>
<p>The first tune of every other model and, for comparison, the first of the real ones.</p>
{{ gallery(tunes.samples) }}
<h2>Data</h2>
{{ table("What became of the files", tables.files) }}
{{ table("The split: by work, so that no version of a held-out tune is trained on", tables.splits) }}
<p>{{ tables.duplicates }}</p>
{{ picture("length_distribution.png", "Histogram of the lengths of tunes in characters") }}
<h2>Training</h2>
{{ table("All models at the full budget; nats per character, over all held-out ones", tables.training) }}
{{ picture("training_curves.png", "Training loss against characters seen, one line per model") }}
<h2>Laws</h2>
{% for family, verdict in tables.verdicts.items() %}
<p class="verdict"><strong>{{ family }}</strong>: {{ verdict }}</p>{% endfor %}
{{ table("L(N) = a N^-alpha + c, with 95 % profile intervals", tables.laws) }}
{{ table("The largest model, predicted from the smaller ones before it was trained", tables.predictions) }}
{{ table("L(N, D) = E + A / N^alpha + B / D^beta, with 95 % bootstrap intervals", tables.surfaces) }}
{{ table("The best use of so many hours on this machine, by L(N, D)", tables.frontier) }}
{{ picture("combined_scaling.png", "Validation loss of both families against parameters and compute") }}
{{ picture("gpt_scaling.png", "Scaling law of the Transformers") }}
{{ picture("lstm_scaling.png", "Scaling law of the LSTMs") }}
<h2>Where the loss is</h2>
{{ table("Test loss in units that compare across notations", tables.units) }}
{{ table("Test loss by kind of character, bits per character", tables.kinds) }}
{{ table("Test loss by place in the window, bits per character", tables.positions) }}
<h2>What emerges at which size</h2>
{{ table("Strictly valid tunes [95 % interval]", tables.validity) }}
<p class="note">Valid: the tune ended by itself, every bar adds up, every bracket, tie and tuplet is closed,
it is not silent, and abc2midi and music21 both find the same notes. “Valid or cut” also takes tunes that
were whole as far as they went when they were stopped after {{ evaluation.sample_chars | show }} characters.
Real tunes go through the same checks: they are the ceiling. The longest run is the number of successive
notes, in any key, that the tune at the middle shares with training tunes; a copy shares more than {{
evaluation.real_run_95 | show }}, which 95 % of the real held-out tunes stay within, or its whole melody.</p>
{{ table("How the tunes compare with real music: means [95 % bootstrap interval]", tables.metrics) }}
<p class="note">Definitions of MusPy and MGEval: entropy of the pitch classes in bits, share of notes in the
best scale, notes at once, likeness of the rhythms of neighbouring bars, notes per beat, share of bars in
which no note begins, share of bars heard before in the tune.</p>
{{ table("Held to the notation by a grammar", tables.constrained) }}
<h2>To repeat this</h2>
<p>Made by <code>python LakhMIDI.py</code>, study {{ results.study }}, seed {{ results.knobs.SEED }};
samples with temperature {{ knobs.TEMPERATURE }} and top-p {{ knobs.TOP_P }}. Every figure here is drawn
from the JSON files beside this page.</p>
{{ table("Versions", tables.versions) }}
<details><summary>All knobs of the training</summary><pre>{% for name, value in results.knobs.items() -%}
{{ name }} = {{ value }}
{% endfor %}</pre></details>
</body></html>
"""


def show(value):
    """A table cell: thousands grouped, four digits, a dash for what is not known, "value [lo, hi]"."""
    if isinstance(value, dict):
        ends = ["open" if value[end] is None else show(float(f"{value[end]:.3g}")) for end in ("lo", "hi")]
        return f"{show(value['value'])} [{', '.join(ends)}]" if value["value"] is not None else show(None)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "\u2013"}[value]
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1_000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else value


def percent(estimate):
    """A share with its interval in per cent."""
    return {key: share if share is None else round(100 * share, 1) for key, share in estimate.items()}


def data_uri(path):
    """A file as an address that needs no network; None where there is no such file."""
    kinds = {".png": "image/png", ".mp3": "audio/mpeg", ".svg": "image/svg+xml"}
    if not path.exists():
        return None
    return f"data:{kinds[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def page_data(stats, results, fits, evaluation):
    """The tables of the page, each a list of {column: value}, and some sentences."""
    works, leak = stats["works"], stats["works"]["leak_of_split_by_file"]
    return {
        "files": [{"outcome": "converted", "files": stats["converted"]},
                  *({"outcome": f"rejected: {why}", "files": n} for why, n in stats["rejected"].items())],
        "splits": [{"split": split, **row} for split, row in stats["splits"].items()],
        "duplicates": f"{stats['converted']:,} tunes are {works['groups']:,} works; "
                      f"{works['in_groups_of_several']:,} tunes have a version among the others. Split by "
                      f"file, {leak['leaked_chars']:.1%} of the held-out characters would have had a version "
                      "of their tune in training; here none has. The text keeps "
                      f"{stats['round_trip_f1']['mean']:.4%} of the notes (F1, onset within 1/8 beat) in "
                      f"{stats['chars_per_note']:.2f} characters each.",
        **training_data(results, evaluation["models"]), **law_data(fits["families"]),
        **music_data(evaluation),
        "versions": [{"package": name, "version": importlib.metadata.version(name)}
                     for name in ("torch", "numpy", "scipy", "symusic", "music21")]}


def training_data(results, tested):
    """Tables of the training and of the test losses."""
    loss, first = {row["run"]: row for row in tested}, tested[0]["by_kind"]
    return {
        "training": [{"model": row["run"], "N": row["n_fit"], "all parameters": row["n_params"],
                      "tokens": row["tokens"], "epochs": row["epochs"], "validation loss": row["val_loss"],
                      "test loss": loss[row["run"]]["test_loss"],
                      "\u00b1 s.e.": loss[row["run"]]["test_loss_se"], "PFLOPs": row["flops"] / 1e15,
                      "char/s": row["tokens_per_s"], "seconds": row["wall_s"]}
                     for row in results["runs"] if row["main"]],
        "units": [{"model": row["run"], "nats/character": row["test_loss"], "bits/character": row["test_bpc"],
                   "perplexity": row["test_perplexity"], "bits/note": row["bits_per_note"],
                   "bits/second of music": row["bits_per_second"]} for row in tested],
        "kinds": [{"model": "share of characters",
                   **{name: f"{kind['share']:.1%}" for name, kind in first.items()}},
                  *({"model": row["run"], **{name: kind["bits"] for name, kind in row["by_kind"].items()}}
                    for row in tested)],
        "positions": [{"model": row["run"], **{f"{at['from']}\u2013{at['to'] - 1}": at["bits"]
                                               for at in row["by_position"]}} for row in tested]}


def law_data(families):
    """Tables of the laws; a law that was refused has no row."""
    def fitted(law):
        return {family: found[law] for family, found in families.items() if found[law]["status"] != "refused"}
    stated = [found["prediction"] for found in families.values() if found.get("prediction")]
    return {
        "verdicts": {family.upper(): found["verdict"] for family, found in families.items()},
        "laws": [{"family": family, "alpha": law["alpha"], "c (nats)": law["c"], "status": law["status"]}
                 for family, law in fitted("power_law").items()],
        "predictions": [{"model": row["model"], "stated at": row["stated_at"],
                         "predicted": dict(row, value=row["predicted"]), "reached": row["observed"],
                         "error": f"{row['error']:+.2%}",
                         "verdict": {True: "hit", False: "miss", None: "no interval"}[row["hit"]]}
                        for row in stated],
        "surfaces": [{"family": family, **{name: law[name] for name in ("alpha", "beta", "E", "status")}}
                     for family, law in fitted("parametric").items()],
        "frontier": [{"family": family, "hours": row["hours"],
                      **{name: {"value": row[key], "lo": row[f"{key}_lo"], "hi": row[f"{key}_hi"]}
                         for name, key in (("N", "n"), ("characters D", "d"), ("loss", "loss"))}}
                     for family, found in families.items() for row in found.get("frontier", [])]}


def music_data(evaluation):
    """Tables of the samples: what emerges at which size."""
    sizes = {row["run"]: row["n_fit"] for row in evaluation["models"]}
    free = [{**row, "tunes": "real, held out" if row["run"] == "real" else f"{row['run']}, {row['kind']}"}
            for row in evaluation["music"] if row["kind"] != "constrained"]
    names = list(dict.fromkeys(name for row in free for name in row["metrics"]))
    return {
        "validity": [{"tunes": row["tunes"], "N": sizes.get(row["run"]), "n": row["n"],
                      "bars that add up": f"{row['bars_right']:.1%}", "ended": row["ended"],
                      "valid, %": percent(row["valid"]), "valid or cut, %": percent(row["valid_or_cut"]),
                      "longest run": row["longest_run"], "copies, %": percent(row["copied"]),
                      "faults": ", ".join(f"{why} {n}" for why, n in list(row["reasons"].items())[:4])}
                     for row in free],
        "metrics": [{"tunes": row["tunes"],
                     **{name.replace("_", " "): row["metrics"].get(name, NO_ESTIMATE) for name in names}}
                    for row in free if row["kind"] != "prompted"],
        "constrained": [{"model": row["run"], "n": row["n"], "ended": row["ended"],
                         "valid, %": percent(row["valid"]),
                         "characters that the grammar chose, median tune": f"{row['forced_share']:.2%}"}
                        for row in evaluation["music"] if row["kind"] == "constrained"]}


def in_short(tables, evaluation):
    """The study in a few sentences."""
    best = next(row for row in evaluation["models"] if row["run"] == evaluation["best"])
    music = {row["kind"]: row for row in evaluation["music"] if row["run"] in ("real", best["run"])}
    share = {kind: f"{row['valid']['value']:.0%}" for kind, row in music.items()}
    copied = {kind: f"{music[kind]['copied']['value']:.0%}" for kind in ("unprompted", "real")}
    return [f"The best model, {best['run']}, needs {best['test_bpc']:.3f} bits per character on tunes that "
            f"it has not seen: {best['bits_per_note']:.2f} per note, {best['bits_per_second']:.1f} per "
            "second of music.",
            *(f"{row['model']} was predicted, before it was trained, to reach "
              f"{row['predicted']['value']:.4f} nats per character; it reached {row['reached']:.4f}: "
              f"{row['verdict']}." for row in tables["predictions"]),
            *(f"{family}: {verdict}" for family, verdict in tables["verdicts"].items()),
            f"Of its tunes {share['unprompted']} are strictly valid music when it begins from nothing, "
            f"{share['prompted']} when it goes on from a real tune, {share['constrained']} when a grammar "
            f"holds it to the notation; of real tunes {share['real']}. "
            f"{music['unprompted']['bars_right']:.0%} of its bars add up.",
            f"{copied['unprompted']} of its tunes share their whole melody with a training tune, or more "
            f"notes on end than 95 % of real tunes do; of the real tunes themselves {copied['real']} do.",
            tables["duplicates"]]


def shown_tunes(folder):
    """What the page shows of the tunes in one of SAMPLE_FOLDERS."""
    tunes = []
    for tune in read_json(folder / "metadata.json", []):
        path, faults = folder / tune["name"], ", ".join(tune["check"]["reasons"])
        tunes.append({"name": tune["name"], "abc": Path(f"{path}.abc").read_text("utf-8"),
                      **{kind: data_uri(Path(f"{path}.{kind}")) for kind in ("mp3", "png", "svg")},
                      "verdict": (f"not valid: {faults}" if faults else "valid")
                      + f"; {tune['check']['bars']} bars, {tune['longest_run']} notes on end as in training"})
    return tunes


@stage(version=2, knobs="", after=evaluate, root="SAVE_DIR")
def report(cfg):
    """One self-contained page: every table and picture of it comes from the files of this run."""
    save = Path(cfg.SAVE_DIR)
    stats, names = read_json(cfg.tokens_root / "stats.json"), ("scaling_results", "fits", "evaluation")
    results, fits, evaluation = (read_json(save / f"{name}.json") for name in names)
    tables = page_data(stats, results, fits, evaluation)
    pictures = [cfg.tokens_root / "length_distribution.png", *save.glob("*.png")]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["show"] = show
    write_text(save / "report.html", environment.from_string(PAGE).render(
        results=results, evaluation=evaluation, tables=tables, knobs=cfg,
        summary=in_short(tables, evaluation),
        tunes={folder: shown_tunes(save / folder) for folder in SAMPLE_FOLDERS},
        images={path.name: data_uri(path) for path in pictures}))
    return [save / "report.html"]


STAGES = (extract, convert, tokenize, train, fit, evaluate, report)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def parse_flags(argv):
    """(cfg, flags) of a command line; every knob of Cfg is a flag that takes a Python literal or a bare word."""
    parser = Parser(prog="LakhMIDI.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.__name__ for stage in STAGES]
    parser.add_argument("--from", dest="first", choices=names, metavar="STAGE", default=names[0], help="start here")
    parser.add_argument("--to", dest="last", choices=names, metavar="STAGE", default=names[-1], help="stop after this")
    parser.add_argument("--only", choices=names, metavar="STAGE", help=f"one of {', '.join(names)}")
    parser.add_argument("--force", action="store_true", help="run the chosen stages even where they are up to date")
    parser.add_argument("--status", action="store_true", help="say what is done and what is stale, and stop")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="write N new tunes by the best model, and stop")
    parser.add_argument("--prompt", default="", help="what they go on from: ABC text, an .abc or a .mid file")
    parser.add_argument("--constrained", action="store_true", help="hold them to the notation: every bar adds up")
    knobs = parser.add_argument_group("knobs of class Cfg")
    for name, comment in knob_help().items():
        default = getattr(Cfg, name)
        knobs.add_argument(f"--{name}", metavar=type(default).__name__, help=f"{comment} [{default!r}]".replace("%", "%%"))
    flags = parser.parse_args(argv)
    given = {name: getattr(flags, name) for name in knob_help() if getattr(flags, name) is not None}
    return Cfg(**{name: parse_knob(name, text) for name, text in given.items()}), flags


def parse_knob(name, text):
    """The text of a flag as the type of its knob; what is no literal is left to checked_knob to refuse."""
    if isinstance(getattr(Cfg, name), str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = tuple(text.split(",")) if isinstance(getattr(Cfg, name), tuple) else text
    return (value,) if isinstance(getattr(Cfg, name), tuple) and not isinstance(value, (tuple, list)) else value


def banner(cfg):
    """What is about to happen, on what, for how long, and how to have it otherwise."""
    tokens = cfg.train_tokens
    say(f"corpus    {cfg.corpus}\n"
        f"device    {device_name(cfg)}\n"
        f"study     {cfg.study}: {len(planned_runs(cfg))} models x {tokens:,} characters, "
        f"roughly {estimated_minutes(cfg):.0f} minutes of training\n"
        f"Your own data: --LMD_ZIP_PATH lmd_full.tar.gz, or --USE_LOCAL_MIDI True --LOCAL_MIDI_ROOT folder")


def estimated_minutes(cfg):
    """Training time if the models reach half the speed of a matrix product, as those of a CPU do."""
    a = torch.randn(1024, 1024, device=cfg.device, dtype=amp_dtype(cfg))
    (a @ a).sum().item()  # .item() waits for the GPU
    began = time.perf_counter()
    for _ in range(10):
        (a @ a).sum().item()
    rate = 10 * 2 * 1024**3 / (time.perf_counter() - began) / 2
    work = sum(work_per_token(build_model(run.size, 100, cfg)) for run in planned_runs(cfg))
    return work * steps_with_branches(cfg) * cfg.batch_tokens / rate / 60


def run_stages(cfg, first="extract", last="report", force=False):
    """Runs the stages from `first` to `last`; returns whether any of them had something to do."""
    names = [stage.__name__ for stage in STAGES]
    chosen = STAGES[names.index(first):names.index(last) + 1]
    need(chosen, f"--from {first} comes after --to {last}")
    cfg = cfg.pinned()
    return any([stage(cfg, force) for stage in chosen])


def main(argv=None):
    """The command line; returns the exit code: 0 done, 1 failed, 2 a mistake in the command, 130 interrupted."""
    try:
        cfg, flags = parse_flags(argv)
        cfg.check()
        cfg = cfg.pinned()
        if flags.status:
            for one in STAGES:
                print(f"{one.__name__:9s} {one.status(cfg)}")
            return 0
        if flags.sample:
            compose(cfg, flags.sample, flags.prompt, flags.constrained)
            return 0
        banner(cfg)
        if not run_stages(cfg, flags.only or flags.first, flags.only or flags.last, flags.force):
            say("nothing to do: every stage is up to date (--force runs them again)")
        say(f"report    {Path(cfg.SAVE_DIR, 'report.html')}")
    except UserError as mistake:
        print(f"LakhMIDI: {mistake}", file=sys.stderr)
        return 2
    except (Diverged, OSError) as failure:
        print(f"LakhMIDI: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nLakhMIDI: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
