"""Several processes train the same study: the same losses, one set of files, an end when one is lost."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")


def command_for(smoke, save_dir, stages=("--only", "train"), processes=1, **knobs):
    """One stage, the training of a tiny model of each family on the smoke study, by so many processes."""
    knobs = {"STUDY": "smoke", "DEVICE": "cpu", "DATA_ROOT": smoke.DATA_ROOT,
             "LMD_ZIP_PATH": smoke.LMD_ZIP_PATH, "MAX_MIDI_FILES": smoke.MAX_MIDI_FILES,
             "EVAL_TOKENS": smoke.EVAL_TOKENS, "SAVE_DIR": save_dir, "MODELS": "gpt_8w,lstm_10w",
             "TRAIN_TOKENS_TARGET": 44_800, "BATCH_TOKENS": 448, **knobs}  # 7 windows: unequal shares
    flags = [text for name, value in knobs.items() for text in (f"--{name}", str(value))]
    program = [sys.executable] if processes == 1 else TORCHRUN
    return [*program, str(ROOT / "LakhMIDI.py"), *stages, *flags]


def losses(save_dir):
    rows = json.loads(Path(save_dir, "scaling_results.json").read_text())["runs"]
    return {(row["run"], row["tokens"]): row["val_loss"] for row in rows}


def run_to_the_end(command):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(smoke, tmp_path_factory):
    """The losses that one process reaches."""
    save_dir = tmp_path_factory.mktemp("alone")
    run_to_the_end(command_for(smoke, save_dir))
    return losses(save_dir)


def test_two_processes_convert_what_one_does(smoke, tmp_path):
    said = run_to_the_end(command_for(smoke, tmp_path / "runs", ("--to", "convert"), processes=2,
                                      DATA_ROOT=tmp_path / "data", WORKERS=1))
    assert said.count("files became ABC") == 1
    ours, theirs = (Path(root, "abc") for root in (tmp_path / "data", smoke.DATA_ROOT))
    for name in ("report.jsonl", "signatures.npy"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())


def test_two_processes_reach_the_losses_of_one(smoke, alone, tmp_path):
    said = run_to_the_end(command_for(smoke, tmp_path, processes=2))
    assert said.count("gpt_8w") == 1  # one of the two speaks
    together = losses(tmp_path)
    assert together.keys() == alone.keys() and len(together) == 6
    for run, loss in alone.items():
        assert together[run] == pytest.approx(loss, rel=1e-3), run


def test_a_lost_process_ends_the_run_and_the_next_one_goes_on(smoke, alone, tmp_path):
    command = command_for(smoke, tmp_path, processes=2, SAVE_EVERY_S=0)
    with open(tmp_path / "out", "w") as out:
        torchrun = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("resume/*.pt")):
            assert torchrun.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.02)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert torchrun.wait(60) != 0
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
    assert not (tmp_path / "scaling_results.json").exists()
    run_to_the_end(command_for(smoke, tmp_path))
    assert losses(tmp_path).keys() == alone.keys()
    for run, loss in losses(tmp_path).items():
        assert loss == pytest.approx(alone[run], rel=1e-3), run
