"""Lakh MIDI Scaling Study: how the loss of Transformers and LSTMs on symbolic music falls with their size.

MIDI files go in at the top; ABC notation, characters, two families of models, power laws with honest intervals and
new music come out at the bottom. The file reads in the order in which the study runs.

    python LakhMIDI.py                                    the whole study on bundled folk tunes, or on what Cfg names
    python LakhMIDI.py --LMD_ZIP_PATH lmd_full.tar.gz     the same on the Lakh MIDI Dataset
    python LakhMIDI.py --status                           what is done, what is stale
    python LakhMIDI.py --from train --STUDY cpu           part of it, with another knob (--help lists all)

  stage      reads                     writes
  extract    ZIP, tar, folder, corpus  data_lakh/midi/, midi_index.json
  convert    midi_index.json           data_lakh/abc/, report.jsonl
  tokenize   report.jsonl, abc/        data_lakh/tokens/: train.bin val.bin test.bin vocab.json stats.json
  train      tokens/                   runs_lakh/: gpt_*.pt lstm_*.pt scaling_results.json training_curves.json
  fit        scaling_results.json      runs_lakh/: fits.json *_scaling.png
  evaluate   checkpoints, tokens/      runs_lakh/: evaluation.json best_samples/
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
import difflib
import functools
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
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
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import symusic
import torch
import torch.nn.functional as F
from datasketch import MinHash
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
    "cpu": Study(1_000_000, 4_096, 256, (
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
    LR_ADAM = 0.004  # peak learning rate of embedding, head and biases (AdamW)
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
    SAMPLES = 12  # tunes written to best_samples/
    SAMPLE_CHARS = 1_500  # a tune that has not ended by then is cut
    TEMPERATURE = 0.9  # of sampling
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
                      "MAX_MIDI_FILES": 80, "SAMPLES": 4, "SAMPLE_CHARS": 200, **knobs})

    # --- derived values
    @property
    def device(self):
        """The torch device type that is used: "cuda" or "cpu"."""
        return self.DEVICE if self.DEVICE != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def source(self):
        """What identifies the MIDI files of this study; UserError if they are not there."""
        return source_id(self)

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
        return self.WORKERS or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

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
            found = read_json(manifest_path(cfg))
            if not found:
                return "not run"
            stale = [knob for knob, value in recipe(cfg)["knobs"].items() if found["recipe"]["knobs"].get(knob) != value]
            if stale:
                return "stale: " + ", ".join(stale) + " changed"
            if found["recipe"] != recipe(cfg):
                return "stale: an earlier stage changed" if found["recipe"]["version"] == version else "stale: newer code"
            changed = [path for path, size in found["outputs"].items() if size_on_disk(path) != size]
            return f"stale: {changed[0]} changed" if changed else "up to date"

        @functools.wraps(body)
        def run(cfg, force=False):
            cfg.check()
            if after is not None:
                need(after.status(cfg) == "up to date",
                     f"{name} needs {after.__name__}, which is {after.status(cfg)}; run with --to {name}")
            if not force and status(cfg) == "up to date":
                say(f"{name:9s} up to date")
                return False
            manifest_path(cfg).unlink(missing_ok=True)
            began = time.time()
            outputs = body(cfg)
            write_json(manifest_path(cfg), {"recipe": recipe(cfg), "seconds": round(time.time() - began, 1),
                                            "outputs": {str(path): size_on_disk(path) for path in outputs}})
            say(f"{name:9s} done in {time.time() - began:.0f} s")
            return True

        run.recipe, run.status = recipe, status
        return run
    return decorate


# ======================================================================================================================
# 3 Acquire: ZIP, tar, folder, download or bundled corpus -> data_lakh/midi/, midi_index.json
# ======================================================================================================================

LAKH_URL = "http://hog.ee.columbia.edu/craffel/lmd/"  # https is not served there, hence the checksums
LAKH = {  # LMD_DOWNLOAD: (archive, SHA-256); 1.77 GB, 1.41 GB and 234 MB, https://colinraffel.com/projects/lmd/
    "full": ("lmd_full.tar.gz", "6fcfe2ac49ca08f3f214cec86ab138d4fc4dabcd7f27f491a838dae6db45a12b"),
    "matched": ("lmd_matched.tar.gz", "621ff830aed771f469e5bfa13dc12a33c6ed69090adeda63d0b5c47783af0191"),
    "clean": ("clean_midi.tar.gz", "de1bb64cbc0cf35545a05b5c3e786aa6890cfa144edffc4b827ff41bf8c33dc5"),
}
FOLK_BOOKS = ("airdsAirs", "essenFolksong", "oneills1850", "ryansMammoth")  # of music21, public domain
MIDI_SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
# What no honest archive of MIDI files comes near: Lakh has 178,561 members, 6 GB in all, packed 3:1.
MAX_MEMBERS = 1_000_000
MAX_FILE_BYTES = 16 * 2**20
MAX_TOTAL_BYTES = 64 * 2**30
MAX_RATIO = 200  # of the whole archive, above 256 MiB unpacked
SPARE_BYTES = 256 * 2**20  # left free on the disk


class Skip(Exception):
    """Why one file is left out; its text is the reason in the books."""


def source_id(cfg):
    """What tells the source that the knobs name from any other, found without reading it. Raises UserError."""
    chosen = [knob for knob in ("LMD_DOWNLOAD", "LMD_ZIP_PATH", "USE_LOCAL_MIDI") if getattr(cfg, knob)]
    need(len(chosen) <= 1, f"{' and '.join(chosen)} each name a source of MIDI files; set one of them")
    if cfg.LMD_DOWNLOAD:
        need(cfg.LMD_DOWNLOAD in LAKH, f"LMD_DOWNLOAD is {cfg.LMD_DOWNLOAD!r}; choose {', '.join(LAKH)}")
        return dict(zip(("archive", "sha256"), LAKH[cfg.LMD_DOWNLOAD], strict=True))
    if cfg.LMD_ZIP_PATH:
        path = Path(cfg.LMD_ZIP_PATH)
        need(not path.is_dir(), f"LMD_ZIP_PATH {path} is a folder; use USE_LOCAL_MIDI and LOCAL_MIDI_ROOT for it")
        need(path.is_file(), f"LMD_ZIP_PATH: there is no file {path}")
        return {"archive": path.name, "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    if cfg.USE_LOCAL_MIDI:
        need(cfg.LOCAL_MIDI_ROOT, "USE_LOCAL_MIDI needs LOCAL_MIDI_ROOT, the folder of your MIDI files")
        need(os.path.isdir(cfg.LOCAL_MIDI_ROOT), f"LOCAL_MIDI_ROOT: there is no folder {cfg.LOCAL_MIDI_ROOT}")
        found = ((name, os.lstat(path)) for name, path in walk(cfg.LOCAL_MIDI_ROOT) if is_midi(name))
        return {"folder": cfg.LOCAL_MIDI_ROOT, "digest": digest([(n, s.st_size, s.st_mtime_ns) for n, s in found])}
    return {package: importlib.metadata.version(package) for package in ("music21", "symusic")}  # tunes and abc2midi


def is_midi(name):
    return name.lower().endswith(MIDI_SUFFIXES)


def rank(name):
    """A place in an order that has nothing to do with that of the archive or the file system."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


# --- names


