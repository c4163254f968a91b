"""The whole study on made-up music: what it writes, when it works, how it goes on."""

import itertools
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_midi, smoke_knobs

import LakhMIDI as study
from LakhMIDI import Cfg, UserError, main, run_stages

ROOT = Path(__file__).parents[1]


def test_outputs_are_at_their_names(smoke):
    for root, names in {
        smoke.DATA_ROOT: "midi/artist#0/Title#0.mid abc/artist#0/Title#0.mid.abc abc/report.jsonl "
        "tokens/train.bin tokens/vocab.json tokens/stats.json tokens/length_distribution.png",
        smoke.SAVE_DIR: "gpt_8w.pt lstm_10w.pt scaling_results.json training_curves.json fits.json "
        "gpt_scaling.png lstm_scaling.png combined_scaling.png evaluation.json report.html",
    }.items():
        assert all((root / name.replace("#", " ")).stat().st_size > 0 for name in names.split())
        assert not list(root.rglob("*.partial"))
    assert len(list((smoke.SAVE_DIR / "best_samples").glob("*.mid"))) >= smoke.SAMPLES


def test_every_file_is_in_the_books(smoke):
    stats = study.read_json(smoke.tokens_root / "stats.json")
    rows = list(study.read_jsonl(smoke.ABC_ROOT / "report.jsonl"))
    assert len(rows) == stats["files"] == stats["converted"] + sum(stats["rejected"].values()) == 65
    assert all(("abc" in row) != ("reason" in row) for row in rows)
    rejected = {row["file"]: row["reason"] for row in rows if "reason" in row}
    assert set(rejected) == {"broken/cut.mid", "broken/empty.kar"}
    assert stats["round_trip_f1"]["mean"] > 0.98


def test_versions_of_a_work_stay_on_one_side(smoke):
    tunes = {tune["file"]: tune for tune in study.read_jsonl(smoke.tokens_root / "tunes.jsonl")}
    names = "artist 0/Title 0.mid", "versions/same.mid", "versions/UP.MID", "versions/organ.midi"
    assert len({tunes[name]["group"] for name in names}) == 1
    sides = {(tune["group"], tune["split"]) for tune in tunes.values()}
    assert len(sides) == len({group for group, _ in sides})
    assert {split for _, split in sides} == {"train", "val", "test"}


def test_one_version_of_a_work_in_training_is_set_aside_to_measure_the_leak(smoke):
    tunes = [t for t in study.read_jsonl(smoke.tokens_root / "tunes.jsonl") if t["split"] == "train"]
    leaked, works = [tune for tune in tunes if "leaked" in tune], Counter(tune["group"] for tune in tunes)
    assert len(leaked) == 1 and works[leaked[0]["group"]] == 4 and tunes[-1] == leaked[0]
    first, last = study.read_training(study.read_vocab(smoke), smoke)
    assert len(last) == leaked[0]["chars"] + 2 and len(first) == leaked[0]["start"]
    models = study.read_json(Path(smoke.SAVE_DIR, "evaluation.json"))["models"]
    assert all(0 < row["leaked_loss"] < 5 for row in models)


def test_token_files_hold_the_tunes(smoke):
    vocab = study.read_vocab(smoke)
    for split in ("train", "val", "test"):
        ids = np.fromfile(smoke.tokens_root / f"{split}.bin", vocab.dtype)
        for tune in [t for t in study.read_jsonl(smoke.tokens_root / "tunes.jsonl") if t["split"] == split]:
            start, end = tune["start"], tune["start"] + tune["chars"] + 1
            assert ids[start] == study.START and ids[end] == study.END
            assert vocab.decode(ids[start + 1 : end]) == (smoke.ABC_ROOT / f"{tune['file']}.abc").read_text()
    assert list(vocab.chars[3:]) == sorted(vocab.chars[3:])


