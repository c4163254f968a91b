"""Conversion on real files: what other programs hear, compactness, speed and memory, beside the other ways.

    python benchmarks/bench_convert.py SOURCE... [--files N] [--rivals N] [--abcjs N]
    python benchmarks/bench_convert.py SOURCE... --many 20000      memory and speed of the stage on copies
    python benchmarks/bench_convert.py SOURCE... --fuzz 3000       mutated files through the worker pool

SOURCE is a ZIP or a folder of MIDI files. Each mode prints a table and writes a line to results.jsonl. The
files, and what abc2midi makes of the texts, are read by mido, with which the product has nothing to do.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
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

import lytk
import mido
import numpy as np
import pretty_midi
import symusic
from results import keep

import LakhMIDI
from LakhMIDI import Notes, Rejected, convert_all, midi_to_abc, note_f1, read_abc

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


def heard(data):
    """A MIDI file by mido -> (Notes whose pitches tell drums apart, the same with programs, metres, tempos).

    Onsets only, at which the program of the channel counts, in whichever track it was set.
    """
    midi = mido.MidiFile(file=io.BytesIO(data[data.find(b"MThd"):]), clip=True)
    events = []
    for number, track in enumerate(midi.tracks):
        tick = 0
        for place, message in enumerate(track):
            tick += message.time
            events.append((tick, message.type != "program_change", number, place, message))
    program, notes, metres, tempos = collections.Counter(), set(), [], []
    for tick, _, track, _, message in sorted(events, key=lambda event: event[:4]):
        beat = tick / midi.ticks_per_beat
        if message.type == "program_change":
            program[message.channel] = message.program
        elif message.type == "note_on" and message.velocity:
            drum = message.channel == 9
            sound = (0, 1, 0) if drum else (track, 0, program[message.channel])
            notes.add((*sound, message.note, beat))
        elif message.type == "time_signature":
            metres.append((beat, message.numerator, message.denominator))
        elif message.type == "set_tempo":
            tempos.append((beat, mido.tempo2bpm(message.tempo)))
    track, drum, sound, pitch, beat = np.array(sorted(notes), float).reshape(-1, 5).T
    pitch = (pitch + 128 * drum).astype(int)
    plain, with_programs = (Notes(track.astype(int), beat, np.ones(len(beat)), column)
                            for column in (pitch, (pitch + 256 * sound).astype(int)))
    return plain, with_programs, metres, tempos


def true_bars(metres, end):
    """Beats at which the bars of a file begin: each change of metre begins one, the last of two counts."""
    changes = {0.0: (4, 4)} | {beat: (num, den) for beat, num, den in metres if num}
    ends, starts = [*sorted(changes)[1:], end], []
    for begin, stop in zip(sorted(changes), ends, strict=True):
        num, den = changes[begin]
        starts += np.arange(begin, min(stop, end) - 1e-6, max(4 * num / den, 1 / 8)).tolist()
    return np.array(starts)


def hits(some, others, tolerance=1 / 8):
    """How many of some numbers have one of the others nearby."""
    at = np.searchsorted(others, some)
    near = [np.abs(some - others[np.clip(at + k, 0, len(others) - 1)]) for k in (-1, 0)]
    return np.count_nonzero(np.minimum(*near) <= tolerance + 1e-3)


def last_onset(notes, tempos):
    return np.interp(notes.onset.max(), *LakhMIDI.clock(tempos))


def judge(data, abc, run):
    """What abc2midi hears of a text as it stands, and what our reader reads, against the file."""
    notes, sounds, metres, tempos = heard(data)
    tune = read_abc(abc)
    others, other_sounds, _, other_tempos = heard(run("abc2midi", abc.encode(), ".abc", ".mid"))
    bars, found = true_bars(metres, notes.onset.max()), LakhMIDI.bar_starts(tune)
    found = found[found <= bars[-1] + 1 / 8]
    seconds, other_seconds = last_onset(notes, tempos), last_onset(others, other_tempos)
    drums = np.array([drum for _, drum in tune.voices])[tune.notes.voice]
    own = tune.notes._replace(pitch=tune.notes.pitch + 128 * drums)
    return {"F8 by abc2midi": alike(notes, others), "F8 by our reader": alike(notes, own),
            "programs": alike(sounds, other_sounds) > .98,
            "bars right": (hits(bars, found) + hits(found, bars)) / (len(bars) + len(found)) >= .98,
            "seconds right": abs(other_seconds - seconds) <= .01 * max(seconds, 1),
            "notes": len(notes.pitch), "chars": len(abc),
            "faults": len(tune.faults) > 0}


def alike(notes, others):
    """F1 of pitch and onset within 1/8 beat, whichever voice has the note."""
    return note_f1(*(some._replace(voice=np.zeros(len(some.pitch), int)) for some in (notes, others)))


def fidelity(files, cfg, run, texts):
    """Means and shares over the files of a data set; a file that mido refuses has no reference."""
    rows, rejects = [], collections.Counter()
    for name, data in files:
        try:
            abc = midi_to_abc(data, cfg)
        except Rejected as reject:
            rejects[reject.reason] += 1
            continue
        texts.append((name, abc))
        try:
            heard(data)
        except (OSError, EOFError, ValueError, IndexError, KeyError, TypeError):  # what mido raises
            rejects["mido refuses it"] += 1
            continue
        rows.append(judge(data, abc, run))
    table = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    chars = float(table.pop("chars").sum() / table.pop("notes").sum())
    means = {key: float(column.mean()) for key, column in table.items()}
    return {"files": len(files), "judged": len(rows)} | means | {"chars a note": chars,
        "above .99 by abc2midi": float((table["F8 by abc2midi"] > .99).mean()), "refused": dict(rejects)}


PLAY = """const abcjs = require("abcjs"), fs = require("fs");
const played = text => abcjs.parseOnly(text)[0].setUpAudio({chordsOff: true}).tracks.flatMap(
  track => track.filter(e => e.cmd == "note").map(e => [e.pitch, e.start * 4, e.duration * 4]));
