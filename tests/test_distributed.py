"""Several processes train a study: the losses of one, one set of files, an end when one is lost."""
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import LakhMIDI

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MODELS = "gpt_8w,gpt_16w,lstm_10w,lstm_20w"


def command_for(smoke, save_dir, *stages, processes=1, **knobs):
    """The training of tiny models of each family on the corpus of the smoke study, by so many processes."""
    knobs = {"STUDY": "smoke", "DEVICE": "cpu", "DATA_ROOT": smoke.DATA_ROOT, "EVAL_TOKENS": 4_000,
             "LMD_ZIP_PATH": smoke.LMD_ZIP_PATH, "MAX_MIDI_FILES": 80, "WORKERS": 1, "SAVE_DIR": save_dir,
             "MODELS": MODELS, **knobs}
    flags = [text for name, value in knobs.items() for text in (f"--{name}", str(value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "LakhMIDI.py"), *stages, *flags]


def losses(save_dir):
    rows = json.loads(Path(save_dir, "scaling_results.json").read_text())["runs"]
    return {(row["run"], row["tokens"]): row["val_loss"] for row in rows}


def run_to_the_end(command):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(smoke, tmp_path_factory):
    """The losses that one command reaches, whose processes train two models side by side."""
    save_dir = tmp_path_factory.mktemp("alone")
    run_to_the_end(command_for(smoke, save_dir, "--only", "train", WORKERS=2))
    return losses(save_dir)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_do_what_one_does(smoke, alone, tmp_path, processes):
    """From the first stage on, each model trained once, by one of them."""
    runs = tmp_path / "runs"
    command = command_for(smoke, runs, "--to", "train", processes=processes, DATA_ROOT=tmp_path / "data")
    said = run_to_the_end(command)
    assert said.count("files became ABC") == said.count("train     done") == 1
    assert all(said.count(f"  {name} ") >= 1 for name in MODELS.split(","))
    assert losses(runs) == alone and len(alone) == 16
    assert {path.name for path in runs.glob("*.pt")} == {f"{name}.pt" for name in MODELS.split(",")}
    for name in ("train.bin", "vocab.json"):
        assert (tmp_path / "data/tokens" / name).read_bytes() == (smoke.tokens_root / name).read_bytes()


def start_by_hand(command, ranks, **seconds):
    """Some ranks of two processes that no torchrun watches; with patience of so many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    program = f"import sys, LakhMIDI; vars(LakhMIDI).update({seconds}); sys.exit(LakhMIDI.main(sys.argv[1:]))"
    return [subprocess.Popen([sys.executable, "-c", program, *command[2:]], cwd=ROOT, text=True,
                             env={**ENVIRONMENT, **world, "RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in ranks]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_and_another_number_of_them_goes_on(smoke, alone, tmp_path, lost):
    command = command_for(smoke, tmp_path, "--only", "train", SAVE_EVERY_S=0)
    processes = start_by_hand(command, [0, 1], LOST_S=8)
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("runs/*/resume.pt")):
            assert processes[lost].poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        processes[lost].kill()
        _, told = processes[1 - lost].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - lost].returncode == 1 and "Traceback" not in told
    lines = re.findall("LakhMIDI: (.*)", told)
    assert lines == [f"the process of rank {lost} is lost; the same command goes on"]
    run_to_the_end(command_for(smoke, tmp_path, "--only", "train"))
    assert losses(tmp_path) == alone


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_waited_for_and_given_up(smoke, tmp_path, rank):
    process = start_by_hand(command_for(smoke, tmp_path, "--only", "train"), [rank], START_S=12)[0]
    said, told = process.communicate(timeout=60)
    assert "waiting for" in said and process.returncode in (1, 2)
    assert told.count("LakhMIDI: ") == 1 and "Traceback" not in told


@pytest.mark.parametrize("world", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"RANK": "0"}])
def test_half_a_cluster_s_environment_is_none(monkeypatch, world):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert LakhMIDI.ranks.__wrapped__() == (0, 1, None)
