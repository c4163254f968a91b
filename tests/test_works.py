"""Near-duplicates: what must be one cluster, what must not, and a split that cuts none."""

import numpy as np
import pytest

import LakhMIDI as study
from LakhMIDI import NUM_PERM, Notes, cluster, leak_of_file_split, split_clusters


def tune(seed, length=300, tracks=3):
    """A made-up tune: random walks on a scale, one a track, and a drum track."""
    rng = np.random.default_rng(seed)
    step = rng.choice([-4, -2, -1, 1, 2, 3, 5], size=(tracks, length))
    pitch = np.r_[48 + np.abs(np.cumsum(step, axis=1)) % 36, np.full((1, length), 38)].ravel()
    track, onset = np.divmod(np.arange((tracks + 1) * length), length)
    return {"track": track, "onset": onset / 2.0, "duration": np.full(len(pitch), 0.5),
            "pitch": pitch, "is_drum": track == tracks}


def of(function, notes):
    columns = (notes[name] for name in ("track", "onset", "duration", "pitch"))
    return function(Notes(*columns), notes["is_drum"])


def take(notes, kept):
    return {name: values[kept] for name, values in notes.items()}


def joined(*parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def clusters(tunes, labels=None):
    signatures = np.array([of(study.fingerprint, notes) for notes in tunes])
    return cluster(signatures, np.array([of(study.content_hash, notes) for notes in tunes]), labels)


EDITS = {
    "transposed": lambda n: n | {"pitch": n["pitch"] + 5},
    "twice as slow": lambda n: n | {"onset": 2 * n["onset"], "duration": 2 * n["duration"]},
    "octaves per track": lambda n: n | {"pitch": n["pitch"] + 12 * (n["track"] % 2)},
    "one track left": lambda n: take(n, n["track"] == 1),
    "bars cut": lambda n: take(n, (n["onset"] < 40) | (n["onset"] > 70)),
    "first half": lambda n: take(n, n["onset"] < n["onset"].max() / 2),
    "bars added": lambda n: joined(take(tune(99), np.arange(30)), n | {"onset": n["onset"] + 16}),
    "by hand": lambda n: n | {"onset": n["onset"] + 0.03 * np.random.default_rng(0).random(len(n["onset"]))},
    "notes missing": lambda n: take(n, np.arange(len(n["pitch"])) % 25 > 0),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_tune_is_a_near_duplicate(name):
    tunes = [tune(seed) for seed in range(6)]
    names = clusters([*tunes, EDITS[name](tunes[3])])
    assert names[6] == names[3] and len(set(names[:6])) == 6


def test_content_hash_sees_the_notes_only():
    notes = tune(1)
    swapped = take(notes, np.random.default_rng(0).permutation(len(notes["pitch"])))
    swapped["track"] = 7 - swapped["track"]
    finer = notes | {"onset": notes["onset"] + 1 / 1000, "duration": notes["duration"] - 1 / 1000}
    same = of(study.content_hash, notes)
    assert {of(study.content_hash, n) for n in (swapped, finer, joined(notes, notes))} == {same}
    for name, change in (("pitch", 1), ("onset", 0.25), ("duration", 0.25)):
        other = notes | {name: notes[name] + change * (np.arange(len(notes["pitch"])) == 5)}
        assert of(study.content_hash, other) != same


def test_what_is_too_little_or_too_common_joins_nothing():
    drums = [take(tune(0), slice(900, 1000 + k)) for k in (0, 0, 1)]
    short = [take(tune(0), slice(k, k + 8)) for k in (0, 20)]
    names = clusters([*drums, *short])
    assert names[0] == names[1] and len(set(names)) == 4  # without melody only equal notes are a cluster
    bass, tunes = np.tile([36, 43, 36, 43, 41, 36, 43, 38], 40), [tune(seed, length=320) for seed in (1, 2)]
    for notes in tunes:
        notes["pitch"][320:640] = bass
    assert len(set(clusters(tunes))) == 2


def test_clusters_depend_on_labels_and_not_on_the_order_of_files():
    tunes = [tune(seed, length=60) for seed in range(12)]
    tunes += [EDITS["bars cut"](n) for n in tunes[:5]] + [n | {"track": n["track"] * 0} for n in tunes[:5]]
    order = np.random.default_rng(3).permutation(len(tunes))
    assert (clusters([tunes[i] for i in order]) == clusters(tunes)[order]).all()
    names = clusters([tune(seed) for seed in range(4)], ["a", "b", "a", "c"])
    assert names[0] == names[2] and len(set(names)) == 3


def test_a_chain_of_chance_falls_apart_and_a_tune_with_many_versions_does_not():
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**24, (450, NUM_PERM), dtype=np.uint32)  # sets of 256 shingles
    for i in range(1, 300):  # each a little like the one before
        signatures[i, i % 8::8] = signatures[i - 1, i % 8::8]
    signatures[300:, NUM_PERM // 4:] = signatures[300, NUM_PERM // 4:]  # versions of one tune
    names = cluster(signatures, np.array([f"{i:03d}" for i in range(450)]))
    assert np.unique(names[:300], return_counts=True)[1].max() <= 100 and len(set(names[300:])) == 1


def random_clusters(n):
    rng = np.random.default_rng(0)
    return rng.integers(0, n // 2, n).astype(str), rng.lognormal(8, 1, n)


def test_the_split_cuts_no_cluster_honours_the_fractions_and_moves_few_files_for_new_ones():
    names, chars = random_clusters(4000)
    side = split_clusters(names, chars, 0.05, 0.1, seed=0)
    assert len(np.unique([names, side], axis=1).T) == len(np.unique(names))
    for split, share in (("val", 0.05), ("test", 0.1)):
        assert chars[side == split].sum() / chars.sum() == pytest.approx(share, rel=0.1)
    order = np.random.default_rng(1).permutation(len(names))
    assert (split_clusters(names[order], chars[order], 0.05, 0.1, seed=0) == side[order]).all()
    assert (split_clusters(names, chars, 0.05, 0.1, seed=1) != side).any()
    fewer = split_clusters(names[:3600], chars[:3600], 0.05, 0.1, seed=0)
    assert (fewer != side[:3600]).mean() < 0.03


@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 1, 1000], [5, 900, 5, 5, 7], [1000] * 4])
def test_no_side_of_a_small_corpus_is_empty(sizes):
    side = split_clusters(np.arange(len(sizes)).astype(str), np.array(sizes), 0.01, 0.01, seed=0)
    assert set(side) == {"train", "val", "test"}
    assert side[np.argmax(sizes)] == "train" or len(set(sizes)) == 1


