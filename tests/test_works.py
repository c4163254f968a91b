"""The near-duplicate groups: what must be one work, what must not, and a split that keeps works together."""

import numpy as np
import pytest

import LakhMIDI as study
from LakhMIDI import NUM_PERM, Notes, group_works, leak_of_file_split, split_groups


def content_hash(notes):
    return study.content_hash(*arrays(notes))


def fingerprint(notes):
    return study.fingerprint(*arrays(notes))


def arrays(notes):
    return Notes(*(notes[name] for name in ("track", "onset", "duration", "pitch"))), notes["is_drum"]


def tune(seed, length=300, tracks=3):
    """A made-up work: random walks on a scale, one a track, and a drum track."""
    rng = np.random.default_rng(seed)
    step = rng.choice([-4, -2, -1, 1, 2, 3, 5], size=(tracks, length))
    pitch = np.r_[48 + np.abs(np.cumsum(step, axis=1)) % 36, np.full((1, length), 38)].ravel()
    track, onset = np.divmod(np.arange((tracks + 1) * length), length)
    return {"track": track, "onset": onset / 2.0, "duration": np.full(len(pitch), 0.5),
            "pitch": pitch, "is_drum": track == tracks}


def take(notes, kept):
    return {name: values[kept] for name, values in notes.items()}


def jitter(notes):
    shift = np.random.default_rng(0).uniform(0, 0.03, len(notes["onset"]))
    return notes | {"onset": notes["onset"] + shift, "duration": notes["duration"] * 0.8}


def with_intro(notes):
    intro = take(tune(99), np.arange(30))
    later = notes | {"onset": notes["onset"] + 16}
    return {name: np.r_[intro[name], later[name]] for name in notes}


EDITS = {
    "transposed": lambda n: n | {"pitch": n["pitch"] + 5},
    "twice as slow": lambda n: n | {"onset": 2 * n["onset"], "duration": 2 * n["duration"]},
    "octaves per track": lambda n: n | {"pitch": n["pitch"] + 12 * (n["track"] % 2)},
    "one track left": lambda n: take(n, n["track"] == 1),
    "without drums": lambda n: take(n, ~n["is_drum"]),
    "bars cut": lambda n: take(n, (n["onset"] < 40) | (n["onset"] > 70)),
    "first half": lambda n: take(n, n["onset"] < n["onset"].max() / 2),
    "bars added": with_intro,
    "played by hand": jitter,
    "notes missing": lambda n: take(n, np.arange(len(n["pitch"])) % 25 > 0),
}


def groups(works):
    return group_works(np.array([fingerprint(n) for n in works]), np.array([content_hash(n) for n in works]))


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_work_is_the_same_work(name):
    works = [tune(seed) for seed in range(20)]
    ids = groups([*works, EDITS[name](works[3])])
    assert ids[20] == ids[3] and len(set(ids[:20])) == 20


def test_content_hash_sees_the_notes_only():
    notes = tune(1)
    swapped = take(notes, np.random.default_rng(0).permutation(len(notes["pitch"])))
    swapped["track"] = 7 - swapped["track"]
    finer = notes | {"onset": notes["onset"] + 1 / 1000, "duration": notes["duration"] - 1 / 1000}
    doubled = {name: np.r_[values, values] for name, values in notes.items()}
    assert {content_hash(n) for n in (notes, swapped, finer, doubled)} == {content_hash(notes)}
    for name, change in (("pitch", 1), ("onset", 0.25), ("duration", 0.25)):
        other = notes | {name: notes[name] + change * (np.arange(len(notes["pitch"])) == 5)}
        assert content_hash(other) != content_hash(notes)
    assert content_hash(take(notes, slice(0, 0)))  # a file without notes has a hash too


def test_without_melody_only_equal_notes_are_a_group():
    drums = [take(tune(0), slice(900, 1000 + k)) for k in (0, 0, 1)]
    short = [take(tune(0), slice(k, k + 8)) for k in (0, 20)]
    ids = groups([*drums, *short])
    assert ids[0] == ids[1] and len(set(ids)) == 4


def test_an_accompaniment_figure_does_not_make_two_works_one():
    bass = np.tile([36, 43, 36, 43, 41, 36, 43, 38], 40)
    works = [tune(seed, length=320) for seed in (1, 2)]
    for notes in works:
        notes["pitch"][320:640] = bass
    assert len(set(groups(works))) == 2