def test_unknown_characters_are_counted_not_hidden():
    vocab = study.Vocab(("<start>", "<end>", "<unknown>", "a", "b"))
    assert list(vocab.encode("abz")) == list(vocab.table()[study.code_points("abz")]) == [3, 4, study.UNKNOWN]


def test_token_files_do_not_depend_on_order_or_workers(smoke, tmp_path, midi_zip):
    cfg = Cfg(**smoke_knobs(tmp_path, LMD_ZIP_PATH=midi_zip, WORKERS=2))
    run_stages(cfg, "extract", "tokenize")
    for name in ("train.bin", "val.bin", "test.bin", "vocab.json", "tunes.jsonl"):
        assert (cfg.tokens_root / name).read_bytes() == (smoke.tokens_root / name).read_bytes()


def test_a_second_run_does_nothing(smoke, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path(smoke.SAVE_DIR).rglob("*")}
    began = time.monotonic()
    assert run_stages(smoke) is False
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.count("up to date") == len(study.STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in Path(smoke.SAVE_DIR).rglob("*")}


def test_a_knob_makes_stale_what_is_below_it_and_nothing_above(smoke):
    cfg = Cfg(**smoke.given | {"LR": 0.5})
    status = {stage.__name__: stage.status(cfg) for stage in study.STAGES}
    assert [name for name, state in status.items() if state == "up to date"] == [
        "extract", "convert", "tokenize"]
    assert status["train"] == "stale: LR changed"
    with pytest.raises(UserError, match="train"):
        study.fit(cfg)


def at(smoke, data, runs, **knobs):
    """The cfg of the smoke study in other folders or with other knobs."""
    return Cfg(**smoke.given | {"DATA_ROOT": data, "SAVE_DIR": runs} | knobs)


def test_a_copied_and_moved_study_is_up_to_date_without_its_source(smoke, tmp_path, monkeypatch):
    for root in ("DATA_ROOT", "SAVE_DIR"):
        shutil.copytree(getattr(smoke, root), tmp_path / "copy" / root)
    (tmp_path / "copy").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    cfg = at(smoke, "DATA_ROOT", "./SAVE_DIR/", LMD_ZIP_PATH=f"gone/{Path(smoke.LMD_ZIP_PATH).name}")
    assert {stage.status(cfg) for stage in study.STAGES} == {"up to date"}
    monkeypatch.setattr(study, "train_model", None)  # a smaller ladder finds its models
    assert study.train(at(smoke, "DATA_ROOT", "SAVE_DIR", MODELS=("gpt_8w",))) is True


def test_whatever_happens_to_a_file_is_noticed_and_repaired(smoke, tmp_path):
    """One is cut, doubled, swapped, changed in a byte or gone: the same command ends with the same."""
    cfg = at(smoke, tmp_path / "data", tmp_path / "runs")
    for root in ("DATA_ROOT", "SAVE_DIR"):
        shutil.copytree(getattr(smoke, root), getattr(cfg, root))
    model = next(cfg.SAVE_DIR.glob("runs/gpt_8w-*/model.pt"))
    record = model.with_name("record.json")
    data = ["midi_index.json", "midi/artist 0/Title 0.mid", "abc/artist 0/Title 0.mid.abc",
            "abc/report.jsonl", "abc/signatures.npy", "tokens/train.bin", "tokens/vocab.json"]
    runs = ["gpt_16w.pt", "lstm_10w.pt", "scaling_results.json", "training_curves.json"]
    files = [cfg.DATA_ROOT / name for name in data] + [cfg.SAVE_DIR / name for name in runs] + [model, record]
    whole = {path: path.read_bytes() for path in files}

    def damage(path, how, other):
        path.unlink()  # what else links to it stays
        harm = {"cut": whole[path][:-1], "doubled": whole[path] * 2, "swapped": whole[other],
                "changed": whole[path][:99] + bytes([whole[path][99] ^ 1]) + whole[path][100:]}
        if how != "gone":
            path.write_bytes(harm[how])

    for path, other in zip(files, files[1:] + files[:1], strict=True):
        for how in ("cut", "doubled", "swapped", "changed", "gone"):
            damage(path, how, other)
            stages = study.STAGES[:4]
            assert any(stage.status(cfg) != "up to date" for stage in stages) or path in (model, record), how
        path.write_bytes(whole[path])
    for path, how in zip(files, itertools.cycle(("swapped", "changed", "cut", "gone")), strict=False):
        damage(path, how, files[0])
    (cfg.DATA_ROOT / "manifests/convert.json").write_bytes(whole[files[0]])
    shutil.copy(cfg.DATA_ROOT / "manifests/extract.json", cfg.DATA_ROOT / "manifests/tokenize.json")
    run_stages(cfg, "extract", "train")
    results = study.read_json(cfg.SAVE_DIR / "scaling_results.json")["runs"]
    known = study.read_json(smoke.SAVE_DIR / "scaling_results.json")["runs"]
    assert [row["val_loss"] for row in results] == [row["val_loss"] for row in known]
    assert all(path.read_bytes() == whole[path] for path in files[:7])
    assert study.load(model)[2]["val_loss"] and study.load(cfg.SAVE_DIR / "gpt_8w.pt")


