"""Does `cluster` find the versions of a tune, only those, and in time? So its parameters were chosen.

    python benchmarks/bench_works.py pop909.zip nottingham.zip [more ...]            quality, some minutes
    python benchmarks/bench_works.py --scale pop909.zip nottingham.zip [more ...]    speed, memory, chains
    python benchmarks/bench_works.py --known-duplicates list.json data_lakh       recall against a public list

What counts as one work is known for the folders of POP909 (a song and its versions), for edits made here
(transposed, halved, cut ...), and hinted at by equal titles in the folk books bundled with music21, though a
title may name two tunes. Known to be different are pop songs and folk tunes. Prints tables. A public list of
Lakh's duplicates (github.com/jech2/LMD_Deduplication) names files by their md5, as Lakh's paths do; our
clusters are those of a study of Lakh that has come as far as tokenize.
"""
import argparse
import itertools
import json
import re
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH
from results import keep

sys.path.insert(0, str(Path(__file__).parents[1]))
import LakhMIDI as study

SWEEP = [{}, {"SHINGLE": 8}, {"SHINGLE": 10}, {"SHINGLE": 14}, {"NUM_PERM": 128}, {"NUM_PERM": 512},
         {"MIN_JACCARD": 1 / 64}, {"MIN_JACCARD": 1 / 32}, {"MIN_JACCARD": 1 / 8}, {"MIN_JACCARD": 1 / 4},
         {"MIN_COMMON": 5}, {"MIN_COMMON": 20}, {"MIN_PITCHES": 1}, {"MIN_PITCHES": 7}]


def load(archives):
    """[(corpus, label, Notes, drums)]; label: what is known to be one work."""
    files = []
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if study.is_midi(name):
                    song = re.search(r"POP909/(\d+)/", name)
                    label = f"{Path(path).stem} {song[1] if song else name}"
                    files.append((Path(path).stem, label, archive.read(name)))
    titles = folk_titles()
    for name, text in study.folk_tunes():
        try:
            files.append(("folk", titles[name], study.foreign_abc_to_midi(text)))
        except study.Skip:
            continue
    works = []
    for corpus, label, data in files:
        try:
            score = study.read_score(data)
        except study.Rejected:
            continue
        if len(score.notes.pitch) >= 8:
            works.append((corpus, label, score.notes, study.are_drums(score.notes, score.voices)))
    return works


def folk_titles():
    """{name of a folk tune: title, or the name itself where there is none}."""
    import music21
    titles = {}
    for folder in study.FOLK_BOOKS:
        for book in (Path(music21.__file__).parent / "corpus" / folder).glob("*.abc"):
            for tune in re.split(r"^(?=X:)", book.read_text("latin-1"), flags=re.M)[1:]:
                number = int(re.match(r"X:\s*(\d+)", tune)[1])
                name = f"{folder}/{book.stem}_{number:04d}.mid"
                title = re.search(r"^T:\s*(.+)", tune, re.M)
                plain = re.sub(r"[^a-z]", "", title[1].lower().removeprefix("the ")) if title else ""
                titles[name] = f"folk {plain}" if len(plain) > 5 and folder != "essenFolksong" else name
    return titles


def edits(notes, drums):
    """Versions of a work as they occur: {name: (Notes, drums)}."""
    half = notes.onset < notes.onset.max() / 2
    middle = (notes.onset < notes.onset.max() * 0.4) | (notes.onset > notes.onset.max() * 0.6)
    rng = np.random.default_rng(0)
    loud = notes.voice != Counter(notes.voice.tolist()).most_common(1)[0][0]
    kept = rng.random(len(half)) > 0.04

    def part(mask):
        return study.Notes(*(column[mask] for column in notes)), drums[mask]

    return {"transposed": (notes._replace(pitch=notes.pitch + 3), drums),
            "half tempo": (notes._replace(onset=2 * notes.onset, duration=2 * notes.duration), drums),
            "by hand": (notes._replace(onset=notes.onset + rng.uniform(0, 0.03, len(half))), drums),
            "first half": part(half), "middle cut": part(middle), "4 % of notes lost": part(kept),
            "busiest track lost": part(loud)}


def describe(works):
    music = [(notes, drums) for _, _, notes, drums in works]
    return (np.array([study.fingerprint(*one) for one in music]),
            np.array([study.content_hash(*one) for one in music]))