fs.writeFileSync("out.json", JSON.stringify(JSON.parse(fs.readFileSync("in.json")).map(played)));
"""


def played_by_abcjs(texts):
    """Share of texts of which abcjs plays .98 of the notes as abc2midi does, or what is missing for it.

    Same pitch, onset within 1/16 beat of the first tempo, length within 1/16 or 10 %.
    """
    if not shutil.which("node") or not shutil.which("npm"):
        return "no node"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "abcjs@6.7.2"], cwd=folder,
                       check=True, capture_output=True)
        Path(folder, "in.json").write_text(json.dumps(texts))
        Path(folder, "play.js").write_text(PLAY)
        subprocess.run(["node", "play.js"], cwd=folder, check=True, capture_output=True)
        played = json.loads(Path(folder, "out.json").read_text())
    return float(np.mean([f1_in_time(by_abc2midi(text), rows) > .98
                          for text, rows in zip(texts, played, strict=True)]))


def by_abc2midi(text):
    """abc2midi's notes [(pitch, onset, length)] in beats of the first tempo."""
    score = symusic.Score.from_abc(text)
    beats, seconds = LakhMIDI.clock([(tempo.time / score.tpq, tempo.qpm) for tempo in score.tempos])
    first = (score.tempos[0].qpm if score.tempos else 120) / 60
    notes = [(note.pitch, round(note.start, -1), round(note.end, -1))
             for track in score.tracks for note in track.notes]  # a note's first tick is one late
    at = [np.interp([row[k] / score.tpq for row in notes], beats, seconds) * first for k in (1, 2)]
    return list(zip([row[0] for row in notes], at[0].tolist(), (at[1] - at[0]).tolist(), strict=True))


def f1_in_time(notes, others):
    waiting, found = collections.defaultdict(list), 0
    for pitch, onset, length in others:
        waiting[pitch].append((onset, length))
    for pitch, onset, length in notes:
        for row in waiting[pitch]:
            if abs(row[0] - onset) <= 1 / 16 and abs(row[1] - length) <= max(1 / 16, length / 10):
                waiting[pitch].remove(row)
                found += 1
                break
    return 2 * found / max(1, len(notes) + len(others))


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
    """The texts of other converters, heard by abc2midi."""
    def dumps_abc(data):
        return symusic.Score.from_midi(data, sanitize_data=True).dumps_abc().encode()

    makers = {"lytk": lambda data: lytk.to_abc(lytk.from_midi_bytes(data)).encode(), "dumps_abc": dumps_abc,
              "midi2abc": lambda data: run("midi2abc", data, ".mid", ".abc")}
    found = {}
    for name, make in makers.items():
        scores, chars, notes, seconds = [], 0, 0, 0.0
        for _, data in files:
            began = time.process_time()
            try:
                abc = make(data)
                seconds += time.process_time() - began
                reference = heard(data)[0]
                other = heard(run("abc2midi", abc, ".abc", ".mid"))[0]
                scores.append(alike(reference, other))
                chars, notes = chars + len(abc), notes + len(reference.pitch)
            except (OSError, EOFError, RuntimeError, ValueError, IndexError, KeyError, lytk.LytkError,
                    subprocess.SubprocessError):
                scores.append(0.0)  # no text, or none that abc2midi reads
        found[name] = {"F8 by abc2midi": round(float(np.mean(scores)), 4),
                       "above .99": round(float(np.mean(np.array(scores) > .99)), 3),
                       "chars a note": round(chars / max(notes, 1), 2),
                       "ms": round(1e3 * seconds / len(files))}
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
        journal = data_root / "abc" / "journal.jsonl"
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
    parser.add_argument("--abcjs", type=int, default=0, help="play so many texts of each source with abcjs")
    parser.add_argument("--many", type=int, default=0, help="run the stage on so many files")
    parser.add_argument("--fuzz", type=int, default=0, help="convert so many mutants")
    parser.add_argument("--workers", type=int, default=2, help="of --many")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cfg, result = LakhMIDI.Cfg(), {}
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
                texts = []
                result[name] = fidelity(part, cfg, run, texts) | speed(spread(part, 300), cfg, folder)
                if args.rivals:
                    result[name]["rivals"] = rivals(spread(part, args.rivals), run)
                if args.abcjs:
                    chosen = [abc for _, abc in spread(texts, args.abcjs)]
                    result[name]["played alike by abcjs"] = played_by_abcjs(chosen)
                show(name, result[name])
            result["two workers"] = in_turn(spread(everything, 600), cfg, folder)
            show("two workers", result["two workers"])
    part = "many" if args.many else "fuzz" if args.fuzz else ""
    keep("convert", part, when=time.strftime("%Y-%m-%d"), **result)


if __name__ == "__main__":
    main()