def check_name(name):
    """The parts of a member's name; raises Skip for what is no MIDI file or would lead out of the folder."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    if not is_midi(name):
        raise Skip("archive in the archive" if name.lower().endswith(ARCHIVE_SUFFIXES) else "not a MIDI file by its name")
    if name[0] in "/\\" or name[1] == ":" or ".." in parts or "\0" in name:
        raise Skip("unsafe path")
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):  # macOS hides resource forks as ._name
        raise Skip("hidden file")
    if max(len(part.encode("utf-8", "surrogatepass")) for part in parts) > 240 or len(name) > 400:
        raise Skip("name too long")
    return parts


# What some file system can't hold: reserved and control characters, bytes that are no UTF-8, a dot or blank at the end,
# and the device names of Windows, which are prefixed.
UNPORTABLE = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]|[. ]\Z|^(?=(con|prn|aux|nul|com\d|lpt\d)(\.|\Z))', re.I)


def portable_path(parts, taken):
    """A relative path for every system, unlike all in the Counter `taken` even where case and accents are ignored."""
    *folders, file = (UNPORTABLE.sub("_", part) for part in parts)
    path = first = "/".join([folder + "_" * is_midi(folder) for folder in folders] + [file])  # a.mid/ must not bar a.mid

    def key(path):
        return unicodedata.normalize("NFC", path).casefold()

    while taken[key(path)]:
        taken[key(first)] += 1
        path = "-{}".format(taken[key(first)]).join(os.path.splitext(first))
    taken[key(path)] += 1
    return path


# --- archives: each yields (name of a member, function that reads it)


def open_archive(path):
    """The members of a ZIP or tar, by its content, whatever its name."""
    with open(path, "rb") as file:
        return zip_members(path) if file.read(4) in (b"PK\3\4", b"PK\5\6") else tar_members(path)


def check_bomb(path, unpacked):
    allowed = 2**28 + MAX_RATIO * os.path.getsize(path)
    need(unpacked <= allowed, f"{path} unpacks to more than {allowed:,} bytes: refused as an archive made to fill the disk")


def zip_members(path):
    with zipfile.ZipFile(path) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        check_bomb(path, sum(info.file_size for info in infos))  # no more than that is read, whatever comes
        ends = [info.header_offset + 30 + info.compress_size for info in infos]
        need(all(end <= info.header_offset for end, info in zip(ends, infos[1:], strict=False)),
             f"{path} has members that overlap: refused as an archive made to fill the disk")
        for info in tqdm(infos, "extract", unit="file", disable=None):
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
    """tarfile takes a header that is cut off or garbled for the end, and reads long names of any length into memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if not info.isreg() and info.size > 2**20:
            raise tarfile.ReadError("a header that is larger than 1 MiB")
        return info


def tar_members(path):
    """Reads the tar once, in order. Decompressed here and to the end, since only that verifies its checksum."""
    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", os.path.getsize(path), desc="extract", disable=None) as packed:
        magic = file.read(2)
        file.seek(0)
        stream = openers[magic](packed) if magic in openers else packed
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # or it would keep all of them
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


# --- download


def download(url, path, *, sha256=None, patience=(2, 10, 60)):
    """Fetches `url` to `path`, unless it is there, and returns the path. An attempt that broke off is continued.

    `patience`: seconds to wait after each attempt in a row that brought nothing. Raises UserError when the file can't be
    had or is not the one with the checksum; `path` exists only when the file is whole.
    """
    path = Path(path)
    part, waits, best = path.with_name(path.name + ".part"), list(patience), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        try:
            fetch_rest(url, part)
            check_sum(url, part, sha256)
            os.replace(part, path)
            part.with_suffix(".json").unlink(missing_ok=True)
        except requests.RequestException as error:
            got = part.stat().st_size if part.exists() else 0
            best, waits = max(best, got), list(patience) if got > best else waits
            refused = error.response is not None and 400 <= error.response.status_code < 500
            need(waits and not refused, f"can't download {url} ({error}); run again to go on, or fetch it in another way")
            time.sleep(waits.pop(0))
        except OSError as error:
            raise UserError(f"can't write {part}: {error.strerror}") from error
    return path


