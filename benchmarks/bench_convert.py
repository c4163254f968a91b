"""Conversion on real files: fidelity, compactness, speed and memory, beside the other ways from MIDI to ABC.

    python benchmarks/bench_convert.py SOURCE... [--files N] [--rivals N] [--music21 N]
    python benchmarks/bench_convert.py SOURCE... --many 20000      memory and speed of the stage on copies
    python benchmarks/bench_convert.py SOURCE... --fuzz 3000       mutated files through the worker pool

SOURCE is a ZIP or a folder of MIDI files. Each mode prints a table and appends a line to results.jsonl.
"""
import argparse
import collections
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pretty_midi
import symusic

import LakhMIDI
from LakhMIDI import Rejected, abc_to_midi, convert_all, midi_to_abc, note_f1, read_abc, strict_abc

LAKH_FILES = 178_561  # MIDI files in lmd_full
BIN = Path(symusic.__file__).parent / "bin"


def midi_files(source, limit=0):
    """[(name, bytes)] of a ZIP or folder, evenly spread where `limit` leaves some out."""
    if Path(source).is_dir():
        names = sorted(p for p in Path(source).rglob("*") if LakhMIDI.is_midi(p.name))
        chosen = spread(names, limit)
        return [(p.relative_to(source).as_posix(), p.read_bytes()) for p in chosen]
    with zipfile.ZipFile(source) as archive:
        chosen = spread(sorted(filter(LakhMIDI.is_midi, archive.namelist())), limit)
        return [(name, archive.read(name)) for name in chosen]