def test_groups_do_not_depend_on_the_order_of_files():
    works = [tune(seed, length=60) for seed in range(30)]
    works += [EDITS["bars cut"](n) for n in works[:10]] + [n | {"track": n["track"] * 0} for n in works[:5]]
    order = np.random.default_rng(3).permutation(len(works))
    assert (groups([works[i] for i in order]) == groups(works)[order]).all()


def test_a_label_joins_what_the_music_does_not():
    works = [tune(seed) for seed in range(4)]
    signatures, hashes = [fingerprint(n) for n in works], [content_hash(n) for n in works]
    ids = group_works(np.array(signatures), np.array(hashes), ["a", "b", "a", "c"])
    assert ids[0] == ids[2] and len(set(ids)) == 3


def test_a_chain_of_chance_falls_apart_and_a_work_with_many_versions_does_not():
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**24, (450, NUM_PERM), dtype=np.uint32)  # sets of 256 shingles
    for i in range(1, 300):  # each a little like the one before
        signatures[i, i % 8::8] = signatures[i - 1, i % 8::8]
    signatures[300:, NUM_PERM // 4:] = signatures[300, NUM_PERM // 4:]  # versions of one work
    ids = group_works(signatures, np.array([f"{i:03d}" for i in range(450)]))
    _, sizes = np.unique(ids[:300], return_counts=True)
    assert sizes.max() <= 100 and len(set(ids[300:])) == 1


def random_groups(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, n // 2, n).astype(str), rng.lognormal(8, 1, n)


def test_split_keeps_groups_together_and_honours_the_fractions():
    ids, chars = random_groups()
    side = split_groups(ids, chars, 0.05, 0.1, seed=0)
    assert all(len(set(side[ids == g])) == 1 for g in np.unique(ids))
    for name, share in (("val", 0.05), ("test", 0.1)):
        assert chars[side == name].sum() / chars.sum() == pytest.approx(share, rel=0.1)
    order = np.random.default_rng(1).permutation(len(ids))
    assert (split_groups(ids[order], chars[order], 0.05, 0.1, seed=0) == side[order]).all()
    assert (split_groups(ids, chars, 0.05, 0.1, seed=1) != side).any()


def test_split_moves_few_files_when_some_are_added():
    ids, chars = random_groups()
    before = split_groups(ids[:3600], chars[:3600], 0.05, 0.05, seed=0)
    after = split_groups(ids, chars, 0.05, 0.05, seed=0)[:3600]
    assert (before != after).mean() < 0.03


@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 1, 1000], [5, 900, 5, 5, 7], [1000] * 4])
def test_no_side_of_a_small_corpus_is_empty(sizes):
    side = split_groups(np.arange(len(sizes)).astype(str), np.array(sizes), 0.01, 0.01, seed=0)
    assert set(side) == {"train", "val", "test"}
    assert side[np.argmax(sizes)] == "train" or len(set(sizes)) == 1


def test_no_test_share_asked_for_is_no_test_file():
    ids, chars = random_groups()
    side = split_groups(ids, chars, 0.05, 0.0, seed=0)
    assert set(side) == {"train", "val"}
    assert chars[side == "val"].sum() / chars.sum() == pytest.approx(0.05, rel=0.1)


def test_the_leak_formula_agrees_with_a_simulation():
    ids, chars = random_groups(600)
    stated = leak_of_file_split(ids, chars, 0.1, 0.1)
    rng, shares = np.random.default_rng(0), []
    _, which = np.unique(ids, return_inverse=True)
    for _ in range(300):
        held = rng.random(len(ids)) < 0.2
        in_training = np.bincount(which, weights=~held)[which] > 0
        shares.append((held & in_training).sum() / held.sum())
    assert stated["leaked_files"] == pytest.approx(np.mean(shares), abs=0.01)
    assert leak_of_file_split(np.arange(9), np.ones(9), 0.1, 0.1)["leaked_files"] == 0


def test_a_signature_is_small_and_the_same_on_every_machine():
    signature = fingerprint(tune(0))
    assert signature.shape == (NUM_PERM,) and signature.dtype == np.uint32
    assert signature[:3].tolist() == [990012, 7663994, 5357367]
