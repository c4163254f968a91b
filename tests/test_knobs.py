"""The knobs: three ways to set them, every mistake told in one line with exit code 2."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from LakhMIDI import STUDIES, Cfg, UserError, knob_help, knob_names, main, read_jsonl, write_jsonl

ROOT = Path(__file__).parents[1]


def test_three_ways_to_set_a_knob(monkeypatch):
    assert Cfg(SEQ_LEN=128).SEQ_LEN == 128
    cfg = Cfg()
    cfg.SEQ_LEN = 64
    monkeypatch.setattr(Cfg, "SEQ_LEN", 32)
    assert Cfg().SEQ_LEN == 32 and cfg.SEQ_LEN == 64


def test_what_is_left_open_is_the_studys_also_when_that_is_set_later():
    cfg = Cfg(DEVICE="cpu", BATCH_TOKENS=512)
    assert (cfg.STUDY, cfg.SEQ_LEN, cfg.SAMPLES, cfg.MIDI_ROOT) == ("cpu", 256, 20, Path("data_lakh/midi"))
    twin = copy.copy(cfg)
    cfg.STUDY, cfg.DATA_ROOT = "smoke", "elsewhere"
    assert (cfg.SEQ_LEN, cfg.BATCH_TOKENS, cfg.MIDI_ROOT) == (64, 512, Path("elsewhere/midi"))
    assert cfg.MODELS == STUDIES["smoke"].ladder and (twin.STUDY, twin.SEQ_LEN) == ("cpu", 256)
    assert Cfg(MODELS=("gpt_8w", ["lstm", "x", 1, 5]), STUDY="smoke").MODELS[1].width == 5


@pytest.mark.parametrize(
    "name, value",
    [
        ("SEQLEN", 256),
        ("SEQ_LEN", 2.5),
        ("SEQ_LEN", -1),
        ("SEQ_LEN", True),
        ("LR", "fast"),
        ("LR", float("nan")),
        ("LMD_ZIP_PATH", 3),
        ("USE_LOCAL_MIDI", 1),
        ("BETAS", 0.9),
    ],
)
def test_nonsense_is_refused_where_it_is_written(name, value):
    for attempt in (
        lambda: Cfg(**{name: value}),
        lambda: setattr(Cfg, name, value),
        lambda: setattr(Cfg(), name, value),
    ):
        with pytest.raises(UserError, match=name):
            attempt()


def test_a_misspelt_knob_is_told_its_name():
    with pytest.raises(UserError, match="SEQ_LEN"):
        Cfg(SEQLEN=1)


@pytest.mark.parametrize(
    "knobs",
    [
        {"STUDY": "huge"},
        {"DEVICE": "tpu"},
        {"VAL_FRAC": 0.4, "TEST_FRAC": 0.4},
        {"VAL_FRAC": 0.4},
        {"MODELS": (("gpt", "2M", 6),)},
        {"MODELS": (5,)},
        {"BETAS": ("a", "b")},
        {"SEQ_LEN": 100, "BATCH_TOKENS": 150},
        {"SEEDS": 0},
        {"BUDGETS": (0.5,)},
        {"BUDGETS": ()},
        {"MODELS": ("gpt_9T",)},
        {"MODELS": (("gpt", "x", 1, 30, 4),)},
        {"MODELS": ("gpt_1M", "gpt_1M")},
        {"BETAS": (0.9, 1.0)},
        {"DECAY_FRAC": 0.0},
    ],
)
def test_knobs_that_make_no_sense_together(knobs):
    with pytest.raises(UserError):
        Cfg(**knobs).check()


@pytest.mark.parametrize(
    "flags",
    [
        ["--SEQLEN", "3"],
        ["--SEQ_LEN", "x"],
        ["--SEQ_LEN", "-5"],
        ["--LMD_ZIP_PATH", "missing.zip"],
        ["--USE_LOCAL_MIDI", "True", "--LOCAL_MIDI_ROOT", "empty"],
        ["--USE_LOCAL_MIDI", "True"],
        ["--only", "dance"],
        ["--from", "train", "--to", "convert"],
        ["--only", "fit"],
        ["--STUDY", "huge"],
        ["--LMD_ZIP_PATH", "text.zip"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("this is no archive")
    before = sorted(tmp_path.rglob("*"))
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("LakhMIDI: ") and error.count("\n") == 1
    after = [p for p in sorted(tmp_path.rglob("*")) if p.is_file() and p.parent.name != "manifests"]
    assert after == [p for p in before if p.is_file()]


def test_help_lists_every_knob_with_its_comment(capsys):
    assert set(knob_help()) == set(knob_names())
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, comment in knob_help().items():
        assert f"--{name} " in text and " ".join(comment.split()) in text


def test_importing_leaves_no_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import LakhMIDI"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""},
        check=True,
    )
    assert done.stdout == done.stderr == ""
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "matplotlib" not in str(p)]


def test_rows_of_numpy_numbers_are_written_as_json(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"bar": np.int64(3), "share": np.float32(0.5)}])
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"bar": 3, "share": 0.5}]