def fetch_rest(url, part):
    """One request for what `part` lacks, or for all of it unless the server says that it still has the same file."""
    note = part.with_suffix(".json")  # written after the part is emptied, before anything is added
    known = read_json(note, {}) if part.exists() else {}
    have = part.stat().st_size if known.get("tag") else 0
    if have and have == known["total"]:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-", "If-Range": known["tag"]} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
        if reply.status_code == 416:  # the file has become shorter
            note.unlink()
            raise requests.ConnectionError("the file has changed on the server")
        reply.raise_for_status()
        etag = reply.headers.get("ETag", "W/")  # a weak one does not promise equal bytes
        tag = reply.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
        span = re.match(rf"bytes {have}-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if reply.status_code == 206 and not (span and tag == known["tag"]):
            note.unlink()
            raise requests.ConnectionError("the file has changed on the server")
        have = have if reply.status_code == 206 else 0
        total = int(span[1] if have else reply.headers.get("Content-Length", 0))
        if reply.headers.get("Content-Encoding", "identity") != "identity":  # lengths would be those of the packed bytes
            tag, total = "", 0
        need(shutil.disk_usage(part.parent).free > total - have + SPARE_BYTES, f"the disk of {part.parent} is full")
        bar = tqdm(desc=part.stem, total=total or None, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as out:
            write_json(note, {"tag": tag, "total": total})
            for chunk in reply.iter_content(2**20):
                bar.update(out.write(chunk))
    if total and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size:,} of {total:,} bytes came")


def check_sum(url, part, sha256):
    if sha256:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise UserError(f"what came from {url} is not the known file (SHA-256 {found}); run again to fetch it anew")


# --- the embedded corpus


def folk_members(cfg):
    """The folk tunes bundled with music21, as MIDI files made here: whole books crash abc2midi, single tunes do not."""
    corpus = Path(importlib.util.find_spec("music21").origin).parent / "corpus"  # importing music21 takes seconds
    tunes = {}
    for book in sorted(path for folder in FOLK_BOOKS for path in (corpus / folder).glob("*.abc")):
        for tune in re.split(rb"^(?=X:)", book.read_bytes(), flags=re.M)[1:]:
            number = int(re.match(rb"X:\s*(\d+)", tune)[1])
            tunes[f"{book.parent.name}/{book.stem}_{number:04d}.mid"] = tune
    names = heapq.nsmallest(cfg.MAX_MIDI_FILES or len(tunes), tunes, key=rank)
    for name in tunes.keys() - set(names):
        yield name, functools.partial(midi_or_skip, b"", "over MAX_MIDI_FILES")
    with abc2midi_program() as program, ThreadPool(cfg.workers) as pool:
        made = pool.imap(lambda name: run_abc2midi(program, tunes[name]), names)
        for name, (midi, reason) in zip(names, tqdm(made, "extract", len(names), unit="tune", disable=None), strict=True):
            yield name, functools.partial(midi_or_skip, midi, reason)


def midi_or_skip(midi, reason):
    if reason:
        raise Skip(reason)
    return midi


@contextlib.contextmanager
def abc2midi_program():
    """A private copy of the abc2midi in symusic, where it lacks the run bit."""
    bundled = Path(importlib.util.find_spec("symusic").origin).parent / "bin"
    with tempfile.TemporaryDirectory(prefix="abc2midi") as folder:
        program = Path(shutil.copy(next(bundled.glob("abc2midi*")), folder))
        program.chmod(0o700)
        yield program


def run_abc2midi(program, abc, timeout_s=20):
    """(bytes of a MIDI file, "") for the bytes of one tune, or (b"", why there is none)."""
    handle, midi = tempfile.mkstemp(".mid", dir=program.parent)
    os.close(handle)
    try:
        done = subprocess.run([program, "-", "-o", midi], input=abc, capture_output=True, timeout=timeout_s)
        return (Path(midi).read_bytes(), "") if done.returncode == 0 else (b"", "abc2midi failed")
    except subprocess.TimeoutExpired:
        return b"", "abc2midi timed out"
    except OSError as error:
        raise UserError(f"can't run abc2midi ({error}); set TMPDIR to a folder that allows programs") from error
    finally:
        os.unlink(midi)


# --- the stage


def write_members(members, cfg):
    """Writes the MIDI files among `members` below midi_root; returns the books of it.

    Memory holds names only. Files are written under their final names with no fsync: a file that a killed run left half
    written is in no index, and the next run sees that its bytes differ and writes it again.
    """
    root, limit = prepare_root(cfg.midi_root), cfg.MAX_MIDI_FILES or MAX_MEMBERS
    seen, total, skipped, taken, folders = 0, 0, Counter(), Counter(), set()
    kept = []  # a heap with the highest rank on top: an archive that is read once shows only at its end which to keep
    for name, read in members:
        seen += 1
        need(seen <= MAX_MEMBERS, f"the archive has more than {MAX_MEMBERS:,} members")
        try:
            path = portable_path(check_name(name), taken)
            if len(kept) == limit and rank(path) > -kept[0][0]:
                raise Skip("over MAX_MIDI_FILES")
            data = read()
            check_size(len(data))
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        total += len(data)
        need(total <= MAX_TOTAL_BYTES, f"the archive holds more than {MAX_TOTAL_BYTES:,} bytes of MIDI files")
        new = store(root, path, data, folders)
        heapq.heappush(kept, (-rank(path), path, new))
        if len(kept) > limit:
            _, path, new = heapq.heappop(kept)
            skipped["over MAX_MIDI_FILES"] += 1
            if new:
                Path(root, path).unlink()
    return {"files": sorted(path for _, path, _ in kept), "skipped": dict(skipped), "seen": seen}


def check_size(size):
    if not 0 < size <= MAX_FILE_BYTES:
        raise Skip(f"larger than {MAX_FILE_BYTES >> 20} MiB" if size else "empty")


def prepare_root(root):
    """Makes the folder for extracted files and marks it, so that no file in it is replaced that came from elsewhere."""
    marker = root / ".extracted_by_LakhMIDI"
    need(not root.exists() or marker.exists() or not any(root.iterdir()),
         f"{root} holds files from elsewhere; set MIDI_ROOT to an empty folder, or read them with USE_LOCAL_MIDI")
    root.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return root


def store(root, path, data, folders):
    """Writes a file below `root` unless it is there already; returns whether it wrote. `folders`: those found safe."""
    target = root / path
    try:
        if target.parent not in folders:
            need(Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(root)),
                 f"{target.parent} is a link that leads out of {root}; remove it")
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
        if os.path.lexists(target):
            found = target.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_size == len(data) and target.read_bytes() == data:
                return False
            target.unlink()
        need(shutil.disk_usage(root).free > SPARE_BYTES + len(data), f"the disk of {root} is full")
        with open(target, "xb") as out:  # x: never through a link, never into a file that has a second name elsewhere
            out.write(data)
        return True
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror}") from error


def walk(root):
    """(relative POSIX path, path) of everything in a folder but folders, in a fixed order; links are not followed."""
    for base, folders, files in os.walk(root):
        folders.sort()
        for path in (os.path.join(base, file) for file in sorted(files)):
            yield Path(os.path.relpath(path, root)).as_posix(), path


def index_folder(cfg):
    """The books of LOCAL_MIDI_ROOT, which is only read. Raises UserError where results would be written into it."""
    root = Path(cfg.LOCAL_MIDI_ROOT)
    for knob in ("DATA_ROOT", "SAVE_DIR"):
        need(not Path(os.path.abspath(getattr(cfg, knob))).is_relative_to(os.path.abspath(root)),
             f"{knob} is inside LOCAL_MIDI_ROOT, where nothing is written; move one of them")
    files, seen, skipped = [], 0, Counter()
    for name, path in walk(root):
        seen += 1
        try:
            check_name(name)
            if not os.path.isfile(path):
                raise Skip("link or device")
            check_size(os.path.getsize(path))
            files.append(name)
        except Skip as reason:
            skipped[str(reason)] += 1
    if cfg.MAX_MIDI_FILES and len(files) > cfg.MAX_MIDI_FILES:
        skipped["over MAX_MIDI_FILES"] = len(files) - cfg.MAX_MIDI_FILES
        files = heapq.nsmallest(cfg.MAX_MIDI_FILES, files, key=rank)
    return {"files": sorted(files), "skipped": dict(skipped), "seen": seen}


def write_source(cfg):
    """The books of whatever source is not a folder. Raises UserError for an archive that can't be read to its end."""
    path = cfg.LMD_ZIP_PATH
    if cfg.LMD_DOWNLOAD:
        name, checksum = LAKH[cfg.LMD_DOWNLOAD]
        path = download(LAKH_URL + name, Path(cfg.DATA_ROOT, "downloads", name), sha256=checksum)
    if not path:
        return write_members(folk_members(cfg), cfg)
    try:
        return write_members(open_archive(path), cfg)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, OverflowError,
            RecursionError, UnicodeError) as error:
        raise UserError(f"{path} is no ZIP or tar archive, or is cut off or damaged ({error})") from error


@stage(version=1, knobs="source MAX_MIDI_FILES MIDI_ROOT")
def extract(cfg):
    """Puts the MIDI files of the source in midi_root, or leaves them where they are; the index says which to use."""
    index, source = Path(cfg.DATA_ROOT, "midi_index.json"), source_id(cfg)
    index.unlink(missing_ok=True)
    books = index_folder(cfg) if cfg.USE_LOCAL_MIDI else write_source(cfg)
    assert books["seen"] == len(books["files"]) + sum(books["skipped"].values()), books["skipped"]
    need(books["files"], f"no MIDI files in {cfg.LMD_ZIP_PATH or cfg.midi_root}; skipped: {books['skipped'] or 'nothing'}")
    say(f"extract   {len(books['files']):,} of {books['seen']:,} files are MIDI files to use; skipped: {books['skipped'] or 'none'}")
    write_json(index, {"source": source, "root": str(cfg.midi_root), **books})
    return [index] if cfg.USE_LOCAL_MIDI else [index, cfg.midi_root]


# ============================================================================================================
# 4 Convert: data_lakh/midi/ -> data_lakh/abc/, report.jsonl
# ============================================================================================================
# The pure functions. Times are integer ticks of 1/48 quarter note: 1/16 beat = 3, 1/8 beat = 6, 1/6 beat (triplets) = 8.