def test_one_run_owns_a_folder_and_others_may_read(smoke, tmp_path, capsys):
    flags = ["--LMD_ZIP_PATH", smoke.LMD_ZIP_PATH, "--DATA_ROOT", tmp_path / "data", "--SAVE_DIR", tmp_path]
    with study.owned(Cfg(DATA_ROOT=tmp_path / "data"), "DATA_ROOT"):
        assert main([*flags, "--to", "extract"]) == 2
        said = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on " in said and "since 20" in said and said.count("\n") == 1
    assert main([*flags, "--to", "extract"]) == 0  # a lock that was left does not count
    with study.owned(smoke, "DATA_ROOT", shared=True), study.owned(smoke, "DATA_ROOT", shared=True):
        with pytest.raises(UserError, match="in use by runs that read"), study.owned(smoke, "DATA_ROOT"):
            pass
        assert study.extract(smoke) is False  # what is up to date needs no lock


def test_a_file_system_without_locks_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def lock(*_):
        raise study.portalocker.LockException("Operation not supported")
    monkeypatch.setattr(study.portalocker, "lock", lock)
    assert main(["--DATA_ROOT", tmp_path / "data", "--SAVE_DIR", tmp_path / "runs", "--to", "extract"]) == 2
    assert f"{tmp_path}/data can't be locked (Operation not" in capsys.readouterr().err


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path, monkeypatch, capsys):
    """While abc2midi works in threads: nothing of theirs is left."""
    begun = threading.Event()
    monkeypatch.setattr(study, "folk_tunes", lambda: [(f"{i}.mid", b"X:1\nK:G\nGABc|") for i in range(99)])
    monkeypatch.setattr(study, "run_abc2midi", lambda *_, run=study.run_abc2midi: begun.set() or run(*_))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=lambda: begun.wait() and os.kill(os.getpid(), signal.SIGTERM)).start()
    assert main(["--DATA_ROOT", tmp_path / "data", "--SAVE_DIR", tmp_path / "runs", "--to", "extract"]) == 143
    assert "interrupted" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before
    assert not list((tmp_path / "tmp").iterdir()) and not (tmp_path / "data/midi_index.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_makes_another_error_of_ends_the_run_all_the_same(number, monkeypatch):
    def command(*_):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        raise ValueError("Invalid bounding box")  # as matplotlib does
    monkeypatch.setattr(study, "command", command)
    assert main(["--status"]) == 128 + number


@pytest.fixture
def files_up_to():
    """files_up_to(bytes): no file may become longer, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_and_a_folder_that_is_none_are_one_line(tmp_path, capsys, files_up_to):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("big.mid", bytes(2**20))
    flags = ["--LMD_ZIP_PATH", tmp_path / "z.zip", "--DATA_ROOT", tmp_path / "data", "--to", "extract"]
    files_up_to(2**19)
    assert main([*flags, "--SAVE_DIR", tmp_path / "runs"]) == 2
    said = capsys.readouterr().err
    assert "big.mid: File too large" in said and said.count("\n") == 1
    files_up_to(2**30)
    assert main([*flags, "--SAVE_DIR", tmp_path / "runs"]) == 0
    assert main([*flags[:4], "--SAVE_DIR", tmp_path / "z.zip"]) == 2  # before the first stage
    assert "z.zip/manifests: Not a directory" in capsys.readouterr().err


def run_until(cfg, calls):
    """The exit status of a fork that trains a study, and kills itself when so many files have their name."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    me, replace, count = os.getpid(), os.replace, itertools.count(1)

    def counted(*paths):
        if os.getpid() == me and next(count) == calls:
            os.kill(me, signal.SIGKILL)
        replace(*paths)
    os.replace = counted
    os._exit(0 if run_stages(cfg, "extract", "train") else 1)


def test_a_run_that_is_killed_again_and_again_equals_an_unbroken_one(smoke, tmp_path):
    cfg = at(smoke, tmp_path / "data", tmp_path / "runs", SAVE_EVERY_S=0.0)
    for calls in (2, 4, 5, 7, 9, 16, 30, 21, 40):  # before an index, manifests, token files, checkpoints
        assert run_until(cfg, calls) == -signal.SIGKILL
    assert run_until(cfg, 0) == 0

    def losses(runs):
        return [(row["run"], row["tokens"], row["val_loss"])
                for row in study.read_json(runs / "scaling_results.json")["runs"]]
    assert losses(tmp_path / "runs") == losses(smoke.SAVE_DIR)
    for path in smoke.SAVE_DIR.glob("*.pt"):
        one, other = (torch.load(file, weights_only=True)["model"]
                      for file in (path, tmp_path / "runs" / path.name))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_local_folder_is_read_in_place(tmp_path):
    folder = tmp_path / "mine"
    for seed in range(12):
        (folder / f"set {seed % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"set {seed % 2}" / f"Title {seed}.MID").write_bytes(make_midi(seed))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    cfg = Cfg(**smoke_knobs(tmp_path / "study", USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=folder))
    run_stages(cfg, "extract", "tokenize")
    assert study.read_json(cfg.tokens_root / "stats.json")["converted"] == 12
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "set 0" / "new.mid").write_bytes(make_midi(99))
    assert study.extract.status(cfg).startswith("stale")


def test_status_of_a_fresh_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--status"]) == 0
    assert capsys.readouterr().out.count("not run") == len(study.STAGES)
    assert not list(tmp_path.iterdir())


def test_the_readme_gives_the_command_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = ci.strip().splitlines()[-1]
    assert f"\n{command}\n" in readme


@pytest.mark.parametrize("flags", [["--status"], ["--sample", "1"], ["--plan", "1h"]])
def test_what_has_no_shares_is_done_by_one_rank(smoke, flags, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*flags, "--SAVE_DIR", str(smoke.SAVE_DIR)]) == 0
    assert "done by the process of rank 0" in capsys.readouterr().out


def test_without_music21_the_bundled_tunes_are_what_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    cfg = Cfg(DATA_ROOT=tmp_path)
    with pytest.raises(UserError, match="music21 is missing"):
        study.source_id(cfg)
    study.write_json(tmp_path / "midi_index.json", {"source": {"music21": "10.5.1"}})
    assert study.source_id(cfg) == {"music21": "10.5.1"}


def test_rows_of_numpy_numbers_are_written_as_json(tmp_path):
    study.write_jsonl(tmp_path / "rows.jsonl", [{"bar": np.int64(3), "share": np.float32(0.5)}])
    assert list(study.read_jsonl(tmp_path / "rows.jsonl")) == [{"bar": 3, "share": 0.5}]
