"""A small corpus of made-up music and one smoke study of it, shared by the tests."""

import io
import os
import random
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import mido
import pytest
import torch

import LakhMIDI

torch.set_num_threads(1)


def make_midi(seed, bars=16, program=0, transpose=0):
    """A Standard MIDI File of a random melody over a bass: the same seed is the same tune."""
    rng, ticks = random.Random(seed), 480
    midi = mido.MidiFile(ticks_per_beat=ticks)
    for channel, (low, high, lengths) in enumerate([(60, 84, (240, 480, 480, 960)), (36, 52, (960, 1920))]):
        track = mido.MidiTrack(
            [mido.Message("program_change", program=program + 10 * channel, channel=channel)]
        )
        pitch, end = rng.randint(low, high), 0
        while end < bars * 4 * ticks:
            pitch = min(high, max(low, pitch + rng.choice((-4, -3, -2, -1, 1, 2, 3, 5))))
            length = min(rng.choice(lengths), bars * 4 * ticks - end)
            track += [
                mido.Message("note_on", note=pitch + transpose, velocity=80, time=0, channel=channel),
                mido.Message("note_off", note=pitch + transpose, velocity=0, time=length, channel=channel),
            ]
            end += length
        midi.tracks.append(track)
    file = io.BytesIO()
    midi.save(file=file)
    return file.getvalue()


def smoke_knobs(root, **knobs):
    """Of a study of seconds, all files below `root`."""
    return {"DATA_ROOT": str(root / "data_lakh"), "SAVE_DIR": str(root / "runs_lakh"), "STUDY": "smoke",
            "WORKERS": 1, "MAX_MIDI_FILES": 80, "EVAL_TOKENS": 4_000, "SAMPLES": 4, "SHOWN": 2,
            "SAMPLE_CHARS": 200, "BOOTSTRAP": 50} | knobs


@pytest.fixture(scope="session")
def midi_zip(tmp_path_factory):
    """60 different tunes, three versions of one of them, a corrupt file, an empty tune and a text file."""
    path = tmp_path_factory.mktemp("corpus") / "songs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for seed in range(60):
            archive.writestr(f"artist {seed % 7}/Title {seed // 7}.mid", make_midi(seed))
        archive.writestr("versions/same.mid", make_midi(0))
        archive.writestr("versions/UP.MID", make_midi(0, transpose=3))
        archive.writestr("versions/organ.midi", make_midi(0, program=19))
        archive.writestr("broken/cut.mid", make_midi(1)[:40])
        archive.writestr("broken/empty.kar", make_midi(2, bars=0))
        archive.writestr("readme.txt", "no music")
    return path


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, midi_zip):
    """The cfg of a finished smoke study."""
    root = tmp_path_factory.mktemp("smoke")
    cfg = LakhMIDI.Cfg(**smoke_knobs(root, LMD_ZIP_PATH=midi_zip, DEVICE="cpu"))
    with pytest.MonkeyPatch.context() as patch:  # its models hardly ever draw a bar right
        patch.setattr(LakhMIDI, "MAX_TRIES", 5)
        LakhMIDI.run_stages(cfg)
    return cfg