def test_the_leak_formula_agrees_with_a_simulation():
    names, chars = random_clusters(600)
    which, rng, shares = np.unique(names, return_inverse=True)[1], np.random.default_rng(0), []
    for _ in range(300):
        held = rng.random(len(names)) < 0.2
        shares.append((held & (np.bincount(which, weights=~held)[which] > 0)).sum() / held.sum())
    stated = leak_of_file_split(names, chars, 0.1, 0.1)["leaked_files"]
    assert stated == pytest.approx(np.mean(shares), abs=0.01)


def test_a_signature_is_the_same_on_every_machine():
    signature = of(study.fingerprint, tune(0))
    assert signature.dtype == np.uint32 and signature[:3].tolist() == [990012, 7663994, 5357367]


def test_a_test_set_that_no_model_could_read_is_told_before_training(tmp_path):
    rows = [{"file": f"{i}.mid", "abc": f"{i}.abc", "hash": f"{i:032x}", "n_chars": 50, "n_notes": 20,
             "seconds": 9.0, "f1": 1.0} for i in range(9)]
    for i, row in enumerate(rows):
        study.write_text(tmp_path / row["abc"], chr(ord("A") + i) * 50)
    study.write_jsonl(tmp_path / "report.jsonl", rows)
    signatures = np.random.default_rng(0).integers(0, 2**32, (9, NUM_PERM), np.uint32)
    np.save(tmp_path / "signatures.npy", signatures)
    with pytest.raises(study.UserError, match="every test tune"):
        study.tokenize.__wrapped__(study.Cfg(DATA_ROOT=tmp_path, ABC_ROOT=tmp_path))