def spread(items, limit):
    return [items[i * len(items) // limit] for i in range(limit)] if 0 < limit < len(items) else items


@contextlib.contextmanager
def tools():
    """Yields a function that runs abc2midi or midi2abc, copied because their run bit is not set."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("abc2midi", "midi2abc"):
            Path(folder, name).write_bytes((BIN / name).read_bytes())
            Path(folder, name).chmod(0o700)

        def run(name, data, suffix_in, suffix_out):
            Path(folder, "in" + suffix_in).write_bytes(data)
            target = Path(folder, "out" + suffix_out)
            target.unlink(missing_ok=True)
            subprocess.run([Path(folder, name), "in" + suffix_in, "-o", target.name], cwd=folder, timeout=60,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return target.read_bytes()
        yield run


def midi_notes(data):
    return LakhMIDI.score_notes(LakhMIDI.read_score(data))[0]


def sounding(notes, voices):
    """The notes with program and drum flag told apart like pitches."""
    sound = np.array([128 + program + 128 * drum for program, drum in voices], int)[notes.voice]
    return notes._replace(pitch=sound * 128 + notes.pitch)


def fidelity(files, cfg, run, music21=0):
    """Means over the files of a data set; the reference is what symusic reads in the MIDI file."""
    rows, rejects, alphabet, readers = [], collections.Counter(), set(), collections.Counter()
    readers = collections.Counter()
    for i, (_, data) in enumerate(files):
        try:
            abc = midi_to_abc(data, cfg)
        except Rejected as reject:
            rejects[reject.reason] += 1
            continue
        alphabet |= set(abc)
        reference, voices = LakhMIDI.score_notes(LakhMIDI.read_score(data))
        tune = read_abc(abc)
        midi = midi_notes(abc_to_midi(abc))
        other = midi_notes(run("abc2midi", strict_abc(abc).encode(), ".abc", ".mid"))
        f8 = note_f1(reference, tune.notes)
        rows.append({
            "F8": f8, "F16": note_f1(reference, tune.notes, 1 / 16),
            "FD": note_f1(reference, tune.notes, durations=True),
            "sound": note_f1(sounding(reference, voices), sounding(tune.notes, tune.voices)) / max(f8, 1e-9),
            "midi": note_f1(tune.notes, midi, 1 / 96), "F8_abc2midi": note_f1(reference, other),
            "agree": note_f1(tune.notes, other, 1 / 48),
            "agree_FD": note_f1(tune.notes, other, 1 / 48, durations=True),
            "problems": len(tune.problems) > 0, "chars": len(abc), "notes": len(reference.pitch)})
        if music21 and i % max(1, len(files) // music21) == 0:
            readers["files"] += 1
            one_voice = tune.notes._replace(voice=np.zeros(len(tune.notes.pitch), int))  # as in music21_notes
            readers["same"] += note_f1(one_voice, LakhMIDI.music21_notes(abc), 1 / 48) > 0.999
    table = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    means = {key: float(column.mean()) for key, column in table.items()}
    del means["problems"], means["chars"], means["notes"]
    return means | {"files": len(files), "above_.99": float((table["F8"] > .99).mean()),
                  "chars/note": float(table["chars"].sum() / table["notes"].sum()), "alphabet": len(alphabet),
                  "max_chars": int(table["chars"].max()), "with_problems": int(table["problems"].sum()),
                  "rejects": dict(rejects), "music21": dict(readers)}


def speed(files, cfg, folder, block=25):
    """CPU seconds against pretty_midi on the same files, block by block: other jobs hit both alike."""
    seconds = collections.Counter()
    steps = {"pretty_midi": lambda path: pretty_midi.PrettyMIDI(str(path)),
             "ours": lambda path: midi_to_abc(path, cfg),
             "with_score": lambda path: LakhMIDI.convert_one(path, cfg)}
    paths = []
    for i, (_, data) in enumerate(files):
        path = Path(folder, f"{i}.mid")
        path.write_bytes(data)
        with contextlib.suppress(Exception):  # whatever pretty_midi raises: no comparison on this file
            steps["pretty_midi"](path)
            steps["ours"](path)
            paths.append(path)
    for start in range(0, len(paths), block):
        for name, step in steps.items():
            began = time.process_time()
            for path in paths[start:start + block]:
                step(path)
            seconds[name] += time.process_time() - began
    return {"timed": len(paths), "ratio": seconds["ours"] / seconds["pretty_midi"],
            "ratio_with_score": seconds["with_score"] / seconds["pretty_midi"]}


def rivals(files, run):
    """Round trips of midi2abc and of symusic's dumps_abc, decoded by abc2midi."""
    def dumps_abc(data):
        return symusic.Score.from_midi(data, sanitize_data=True).dumps_abc().encode()

    makers = {"midi2abc": lambda data: run("midi2abc", data, ".mid", ".abc"), "dumps_abc": dumps_abc}
    found = {}
    for name, make in makers.items():
        scores, chars, notes = [], 0, 0
        for _, data in files:
            try:
                reference = midi_notes(data)
                abc = make(data)
                midi = run("abc2midi", abc, ".abc", ".mid")
                scores.append(note_f1(reference, midi_notes(midi)))
                chars, notes = chars + len(abc), notes + len(reference.pitch)
            except (Rejected, OSError, RuntimeError, subprocess.SubprocessError):
                scores.append(0.0)  # no text, or none that abc2midi reads
        found[name] = {"F8": float(np.mean(scores)), "above_.99": float(np.mean(np.array(scores) > .99)),
                       "chars/note": chars / max(notes, 1), "files": len(files)}
    return found


def cpu_seconds():
    """CPU seconds of (this process, its children that have ended)."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([usage.ru_utime + usage.ru_stime for usage in used])


def in_turn(files, cfg, folder, repeats=5):
    """Speed-up of two workers over one: by the clock, in turn, and as CPU times of parent and workers allow.

    The second holds on a machine with nothing else to do; the first suffers from what else runs.
    """
    ratios, cpu = [], np.zeros(2)
    for i, (_, data) in enumerate(files):
        Path(folder, f"{i}.mid").write_bytes(data)
    names = [f"{i}.mid" for i in range(len(files))]
    for _ in range(repeats):
        took = {}
        for workers in (1, 2):
            part = LakhMIDI.Cfg(DATA_ROOT=Path(folder, "out"), MIDI_ROOT=folder, WORKERS=workers)
            began, before = time.perf_counter(), cpu_seconds()
            collections.deque(convert_all(names, part), 0)
            took[workers] = time.perf_counter() - began
            cpu += cpu_seconds() - before
        ratios.append(took[1] / took[2])
    return {"files": len(names), "speed_up_wall": float(np.median(ratios)), "best_wall": max(ratios),
            "speed_up_by_cpu": float(2 / (1 + cpu[0] / cpu[1])), "load": os.getloadavg()[0]}


def memory(pid):
    """MB of a process: {"resident", "own": what it does not share with any other}; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return {"resident": 0, "own": 0}
    size = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
    return {"resident": size["Rss"], "own": size["Private_Clean"] + size["Private_Dirty"]}


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def copies(files, n, root):
    """Writes `n` MIDI files, the given ones transposed."""
    for i in range(n):
        name, data = files[i % len(files)]
        with contextlib.suppress(RuntimeError, ValueError):  # out of range: copied as it is
            score = symusic.Score.from_midi(data, sanitize_data=True)
            data = score.shift_pitch(i // len(files) % 12 - 6).dumps_midi()
        Path(root, f"{i:06d}_{Path(name).stem}.mid").write_bytes(data)


def watch(over, journal, peak, parent):
    """Until `over` is set: the workers' peaks, and the parent's memory at each size of the journal."""
    while not over.wait(0.5):
        for size in map(memory, children(os.getpid())):
            peak.update({key: max(value, peak[key]) for key, value in size.items()})
        with contextlib.suppress(OSError):
            parent.append((journal.stat().st_size, memory(os.getpid())["resident"]))


def many(files, n, workers):
    """The convert stage on `n` files made from the given ones: memory against the number of files done."""
    with tempfile.TemporaryDirectory() as folder:
        root, data_root = Path(folder, "midi"), Path(folder, "data_lakh")
        root.mkdir()
        copies(files, n, root)
        cfg = LakhMIDI.Cfg(USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=root, DATA_ROOT=data_root, WORKERS=workers)
        LakhMIDI.extract(cfg)
        over, peak, parent = threading.Event(), {"resident": 0, "own": 0}, []
        journal = data_root / "abc" / "journal_0_of_1.jsonl"
        watcher = threading.Thread(target=watch, args=(over, journal, peak, parent))
        watcher.start()
        began, before = time.perf_counter(), cpu_seconds()
        LakhMIDI.convert(cfg)
        seconds, cpu = time.perf_counter() - began, (cpu_seconds() - before).sum()
        over.set()
        watcher.join()
        with open(data_root / "abc" / "report.jsonl", encoding="utf-8") as lines:
            report = [json.loads(line) for line in lines]
        disk = sum(path.stat().st_size for path in Path(data_root, "abc").rglob("*"))
        last = parent[-1][0]
    at = {f"{share:.0%}": round(next(size for done, size in parent if done >= share * last))
          for share in (.05, .25, .5, .75, 1)}
    scale = LAKH_FILES / n
    minutes = float(cpu) * scale / 60  # of free cores, all of them busy
    return {"files": n, "workers": workers, "seconds": seconds, "cpu_seconds": float(cpu),
            "load": os.getloadavg()[0], "texts": sum("abc" in row for row in report),
            "parent_resident_MB": at, "worker_resident_MB": peak["resident"], "worker_own_MB": peak["own"],
            "lakh_minutes_2_cores": minutes / 2, "lakh_minutes_16_cores": minutes / 16,
            "lakh_characters": sum(row.get("n_chars", 0) for row in report) * scale,
            "lakh_disk_GB": disk * scale / 1e9}


def mutate(data, other, rng):
    """One of several ways to spoil a MIDI file."""
    data = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:  # flipped bits
        for _ in range(rng.choice((1, 4, 32))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # cut off
        del data[rng.randrange(len(data)):]
    elif kind == 2:  # the tail of another file
        data = data[:rng.randrange(len(data))] + other[rng.randrange(len(other)):]
    elif kind == 3:  # an absurd header
        at = data.find(b"MThd") + rng.randrange(4, 14)
        data[at:at + 2] = rng.choice((b"\0\0", b"\xff\xff", b"\x7f\xff", b"\x80\0", b"\0\1"))
    elif kind == 4:  # absurd deltas and lengths
        for _ in range(rng.choice((1, 8))):
            at = rng.randrange(14, max(15, len(data)))
            data[at:at + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\x8f\xff\xff\x7f", b"\xff\xff\xff\xff"))
    else:  # a piece doubled or lost
        at, to = sorted(rng.randrange(len(data)) for _ in range(2))
        data[at:to] = data[at:to] * rng.choice((0, 2, 8))
    return bytes(data)


def fuzz(files, n, seed=1):
    """Mutants through the worker pool, counted by reason; none should be a crash, a time-out or a failure."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            data, other = rng.choice(files)[1], rng.choice(files)[1]
            Path(folder, f"{i}.mid").write_bytes(mutate(data, other, rng))
        cfg = LakhMIDI.Cfg(DATA_ROOT=Path(folder, "out"), MIDI_ROOT=folder, WORKERS=2)
        began = time.perf_counter()
        rows = list(convert_all([f"{i}.mid" for i in range(n)], cfg))
        reasons = collections.Counter(row.get("reason", "text") for row in rows)
        low = sum(row.get("f1", 1) < .99 for row in rows)
    return {"mutants": n, "reasons": dict(reasons.most_common()), "f1_below_.99": low,
            "seconds": time.perf_counter() - began}


def show(title, row):
    print(title)
    for key, value in row.items():
        print(f"  {key:20s} {value:.4f}" if isinstance(value, float) else f"  {key:20s} {value}")
    sys.stdout.flush()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", nargs="+")
    parser.add_argument("--files", type=int, default=0, help="at most so many files of each source")
    parser.add_argument("--rivals", type=int, default=0, help="run other converters on so many files")
    parser.add_argument("--music21", type=int, default=0, help="read so many strict exports with music21")
    parser.add_argument("--many", type=int, default=0, help="run the stage on so many files")
    parser.add_argument("--fuzz", type=int, default=0, help="convert so many mutants")
    parser.add_argument("--workers", type=int, default=2, help="of --many")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cfg, result = LakhMIDI.Cfg(), {"bench": "convert", "when": time.strftime("%Y-%m-%d %H:%M")}
    files = {Path(source).stem: midi_files(source, args.files) for source in args.source}
    everything = [file for part in files.values() for file in part]
    if args.many:
        result["many"] = many(everything, args.many, args.workers)
        show("many", result["many"])
    elif args.fuzz:
        result["fuzz"] = fuzz(everything, args.fuzz)
        show("fuzz", result["fuzz"])
    else:
        with tools() as run, tempfile.TemporaryDirectory() as folder:
            for name, part in files.items():
                result[name] = fidelity(part, cfg, run, args.music21) | speed(spread(part, 300), cfg, folder)
                if args.rivals:
                    result[name]["rivals"] = rivals(spread(part, args.rivals), run)
                show(name, result[name])
            result["two workers"] = in_turn(spread(everything, 600), cfg, folder)
            show("two workers", result["two workers"])
    with open(Path(__file__).with_name("results.jsonl"), "a", encoding="utf-8") as out:
        out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
