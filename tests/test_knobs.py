"""The knobs: three ways to set them, every mistake told in one line with exit code 2."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from LakhMIDI import STUDIES, Cfg, UserError, knob_help, knob_names, main

ROOT = Path(__file__).parents[1]


def test_three_ways_to_set_a_knob(monkeypatch):
    assert Cfg(SEQ_LEN=128).SEQ_LEN == 128
    cfg = Cfg()
    cfg.SEQ_LEN = 64
    monkeypatch.setattr(Cfg, "SEQ_LEN", 32)
    assert Cfg().SEQ_LEN == 32 and cfg.SEQ_LEN == 64
    cfg.LR = 0.5
    assert cfg.SEQ_LEN == 64


def test_what_is_left_open_is_the_studys_also_when_that_is_set_later():
    cfg = Cfg(DEVICE="cpu", BATCH_TOKENS=512)
    assert (cfg.STUDY, cfg.SEQ_LEN, cfg.SAMPLES, cfg.MIDI_ROOT) == ("cpu", 256, 20, Path("data_lakh/midi"))
    twin = copy.copy(cfg)
    cfg.STUDY, cfg.DATA_ROOT = "smoke", "elsewhere"
    assert (cfg.SEQ_LEN, cfg.BATCH_TOKENS, cfg.MIDI_ROOT) == (64, 512, Path("elsewhere/midi"))
    assert cfg.MODELS == STUDIES["smoke"].ladder and (twin.STUDY, twin.SEQ_LEN) == ("cpu", 256)
    assert Cfg(MODELS=("gpt_8w", ["lstm", "x", 1, 5]), STUDY="smoke").MODELS[1].width == 5


@pytest.mark.parametrize("name, value", [
    ("SEQLEN", 256), ("SEQ_LEN", 2.5), ("SEQ_LEN", -1), ("SEQ_LEN", True), ("LR", "fast"), ("LR", np.nan),
    ("LMD_ZIP_PATH", 3), ("USE_LOCAL_MIDI", 1), ("BETAS", 0.9), ("DEVICE", "tpu"), ("SPLIT_BY", "luck")])
def test_nonsense_is_refused_where_it_is_written(name, value):
    for attempt in (lambda: Cfg(**{name: value}), lambda: setattr(Cfg, name, value),
                    lambda: setattr(Cfg(), name, value)):
        with pytest.raises(UserError, match="SEQ_LEN" if name == "SEQLEN" else name):  # its right name
            attempt()


@pytest.mark.parametrize("knobs", [
    {"STUDY": "huge"}, {"VAL_FRAC": 0.4, "TEST_FRAC": 0.4}, {"VAL_FRAC": 0.4}, {"MODELS": (("gpt", "x", 6),)},
    {"MODELS": (5,)}, {"MODELS": ("gpt_9T",)}, {"MODELS": (("gpt", "x", 1, 30, 4),)},
    {"MODELS": (("rnn", "x", 1, 30),)}, {"MODELS": ("gpt_1M", "gpt_1M")}, {"SEEDS": 0}, {"SEQ_LEN": 4},
    {"SEQ_LEN": 100, "BATCH_TOKENS": 150}, {"BUDGETS": (0.5,)}, {"BUDGETS": ()}, {"BUDGETS": (0, 1)},
    {"BETAS": ("a", "b")}, {"BETAS": (0.9, 1.0)}, {"TOP_P": 0.0}, {"SAVE_DIR": ""}])
def test_knobs_that_make_no_sense_together(knobs):
    with pytest.raises(UserError, match=r"\A.+\Z"):
        Cfg(**knobs).check()


@pytest.mark.parametrize("flags, words", [
    ("--SEQLEN 3", "did you mean --SEQ_LEN"), ("--SEQ_LEN x", "SEQ_LEN must be"), ("--SEQ_LEN -5", ">= 0"),
    ("--LMD_ZIP_PATH missing.zip", "no file"), ("--LMD_ZIP_PATH text.zip", "no ZIP or tar"),
    ("--LMD_ZIP_PATH empty", "LOCAL_MIDI_ROOT"), ("--DATASET thesesion", "did you mean thesession"),
    ("--DATASET text.zip", "tunes.csv"), ("--DATASET thesession --USE_LOCAL_MIDI True", "only one"),
    ("--LMD_DOWNLOAD lakh", "choose full, matched"), ("--LMD_DOWNLOAD full --LMD_ZIP_PATH x", "only one"),
    ("--USE_LOCAL_MIDI True --LOCAL_MIDI_ROOT empty", "no music"), ("--USE_LOCAL_MIDI True", "no folder"),
    ("--USE_LOCAL_MIDI True --LOCAL_MIDI_ROOT gone", "no folder"), ("--USE_LOCAL_MIDI 1", "True or False"),
    ("--LOCAL_MIDI_ROOT empty", "add --USE_LOCAL_MIDI True"), ("--only dance", "dance"),
    ("--only fit", "run with --to fit"),
    ("--from train --to convert", "comes after"), ("--STUDY huge", "smoke"), ("--SAVE_DIR=", "name a folder"),
    ("--sample 0", "at least 1"), ("--sample -2", "at least 1"), ("--valid", "--sample N"),
    ("--sample 1", "no trained model"), ("--plan 2h", "run the study first")])
def test_a_mistake_is_one_line_and_exit_code_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("this is no archive")
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("LakhMIDI: ") and error.count("\n") == 1 and words in error
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "manifests"]
    assert written == [tmp_path / "text.zip"]


def test_help_lists_every_knob_with_its_comment(capsys):
    assert set(knob_help()) == set(knob_names())
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, comment in knob_help().items():
        assert f"--{name} " in text and " ".join(comment.split()) in text


def test_importing_leaves_no_trace(tmp_path):
    done = subprocess.run([sys.executable, "-B", "-c", "import LakhMIDI"], cwd=tmp_path, capture_output=True,
                          env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""}, check=True)
    assert done.stdout == done.stderr == b""
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "matplotlib" not in str(path)]