BEAT = 48  # ticks per quarter note ("beat" everywhere below, whatever the metre says)
LETTERS = "CDEFGAB"
NATURAL = (0, 2, 4, 5, 7, 9, 11)  # semitones of C D E F G A B
MARKS = {-2: "__", -1: "_", 0: "=", 1: "^", 2: "^^"}
KEYS = ("Db", "Ab", "Eb", "Bb", "F", "C", "G", "D", "A", "E", "B", "F#")  # signatures -5 ... 6
MINOR = ("Bbm", "Fm", "Cm", "Gm", "Dm", "Am", "Em", "Bm", "F#m", "C#m", "G#m", "D#m")
DRUM_KEY = "G"  # every drum voice: its one sharp is the closed hi-hat, the most frequent drum
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
    """symusic score -> (Notes in beats as written, [(program, is_drum)]), one voice per track, channel and program."""
    tracks = [track for track in score.tracks if len(track.notes)]
    if not tracks:
        return Notes(*(np.zeros(0, int),) * 4), []
    arrays = [track.notes.numpy() for track in tracks]
    voice = np.repeat(np.arange(len(arrays)), [len(a["time"]) for a in arrays])
    onset, duration, pitch = (np.concatenate([a[name] for a in arrays]) for name in ("time", "duration", "pitch"))
    notes = Notes(voice, onset / score.tpq, duration / score.tpq, pitch.astype(int))
    return notes, [(track.program, bool(track.is_drum)) for track in tracks]


def merge_duplicates(notes):
    """Notes sorted by voice, pitch and onset; of those equal in all three (one in nine on the web) the longest."""
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
    for start, stop in zip(times, times[1:] + [end]):
        num, den = changes[start]
        length = 4 * BEAT * num // den
        bars = list(range(start, max(stop, start + 1), length))
        metres[len(starts)] = (num, den)
        starts += bars
        last = bars[-1]
        if stop < last + length and stop != end:  # a change inside a bar: the bar is cut, with a metre of its own
            num, den = (stop - last) // 6, 32
            while num % 2 == 0 and den > 4:
                num, den = num // 2, den // 2
            metres[len(starts) - 1] = (num, den)
    return np.array(starts + [last + length]), metres


def bar_tempos(score, bars):
    """Mean quarter notes per minute of each bar, shape (B,): what fills it in as many seconds as the file does."""
    tempos = sorted((t.time / score.tpq * BEAT, t.mspq) for t in score.tempos)
    ticks = np.array([0.0] + [t for t, _ in tempos])
    per_tick = np.array([500_000] + [max(1, us) for _, us in tempos]) / BEAT / 1e6  # seconds per tick after each change
    seconds = np.concatenate([[0], np.cumsum(np.diff(ticks) * per_tick[:-1])])
    segment = np.searchsorted(ticks, bars, "right") - 1
    at_bars = seconds[segment] + (bars - ticks[segment]) * per_tick[segment]
    return 60 * np.diff(bars) / BEAT / np.diff(at_bars), at_bars[-1]


# --- quantising

def choose_grid(onset, key):
    """Step in ticks for a file, and whether some of its beats are triplets. `onset` is sorted within equal `key`."""
    same = key[1:] == key[:-1]
    merged = [np.count_nonzero(same & (np.diff(np.rint(onset * n)) == 0)) for n in (8, 16)]
    step = 3 if merged[0] - merged[1] > 0.002 * len(onset) else 6
    on8 = np.abs(onset * 8 - np.rint(onset * 8)) < 0.16  # within 1/50 beat of the grid
    on6 = np.abs(onset * 6 - np.rint(onset * 6)) < 0.12
    return step, np.mean(on8 | on6) > 0.9 and np.mean(on6 & ~on8) > 0.01