def n_pairs(labels):
    return sum(k * (k - 1) // 2 for k in Counter(labels).values())


def score(groups, works, edited, n_edits):
    """Precision and recall of pairs in POP909, recall of titles and edits, false pairs of pop and folk."""
    out, groups = {}, np.asarray(groups).tolist()
    for corpus in ("pop909", "folk"):
        rows = [(groups[i], label) for i, (name, label, *_) in enumerate(works) if name == corpus]
        both, found = n_pairs(rows), n_pairs(group for group, _ in rows)
        out[f"{corpus} recall"] = both / max(1, n_pairs(label for _, label in rows))
        if corpus == "pop909":
            out["pop909 precision"] = both / max(1, found)
    hits = [groups[i] == groups[origin] for i, origin in edited]
    out["edits recall"] = np.mean(hits)
    corpora = {}
    for group, (corpus, _, _, _) in zip(groups[:len(groups) - n_edits], works, strict=False):
        corpora.setdefault(group, Counter())[corpus] += 1
    out["pop-folk pairs"] = sum(c["pop909"] * (c["folk"] + c["nottingham"]) for c in corpora.values())
    out["largest"] = max(Counter(groups).values())
    return out


def lsh_groups(works, threshold):
    """The usual way: datasketch's MinHashLSH at a threshold, what it finds joined into groups."""
    index, parent = MinHashLSH(threshold=threshold, num_perm=study.NUM_PERM), list(range(len(works)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, (_, _, notes, drums) in enumerate(works):
        sketch = MinHash(num_perm=study.NUM_PERM, hashfunc=int)
        sketch.update_batch(study.melodic_shingles(notes, drums).tolist() or [i])
        for other in index.query(sketch):
            parent[root(int(other))] = root(i)
        index.insert(str(i), sketch)
    return [root(i) for i in range(len(works))]


def quality(works):
    """Rows of {method, precision, recall ...}: the sweep of parameters and the rivals."""
    sample = np.random.default_rng(0).choice(len(works), 400, replace=False)
    edited, everything = [], list(works)
    for i in sample.tolist():
        for name, (notes, drums) in edits(*works[i][2:]).items():
            if len(notes.pitch) >= 40:
                edited.append((len(everything), i))
                everything.append(("edit", name, notes, drums))
    n_edits, rows = len(edited), []
    for change in SWEEP:
        before = {name: getattr(study, name) for name in change}
        for name, value in change.items():
            setattr(study, name, value)
        signatures, hashes = describe(everything)
        began = time.process_time()
        groups = study.cluster(signatures, hashes)
        seconds = time.process_time() - began
        method = ", ".join(f"{k} {v:.4g}" for k, v in change.items()) or "as it is"
        rows.append({"method": method, **score(groups, everything, edited, n_edits), "seconds": seconds})
        if not change:
            by_edit = Counter((everything[i][1], bool(groups[i] == groups[origin])) for i, origin in edited)
            rows[-1]["edits"] = {name: by_edit[name, True] / (by_edit[name, True] + by_edit[name, False])
                                 for name in dict.fromkeys(name for name, _ in by_edit)}
            rows.append({"method": "equal notes", **score(hashes, everything, edited, n_edits)}
                        | {"seconds": 0.0})
        for name, value in before.items():
            setattr(study, name, value)
    for threshold in (0.5, 0.2):
        began = time.process_time()
        groups = lsh_groups(everything, threshold)
        rows.append({"method": f"MinHashLSH {threshold}", **score(groups, everything, edited, n_edits),
                     "seconds": time.process_time() - began})
    return rows


def imitations(works, n, order, length=300, seed=0):
    """(n, NUM_PERM) signatures of melodies that a Markov chain makes of the intervals of all works.

    They share the habits of real music and are no versions of each other: what is grouped is chance.
    """
    lines = [np.diff(notes.pitch[(notes.voice == notes.voice[0]) & ~drums]) for _, _, notes, drums in works]
    stream = np.concatenate(lines).astype(np.int64)
    context = np.zeros(len(stream) - order, np.uint64)
    for k in range(order):
        context = context * np.uint64(0x9E3779B97F4A7C15) + stream[k:k + len(context)].astype(np.uint64)
    _, context = np.unique(context, return_inverse=True)
    by_context = np.argsort(context, kind="stable")
    first = np.searchsorted(context[by_context], np.arange(context.max() + 2))
    rng = np.random.default_rng(seed)
    place = rng.integers(0, len(context) - 1, n)
    steps = np.empty((n, length), np.int64)
    for t in range(length):
        state = context[place]
        chosen = by_context[first[state] + (rng.random(n) * (first[state + 1] - first[state])).astype(int)]
        steps[:, t] = stream[chosen + order]
        place = np.minimum(chosen + 1, len(context) - 1)
    signatures, beats = [], np.arange(length + 1) / 2
    for row in steps:
        pitch = (np.cumsum(np.append(0, row)) + 600) % 128  # a fold is rare and as good as a leap
        notes = study.Notes(np.zeros(length + 1, int), beats, np.full(length + 1, 0.5), pitch)
        signatures.append(study.fingerprint(notes, np.zeros(length + 1, bool)))
    return np.array(signatures)


def chains(works, n=100_000):
    """How the largest group grows with the number of files: real ones, then real ones and imitations."""
    signatures, hashes = describe(works)
    order, rows = np.random.default_rng(0).permutation(len(works)), []
    for share in (8, 4, 2, 1):
        part = order[:len(works) // share]
        groups = study.cluster(signatures[part], hashes[part])
        rows.append({"files": f"{len(part):,} real", **sizes(groups)})
    for k in (3, 4, 5):
        groups = study.cluster(imitations(works, n, k), np.array([f"made {i}" for i in range(n)]))
        rows.append({"files": f"{n:,} imitations of order {k}", **sizes(groups)})
    return rows


def sizes(groups):
    """The largest group, and the share of files that have another in theirs."""
    count = np.unique(groups, return_counts=True)[1]
    return {"largest": int(count.max()), "grouped": count[count > 1].sum() / len(groups)}


def scale():
    """Seconds and memory of cluster on made-up signatures, a third of the files in groups."""
    rows, rng = [], np.random.default_rng(0)
    for n in (20_000, 100_000, 176_581):
        signatures = rng.integers(0, 2**32 // 300, (n, study.NUM_PERM), dtype=np.uint32)
        version_of = np.where(rng.random(n) < 0.33, rng.integers(0, n // 4, n), np.arange(n))
        copied = rng.random((n, study.NUM_PERM)) < 0.3
        signatures = np.where(copied, signatures[version_of], signatures)
        common = rng.random((n, study.NUM_PERM)) < 0.02  # shingles that many works have, such as a scale
        signatures[common] = rng.integers(0, 100, common.sum())
        hashes = np.array([f"{i:032x}" for i in range(n)])
        tracemalloc.start()
        began = time.process_time()
        groups = study.cluster(signatures, hashes)
        rows.append({"files": n, "seconds": time.process_time() - began,
                     "signatures MB": signatures.nbytes / 1e6,
                     "peak MB": tracemalloc.get_traced_memory()[1] / 1e6, **sizes(groups)})
        tracemalloc.stop()
    return rows


def show(rows):
    names = [name for name in rows[0] if name != "edits"]
    print(" | ".join(names))
    for row in rows:
        cells = (f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names)
        print(" | ".join(cells))


def known_duplicates(path, data_root):
    """How many of the pairs in a list of LMD_Deduplication, of files that the study has, are in one cluster.

    The list is {file: [files]} or {title: {"survived_file": file, "remove_file_list": [files]}}, a file being
    first digit, "__", md5.
    """
    groups = {}
    for row in study.read_jsonl(Path(data_root, "tokens", "tunes.jsonl")):
        groups[Path(row["file"]).stem] = row["group"]
    pairs = hits = files = present = 0
    for key, entry in json.loads(Path(path).read_text("utf-8")).items():
        if isinstance(entry, dict):
            key, entry = entry["survived_file"], entry["remove_file_list"]
        names = {name.rsplit("__", 1)[-1] for name in (key, *entry)}
        found = [groups[name] for name in names if name in groups]
        files, present = files + len(names), present + len(found)
        for first, second in itertools.combinations(found, 2):
            pairs, hits = pairs + 1, hits + (first == second)
    if not pairs:
        sys.exit(f"none of the {files} files in {path} has a partner in {data_root}: is it Lakh, tokenised?")
    return {"files": files, "present": present, "pairs": pairs, "recall": hits / pairs}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("archives", nargs="+", help="ZIPs of MIDI files; a DATA_ROOT with --known-duplicates")
    parser.add_argument("--known-duplicates", metavar="FILE", help="a JSON list of LMD_Deduplication")
    parser.add_argument("--scale", action="store_true", help="speed, memory and chains instead of quality")
    args = parser.parse_args()
    if args.known_duplicates:
        show([known_duplicates(args.known_duplicates, args.archives[0])])
        return
    works = load(args.archives)
    files = dict(Counter(corpus for corpus, *_ in works))
    print(files)
    if args.scale:
        rows, links = scale(), chains(works)
        show(rows)
        show(links)
        keep("works", "scale", files=files, scale=rows, chains=links)
        return
    rows = quality(works)
    show(rows)
    print("recall by edit:", {name: round(share, 3) for name, share in rows[0]["edits"].items()})
    keep("works", "quality", files=files, quality=rows)


if __name__ == "__main__":
    main()