def triplet_beats(notes, n_beats, step):
    """Which beats of which voice lie nearer to the 1/6 grid than to the 1/8 grid: bool, shape (voices, n_beats)."""
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
    """Ends move to an onset of the voice, else to a bar line, if the length stays within 1/8 beat or 20 % of `duration`."""
    slack = np.maximum(BEAT / 8, duration / 5) + 1e-6
    span = bars[-1] + 10_000
    onsets = np.append(np.unique(voice * span + start), 2**60)
    after = np.searchsorted(onsets, voice * span + end)
    for target in (np.rint(end / 12).astype(int) * 12, bars[np.searchsorted(bars, end - BEAT // 8)], onsets[after - 1] - voice * span,
                   onsets[after] - voice * span):
        fits = (np.abs(target - start - duration) <= slack) & (target > start)
        end = np.where(fits, target, end)
    return end


def grid_notes(notes, bars, step, triplet):
    """Notes sorted by (voice, pitch, onset) -> (voice, pitch, start, end), ticks; one note at a time per pitch."""
    key = notes.voice * 128 + notes.pitch
    start = quantise(notes.onset, notes.voice, step, triplet)
    if step == 3:  # a second stroke within one step of the fine grid moves to the next, still within 1/8 beat
        again = np.append(False, (np.diff(key) == 0) & (np.diff(start) == 0))
        start = start + step * (again & (start % step == 0))
    end = np.maximum(quantise(notes.onset + notes.duration, notes.voice, step, triplet), start + step)
    first = np.flatnonzero(np.append(True, (np.diff(key) != 0) | (np.diff(start) != 0)))  # merge what fell together
    end, duration = np.maximum.reduceat(end, first), np.maximum.reduceat(notes.duration, first) * BEAT
    voice, pitch, start, key = notes.voice[first], notes.pitch[first], start[first], key[first]
    end = snap_ends(voice, start, end, duration, bars)
    struck = np.append(np.where(np.diff(key) == 0, start[1:], 2**60), 2**60)
    if triplet is not None:  # a shortest note may have left the 1/6 grid
        end = np.where(triplet[voice, (end - 1) // BEAT], -(-end // 8) * 8, end)
    return voice, pitch, start, np.minimum(end, struck)


# --- writing

def choose_key(pitch):
    """Pitches -> index into KEYS of the signature with the fewest accidentals, and its name (major or minor)."""
    count = np.bincount(pitch % 12, minlength=12).astype(float)
    scale = np.array([[(7 * s + n) % 12 for n in NATURAL] for s in range(-5, 7)])
    best = max(range(12), key=lambda k: (count[scale[k]].sum(), -abs(k - 5)))
    tonic = 7 * (best - 5) % 12
    major = np.dot(np.roll(MAJOR_PROFILE, tonic), count) / np.linalg.norm(MAJOR_PROFILE)
    minor = np.dot(np.roll(MINOR_PROFILE, tonic + 9), count) / np.linalg.norm(MINOR_PROFILE)
    return best, (MINOR if minor > major else KEYS)[best]


@functools.lru_cache(maxsize=None)
def spelling(key, octave):
    """All 128 pitches in a key: (names, names with an explicit mark, letter, whether it differs from the key)."""
    sharps = key - 5
    low = min(max(sharps - 3, -8), 1)  # the twelve names in a row on the line of fifths, F flat to B sharp
    names, marked, letters, foreign = [], [], [], []
    for pitch in range(128):
        fifth = next(f for f in range(low, low + 12) if 7 * f % 12 == pitch % 12)
        alter = (fifth + 1) // 7
        letter = 4 * fifth % 7
        height = (pitch - alter) // 12 - 5 - octave  # 0 = the octave of middle C
        name = LETTERS[letter] + "," * -height if height <= 0 else LETTERS[letter].lower() + "'" * (height - 1)
        away = alter != (sharps + 5 - 2 * letter % 7) // 7
        away = not sharps - 1 <= fifth <= sharps + 5
        names.append(MARKS[alter] + name if away else name)
        marked.append(MARKS[alter] + name)
        letters.append(letter)
        foreign.append(away)
    return names + marked, np.array(letters), np.array(foreign)


def length_text(ticks, unit):
    """A length as ABC writes it: '' for the unit, '3', '/', '3/', '/4', '3/4'."""
    divisor = np.gcd(ticks, unit)
    num, den = ticks // divisor, unit // divisor
    return (str(num) if num > 1 else "") + {1: "", 2: "/"}.get(den, f"/{den}")


def choose_unit(lengths):
    """Lengths in ticks -> (denominator of the L: field that makes the text shortest, {length: its text})."""
    lengths, counts = np.unique(lengths, return_counts=True)
    options = []
    for den in (4, 8, 16, 32):
        texts = [length_text(ticks, 4 * BEAT // den) for ticks in lengths.tolist()]
        options.append((sum(len(t) * n for t, n in zip(texts, counts.tolist())), den, texts))
    _, den, texts = min(options)
    return den, dict(zip(lengths.tolist(), texts))


def split_at(cut, pieces, start, end):
    """Pieces (index, start, end) strictly around their `cut` become two."""
    hit = (start < cut) & (cut < end)
    return (np.concatenate([pieces, pieces[hit]]), np.concatenate([start, cut[hit]]),
            np.concatenate([np.where(hit, cut, end), end[hit]])) if hit.any() else (pieces, start, end)


def split_triplets(index, voice, start, end, triplet):
    """Cut whatever enters or leaves a triplet beat half-way at the border of that beat."""
    for edge, side in ((start, 1), (end, -1)):
        pass
    inside = triplet[voice[index], start // BEAT] & (start % BEAT != 0)
    index, start, end = split_at(np.where(inside, -(-start // BEAT) * BEAT, start), index, start, end)
    inside = triplet[voice[index], (end - 1) // BEAT] & (end % BEAT != 0)
    return split_at(np.where(inside, end // BEAT * BEAT, start), index, start, end)


def assign_layers(group, start, end):
    """Layer of each event: events of a group (one voice in one bar) that overlap get different layers."""
    layer = np.zeros(len(group), int)
    clash = (group[1:] == group[:-1]) & (start[1:] < np.maximum(end[:-1], 0))
    todo = np.unique(group[1:][clash])
    lows, highs = np.searchsorted(group, todo), np.searchsorted(group, todo, "right")
    for low, high in zip(lows.tolist(), highs.tolist()):
        ends, chosen = [], []
        for s, e in zip(start[low:high].tolist(), end[low:high].tolist()):
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


def make_events(voice, pitch, start, end, bars, triplet):
    """Quantised notes -> pieces within bars, grouped into chords and layers.

    Returns (order of pieces, tie per piece, first piece and size of each chord, its bar, voice, layer, start, end).
    """
    first, last = np.searchsorted(bars, start, "right") - 1, np.searchsorted(bars, end) - 1
    index = np.repeat(np.arange(len(start)), last - first + 1)
    bar = np.repeat(first - np.append(0, np.cumsum(last - first + 1)[:-1]), last - first + 1) + np.arange(len(index))
    low, high = np.maximum(start[index], bars[bar]), np.minimum(end[index], bars[bar + 1])
    if triplet is not None:
        index, low, high = split_triplets(index, voice, low, high, triplet)
        bar = np.searchsorted(bars, low, "right") - 1
    n_voices, span = voice.max() + 1, np.diff(bars).max() + 1
    group = bar * n_voices + voice[index]
    slot = (group * span + low - bars[bar]) * span + high - bars[bar]
    order = np.argsort(slot * 128 + pitch[index])
    slot, index = slot[order], index[order]
    heads = np.flatnonzero(np.append(True, np.diff(slot) != 0))
    size = np.diff(np.append(heads, len(slot)))
    group, low, high = group[order], low[order], high[order]
    layer = assign_layers(group[heads], low[heads], high[heads])
    return index, end[index] > high, group, heads, size, layer, low[heads], high[heads]


def add_rests(line, low, high, bar_start, bar_end):
    """Events sorted by line (bar, voice, layer) and start -> the rests between them: (line, low, high)."""
    head = np.append(True, line[1:] != line[:-1])
    tail = np.append(head[1:], True)
    before = np.where(head, bar_start, np.append(0, high[:-1]))
    gap, close = before < low, tail & (high < bar_end)
    return (np.concatenate([line[gap], line[close]]), np.concatenate([before[gap], high[close]]),
            np.concatenate([low[gap], bar_end[close]]))


def write_body(notes, bars, sharps, octaves, drums, triplet, fields):
    """Quantised notes -> (L denominator, body text)."""
    voice, pitch, start, end = notes
    index, tied, group, heads, size, layer, low, high = make_events(voice, pitch, start, end, bars, triplet)
    n_voices = len(octaves)
    # names: a mark is written wherever the bar holds the letter in two forms, so that no reader needs a memory
    tables = [spelling(6 if drum else sharps, octave) for octave, drum in zip(octaves, drums)]
    letters, foreign = np.array([t[1] for t in tables]), np.array([t[2] for t in tables])
    v, p = voice[index], pitch[index]
    slot, away = group * 7 + letters[v, p], foreign[v, p]
    both = np.zeros(slot.max() + 1, bool)
    both[slot[away]] = True
    names = [tables[i][0][j] for i, j in zip(v.tolist(), (p + 128 * (both[slot] & ~away)).tolist())]
    n_tied = np.add.reduceat(tied.astype(int), heads)
    texts = chord_texts(names, tied.tolist(), heads.tolist(), size.tolist(), n_tied.tolist())
    # lines: one for each layer of each voice in each bar
    n_layers = layer.max() + 1
    line = group[heads] * n_layers + layer
    bar = line // (n_layers * n_voices)
    order = np.argsort(line * (bars[-1] + 1) + low)
    line, low, high, bar = line[order], low[order], high[order], bar[order]
    rests = add_rests(line, low, high, bars[bar], bars[bar + 1])
    if triplet is not None:
        rest_index, rest_low, rest_high = split_triplets(
            np.arange(len(rests[0])), rests[0] // n_layers % n_voices, rests[1], rests[2], triplet)
        rests = rests[0][rest_index], rest_low, rest_high
    item = np.concatenate([order, np.full(len(rests[0]), len(texts))])
    line, low, high = (np.concatenate(pair) for pair in zip((line, low, high), rests))
    order = np.argsort(line * (bars[-1] + 1) + low)
    item, line, low, high = item[order], line[order], low[order], high[order]
    texts.append("z")
    ties = np.append(n_tied == size, False)[item]
    length = high - low
    prefix = None
    if triplet is not None:
        length, prefix = write_tuplets(line, low, high)
    den, lengths = choose_unit(length)
    tokens = [texts[i] + lengths[d] for i, d in zip(item.tolist(), length.tolist())]
    for i in np.flatnonzero(ties).tolist():
        tokens[i] += "-"
    if prefix:
        for i, text in prefix:
            tokens[i] = text + tokens[i]
    return den, join_lines(tokens, line, n_layers, n_voices, len(bars) - 1, fields)


def chord_texts(names, tied, heads, size, n_tied):
    """Names of the pieces -> one text per chord, without its length; a tie inside it where only some notes are tied."""
    texts = []
    for i, n, t in zip(heads, size, n_tied):
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
    return length, [(i, "(3" if n == 3 else f"(3::{n}") for i, n in zip(firsts.tolist(), counts.tolist())]


def join_lines(tokens, line, n_layers, n_voices, n_bars, fields):
    """Tokens -> body: one line per bar, [V:n]layer&layer| for the voices that sound in it, Zn for bars they missed."""
    heads = np.flatnonzero(np.append(True, np.diff(line) != 0))
    due = [0] * n_voices  # the next bar that each voice has to write
    now = -1  # the bar of the line being written
    out = []
    for i, number in zip(heads.tolist(), line[heads].tolist()):
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
    """Lines for the bars in which nobody plays: the first voice rests, a new line at every change of metre or tempo."""
    out = ""
    while begin < end:
        stop = min([bar for bar in fields if begin < bar < end], default=end)
        missed = f"Z{begin - due[0]}|" if due[0] < begin else ""
        out += f"\n{fields.get(begin, '')}[V:1]{missed}Z{stop - begin}|"
        begin = due[0] = stop
    return out


def header_fields(metres, tempos):
    """Metres {bar: (num, den)} and tempos per bar -> texts {bar: '[M:3/4][Q:1/4=90]'} where something changes."""
    fields = {}
    metre, tempo = None, 1e-9
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


def write_header(voices, octaves, den, key, fields):
    lines = ["X:1", f"L:1/{den}", *re.findall(r"(?<=\[)[^]]*", fields.pop(0)), f"K:{key}"]
    for number, ((program, drum), octave) in enumerate(zip(voices, octaves), 1):
        lines.append(f"V:{number}" + (f" octave={octave}" if octave else ""))
        if program or not drum:
            lines.append(f"%%MIDI program {program}")
        if drum:
            lines += ["%%MIDI channel 10", f"K:{DRUM_KEY}"]
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
    bars, metres = bar_lines(score, int((length + 1) * BEAT))
    step, swing = choose_grid(notes.onset, notes.voice * 128 + notes.pitch)
    triplet = triplet_beats(notes, bars[-1] // BEAT + 2, step) if swing else None
    if swing:
        triplet[:, bars[bars % BEAT != 0] // BEAT] = False  # a bar line inside
    voice, pitch, start, end = grid_notes(notes, bars, step, triplet)
    tempos, seconds = bar_tempos(score, bars)
    drums = np.array([drum for _, drum in voices])
    tonal = pitch[~drums[voice]]
    sharps, key = choose_key(tonal)
    octaves = choose_octaves(voice, pitch, len(voices))
    fields = header_fields(metres, tempos)
    header = dict(fields)
    fields.pop(0)
    den, body = write_body((voice, pitch, start, end), bars, sharps, octaves, drums, triplet, fields)
    abc = write_header(voices, octaves, den, key, header) + body
    if len(abc) > cfg.MAX_ABC_CHARS:
        raise Rejected("too_many_chars", f"{len(abc)}")
    return {"abc": abc, "n_bars": len(bars) - 1, "seconds": float(seconds)}


def midi_to_abc(source, cfg):
    score = read_score(source)
    notes, voices = score_notes(score)
    return score_to_abc(score, notes, voices, cfg)["abc"]


# --- reading ABC back

TOKEN = re.compile(r"(\[[^]]*\]?|[_^=]{0,2}[A-Ga-g][,']*|[zx])(\d*/*\d*)(-?)|\((\d)(?::(\d*))?(?::(\d*))?|(\S)")
NOTE = re.compile(r"([_^=]{0,2})([A-Ga-g])([,']*)(\d*/*\d*)(-?)")
FIELD = re.compile(r"\[([A-Za-z]):([^]]*)\]")
ORNAMENT = re.compile(r"\"[^\"]*\"|![^!]*!|\{[^}]*\}|\[\d|(?<=[|:])\d|[:~.`\\]|%.*")  # in other people's ABC
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


@functools.lru_cache(maxsize=65536)
def chord_value(text, sharps, octave):
    """'^c,' or '[CE-G]' -> (pitches, whether each is tied, the length its first note has inside the brackets)."""
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
    """'D', 'Bm', 'A dorian' ... -> sharps (flats negative), or None."""
    match = re.match(r"\s*([A-G])([#b]?)\s*([A-Za-z]{0,3})", text)
    if not match:
        return None
    letter, accidental, mode = match.groups()
    sharps = "FCGDAEB".index(letter) - 1 + {"#": 7, "b": -7, "": 0}[accidental] + MODES.get(mode.lower(), 0)
    return min(7, max(-7, sharps))



def read_field(state, letter, value, report):
    """Apply one information field to the reader's state."""
    fraction = re.match(r"\s*(\d+)/(\d+)\s*(?:=\s*(\d+))?", value)
    num, den, per_minute = (whole(x, 0) for x in fraction.groups()) if fraction else (0, 0, 0)
    if letter == "L" and num and den:
        state["unit"] = 4 * num / den
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
        voices[state["now"]] = {"index": len(voices), "program": 0, "drum": False, "octave": 0,
                                "sharps": key_sharps(state["key"]), "bars": 0, "clock": 0.0}
    return voices[state["now"]]


def read_directive(state, line):
    """%%MIDI program n, %%MIDI channel 10."""
    words = line.split()
    if len(words) > 2 and words[1] == "program":
        current_voice(state)["program"] = whole(words[-1], 0, 127)
    elif words[1:3] == ["channel", "10"]:
        current_voice(state)["drum"] = True


def read_layer(music, voice, unit, report):
    """One layer of one bar -> notes [(position, length, pitch, tied)] and the length of the layer, in beats."""
    notes, position, left, factor = [], 0.0, 0, 1.0
    for text, length, tie, p, q, r, _ in TOKEN.findall(music):
        if text:
            beats = unit * length_value(length) if length else unit
            if left:
                left, beats = left - 1, beats * factor
            pitches, ties, inner = chord_value(text, voice["sharps"], voice["octave"])
            beats *= inner
            for pitch, tied in zip(pitches, ties):
                notes.append((position, beats, pitch, tied or tie == "-"))
            position += beats
            if text[0] == "[" and text[-1] != "]":
                report("open_bracket")
        elif p:
            factor, left = (whole(q, 0) or TUPLETS.get(int(p), 2)) / (int(p) or 1), whole(r, 0) or int(p)
        else:
            report("bad_char")
    if left:
        report("open_tuplet")
    return notes, position


def read_music(state, music, report):
    """The bars of the current voice in one line, appended to state["rows"]; returns how many bars of the line it fills.

    With inline voices every line is one bar or more of all voices, so an error does not outlive its line.
    """
    voice, full, tagged = current_voice(state), state["metre"], state["tagged"]
    bars = music.split("|")
    if not bars[-1].strip():
        bars.pop()
    elif tagged:
        report("no_bar_line")
    count = 0
    for i, bar in enumerate(bars):
        silent = re.fullmatch(r"\s*Z(\d*)\s*", bar)
        if silent and tagged and not i and len(bars) > 1:  # Zn before music: the bars this voice has missed
            voice["bars"] += whole(silent[1])
            continue
        if tagged and not i + count or (tagged and i == 1 and not count):
            pass
        if silent:
            count += whole(silent[1])
            voice["clock"] += full * whole(silent[1])
            continue
        start = state["clock"] + count * full if tagged else voice["clock"]
        longest = 0.0
        for layer in bar.split("&"):
            notes, length = read_layer(layer, voice, state["unit"], report)
            for position, beats, pitch, tied in notes:
                if tagged:  # what hangs over the bar line is cut off
                    beats = min(beats, full - position)
                if beats > 0:
                    state["rows"].append((voice["index"], start + position, beats, pitch, tied, state["line"]))
            longest = max(longest, length)
            if abs(length - full) > 1e-6:
                report("bar_length")
        count += 1
        voice["clock"] += longest
    return count


def merge_ties(rows, report):
    """Rows (voice, onset, duration, pitch, tied, line) -> Notes sorted by voice, onset and pitch, ties merged."""
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
    problems = []
    state = {"unit": 0.5, "metre": 4.0, "clock": 0.0, "key": "", "now": "1", "line": 0, "voices": {}, "rows": [],
             "tempos": [], "metres": [], "tagged": "[V:" in text}

    def report(slug, line=None):
        problems.append((state["line"] if line is None else line, slug))

    n_bars = 0
    for state["line"], line in enumerate(text.splitlines(), 1):
        if line.startswith("%%MIDI"):
            read_directive(state, line)
        elif line[1:2] == ":" and line[0].isalpha():
            read_field(state, line[0], line[2:], report)
        elif line.strip() and line[0] != "%":
            n_bars += read_line(state, line, report)
    if not state["key"]:
        report("no_header", 0)
    voices = [(v["program"], v["drum"]) for v in state["voices"].values()]
    notes = merge_ties(state["rows"], report)
    return Tune(notes, voices, state["key"], state["tempos"], state["metres"], n_bars, problems)


def read_line(state, line, report):
    """One line of music; returns the bars it fills and moves the clock of a tune with inline voices past them."""
    parts = FIELD.split(line if state["tagged"] else ORNAMENT.sub("", line))
    counts = [0]
    for i in range(0, len(parts), 3):
        if parts[i].strip():
            counts.append(read_music(state, parts[i], report))
        if i + 1 < len(parts):
            read_field(state, parts[i + 1], parts[i + 2], report)
    if state["tagged"]:
        state["clock"] += max(counts) * state["metre"]
    else:
        state["clock"] = current_voice(state)["clock"]
    return max(counts)


def abc_to_midi(text):
    """ABC text -> bytes of a Standard MIDI File, one track per voice. Never raises on any string."""
    tune = read_abc(text)
    score = symusic.Score(480)
    notes = tune.notes
    keep = notes.onset < 1e6  # MIDI counts ticks in 32 bits
    for index, (program, drum) in enumerate(tune.voices):
        mine = keep & (notes.voice == index)
        if not mine.any():
            continue
        onset = np.rint(notes.onset[mine] * 480).astype(np.int32)
        end = np.rint((notes.onset + notes.duration)[mine] * 480).astype(np.int32)
        track = symusic.Track(program=program, is_drum=drum, name="")
        track.notes = symusic.Note.from_numpy(onset, np.maximum(end - onset, 1), notes.pitch[mine].astype(np.int8),
                                              np.full(len(onset), 90, np.int8))
        score.tracks.append(track)
    for beat, qpm in tune.tempos or [(0, 120)]:
        score.tempos.append(symusic.Tempo(round(min(beat, 1e6) * 480), qpm=float(qpm)))
    for beat, num, den in tune.metres or [(0, 4, 4)]:
        score.time_signatures.append(symusic.TimeSignature(round(min(beat, 1e6) * 480), num, den))
    return score.dumps_midi()


# --- scoring

def note_f1(reference, candidate, onset_tolerance=1 / 8, durations=False):
    """F1 of notes matched by pitch and onset (and duration within 20 % or 1/8 beat); duplicates are merged first."""
    a, b = (sorted_notes(notes) for notes in (reference, candidate))
    i = j = hits = 0
    while i < len(a) and j < len(b):
        (pitch, onset, duration), other = a[i], b[j]
        if pitch != other[0]:
            i, j = (i + 1, j) if pitch < other[0] else (i, j + 1)
        elif abs(onset - other[1]) > onset_tolerance + 1e-6:
            i, j = (i + 1, j) if onset < other[1] else (i, j + 1)
        else:
            hits += not durations or abs(duration - other[2]) <= max(1 / 8, duration / 5) + 1e-6
            i, j = i + 1, j + 1
    return 2 * hits / (len(a) + len(b)) if len(a) + len(b) else 1.0


def sorted_notes(notes):
    """Rows (pitch, onset, duration) in this order, duplicates merged."""
    notes = merge_duplicates(notes)
    order = np.lexsort((notes.duration, notes.onset, notes.pitch))
    return list(zip(*(column[order].tolist() for column in (notes.pitch, notes.onset, notes.duration))))


def convert_one(data, cfg):
    """One MIDI file (bytes or path) -> its text, its round-trip score and its sizes, as a dict. Raises Rejected."""
    score = read_score(data)
    notes, voices = score_notes(score)
    row = score_to_abc(score, notes, voices, cfg)
    f1 = note_f1(notes, read_abc(row["abc"]).notes)
    return row | {"n_notes": len(notes.pitch), "n_chars": len(row["abc"]), "f1": f1, "n_tracks": len(voices)}


SHINGLE = 12  # melodic intervals per shingle
MIN_PITCHES = 5  # different pitches in a shingle; fewer is an accompaniment figure
NUM_PERM = 256  # MinHash values per file
MIN_JACCARD = 1 / 16  # estimated share of common shingles that makes two files one work ...
MIN_COMMON = 10  # ... and their estimated number: some 22 successive notes


def content_hash(notes):
    """128-bit hex digest of the notes as (drum?, onset, duration, pitch) on a grid of 1/48 beat from the first onset.

    Equal for the same notes in another order of tracks or spread over other tracks, doubled, under other
    instruments, names, tempi or ticks per beat; different once a note is transposed, moved or lengthened.
    """
    onset = np.rint(48 * (notes["onset"] - notes["onset"].min(initial=np.inf))).astype(np.int64)
    duration = np.rint(48 * notes["duration"]).clip(max=2**22 - 1).astype(np.int64)
    # Packed as 1 + 32 + 22 + 8 bits, because np.unique on rows takes ten times longer.
    packed = notes["is_drum"].astype(np.int64) << 62 | onset << 30 | duration << 8 | notes["pitch"]
    return hashlib.blake2b(np.unique(packed).astype("<i8").tobytes(), digest_size=16).hexdigest()


def melodic_shingles(notes):
    """(S,) uint32: hashes of the distinct runs of SHINGLE intervals between the top notes of each pitched track.

    Intervals forget the key, and rhythm is left out: a work transposed, re-orchestrated, written in halved
    values or played by hand keeps its shingles.
    """
    pitched = ~notes["is_drum"]
    tick = np.rint(480 * notes["onset"][pitched]).astype(np.int64)
    # One sort of packed integers orders by track, onset and pitch, and is much faster than np.lexsort.
    packed = np.sort(notes["track"][pitched].astype(np.int64) << 40 | tick << 8 | notes["pitch"][pitched])
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


def fingerprint(notes):
    """(NUM_PERM,) uint32 MinHash of the melodic shingles (Broder 1997), all 2^32 - 1 where there are none."""
    sketch = MinHash(num_perm=NUM_PERM, hashfunc=int)
    shingles = melodic_shingles(notes)
    for start in range(0, len(shingles), 4096):  # bounds the (shingles, NUM_PERM) table of a huge file
        sketch.update_batch(shingles[start : start + 4096].tolist())
    return sketch.hashvalues


def similar_pairs(signatures):
    """(P, 2) rows i < j of (N, NUM_PERM) signatures that share MIN_JACCARD and MIN_COMMON shingles by estimate.

    Candidates are neighbours in the sorted order of any one column. Bands of two or more columns, as in
    MinHashLSH, miss re-arranged works, whose Jaccard similarity is about .08; and all pairs of one value would
    be billions for a common shingle, where neighbours are at most NUM_PERM * N.
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
    """(N,) group ids for N files: the smallest content hash in the file's group, in whatever order files come.

    Files with equal hashes or similar signatures, and what a chain of such files connects, are one group. Files
    without melody (drums, a few notes) are grouped by their hash alone.
    """
    unique, which = np.unique(np.asarray(hashes), return_inverse=True)
    merged = np.full((len(unique), NUM_PERM), 2**32 - 1, np.uint32)
    np.minimum.at(merged, which, signatures)  # the MinHash of a union is the minimum of the MinHashes
    i, j = similar_pairs(merged).T
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(unique), len(unique)))
    _, component = connected_components(graph, directed=False)
    smallest = np.unique(component, return_index=True)[1]  # first in a component, because hashes are sorted
    return unique[smallest[component]][which]


def split_groups(group_ids, sizes_in_chars, val_frac, test_frac, seed):
    """(N,) 'train', 'val' or 'test' for N files: a group never crosses, fractions are of characters.

    Groups are drawn in the order of a hash of seed and id, which does not depend on the other files. A group
    larger than a held-out share comes last, and is trained on unless nothing else is there to hold out. From 3
    groups on, no side is empty.
    """
    ids, which = np.unique(np.asarray(group_ids), return_inverse=True)
    chars = np.bincount(which, weights=sizes_in_chars)
    digests = (hashlib.blake2b(f"{seed}:{g}".encode(), digest_size=6).digest() for g in ids)
    draw = np.array([int.from_bytes(d, "big") / 2.0**48 for d in digests])
    budgets = {"test": test_frac * chars.sum(), "val": val_frac * chars.sum()}
    order = np.argsort(np.where(chars > min(b for b in budgets.values()), 1 + chars, draw), kind="stable")
    side = np.full(len(ids), "train")
    for name, budget in budgets.items():
        if budget > 0 and len(order) > 1:
            taken = max(1, np.searchsorted(np.cumsum(chars[order]), budget, side="right"))
            side[order[:taken]], order = name, order[taken:]
    return side[which]


def leak_of_file_split(group_ids, sizes_in_chars, val_frac, test_frac):
    """Expected share of held-out files, and of their characters, with one of their group in training, had files
    been split one by one: a file in a group of g is safe only if the other g - 1 are held out too.
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


def describe(row, data):
    notes, voices = score_notes(read_score(data))
    d = {"track": notes.voice, "onset": notes.onset, "duration": notes.duration, "pitch": notes.pitch,
         "is_drum": np.array([drum for _, drum in voices])[notes.voice]}
    return row | {"seconds": float(notes.onset.max()) / 2, "hash": content_hash(d), "signature": fingerprint(d).tobytes().hex()}


def convert_file(source, target, cfg):
    """In a worker: converts one MIDI file to `target`; returns its row of report.jsonl, a reject with its reason."""
    try:
        data = Path(source).read_bytes()
        row = describe(convert_one(data, cfg), data)
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
            tqdm(total=len(files), initial=len(rows), desc="convert", unit="file", disable=None) as bar:
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
    for tune in tqdm(tunes, "vocabulary", unit="tune", disable=None, leave=False):
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
        for tune in tqdm(tunes, split, unit="tune", disable=None, leave=False):
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
    bar.update(trainer.model.flops_per_token() * trainer.trained)
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
    flops = trainer.model.flops_per_token() * cfg.batch_tokens
    log = run.path("log", cfg)
    log.parent.mkdir(parents=True, exist_ok=True)
    began = saved = time.monotonic()
    while trainer.step < stop:
        share = lr_scale(trainer.step + 1, end, cfg)
        loss = trainer.train_step(share)
        bar.update(flops)
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
        bar.set_postfix_str(f"{run.name} loss {loss:.3f} {trainer.trained / trainer.seconds:,.0f} char/s")
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
    models = [build_model(run.size, len(vocab.chars), cfg) for run in runs]
    total = sum(model.flops_per_token() for model in models) * steps_with_branches(cfg) * cfg.batch_tokens
    bar_format = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=total, desc="train", bar_format=bar_format, disable=None) as bar:
        for run, model in zip(runs, models, strict=True):
            record = read_json(run.path("record", cfg), {})
            if record.get("recipe") == run_recipe(run, cfg) and run.path("model", cfg).exists():
                bar.update(model.flops_per_token() * steps_with_branches(cfg) * cfg.batch_tokens)
                continue
            train_model(run, vocab, cfg, bar)
            row = read_json(run.path("record", cfg))["rows"][-1]
            say(f"  {run.name:12s} {row['n_fit']:>11,} parameters  validation loss {row['val_loss']:.4f} nats = "
                f"{row['val_bpc']:.4f} bits per character  {row['tokens_per_s']:>9,.0f} char/s {row['wall_s']:6.0f} s")
            write_results(runs, cfg)
    write_results(runs, cfg)
    save = Path(cfg.SAVE_DIR)
    return [save / "scaling_results.json", save / "training_curves.json", *(run.path("model", cfg) for run in runs)]


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


@stage(version=1, knobs="", after=train, root="SAVE_DIR")
def fit(cfg):
    return []

@stage(version=1, knobs="", after=fit, root="SAVE_DIR")
def evaluate(cfg):
    return []


@stage(version=1, knobs="", after=evaluate, root="SAVE_DIR")
def report(cfg):
    return []


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
    """Training time by the speed of a matrix product, of which the small models of a CPU and a GPU reach a third."""
    a = torch.randn(1024, 1024, device=cfg.device, dtype=amp_dtype(cfg))
    a @ a
    began = time.perf_counter()
    for _ in range(10):
        total = (a @ a).sum().item()  # .item() waits for the GPU
    rate = 10 * 2 * 1024**3 / (time.perf_counter() - began) / 3 + 0 * total
    flops = sum(build_model(run.size, 100, cfg).flops_per_token() for run in planned_runs(cfg))
    return flops * steps_with_branches(cfg) * cfg.batch_tokens / rate / 60


def run_stages(cfg, first="extract", last="report", force=False):
    """Runs the stages from `first` to `last`; returns whether any of them had something to do."""
    names = [stage.__name__ for stage in STAGES]
    chosen = STAGES[names.index(first):names.index(last) + 1]
    need(chosen, f"--from {first} comes after --to {last}")
    return any([stage(cfg, force) for stage in chosen])


def main(argv=None):
    """The command line; returns the exit code: 0 done, 1 failed, 2 a mistake in the command, 130 interrupted."""
    try:
        cfg, flags = parse_flags(argv)
        cfg.check()
        if flags.status:
            for one in STAGES:
                print(f"{one.__name__:9s} {one.status(cfg)}")
            return 0
        banner(cfg)
        if not run_stages(cfg, flags.only or flags.first, flags.only or flags.last, flags.force):
            say("nothing to do: every stage is up to date (--force runs them again)")
        say(f"report    {Path(cfg.SAVE_DIR, 'report.html')}")
    except UserError as mistake:
        print(f"LakhMIDI: {mistake}", file=sys.stderr)
        return 2
    except Diverged as failure:
        print(f"LakhMIDI: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nLakhMIDI: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
