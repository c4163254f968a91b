"""Sampling, judging, measuring: what is sampled is what the model says, what is judged valid is music."""

import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_midi

import LakhMIDI as study
from LakhMIDI import END, START, Cfg, UserError, check_abc, main, sample

HEADER = "X:1\nL:1/8\nM:4/4\nQ:1/4=120\nK:C\nV:1\n"
BARS = ["[V:1]CDEFGABc|\n", "[V:1]c2B2A2G2|\n", "[V:1]EFGAB2A2|\n", "[V:1]c8|\n"]
TUNE = HEADER + "".join(BARS)
CHARS = sorted(set("\n #%&'(),-/0123456789:=ABCDEFGIDKLMQVXZ[]^_abcdefghijklmnoprtuvz|"))
VOCAB = study.Vocab(("<start>", "<end>", "<unknown>", *CHARS))


def random_model(name, seq_len=32):
    torch.manual_seed(0)
    cfg = Cfg(STUDY="smoke", DEVICE="cpu", SEQ_LEN=seq_len)
    model = study.build_model(name, len(VOCAB.chars), cfg).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def slow_greedy(model, prompt, n, seq_len):
    """The likeliest continuation by n characters, the whole window read again for each."""
    ids, half, room = [START, *VOCAB.encode(prompt).tolist()], seq_len // 2, 0
    while len(ids) <= len(prompt) + n:
        if room < seq_len // 4:  # sampling looks at its tunes once for so many characters
            music = re.search(r"\n(?!%|[A-Za-z]:)[^\0]", VOCAB.decode(ids[1:]))  # not a field
            header = min(music.start() + 2, half * 3 // 4) if music else 1
            fits = len(ids) + seq_len // 4 <= seq_len + 1
            window = ids if fits else ids[:header] + ids[len(ids) - half + header :]
            left_out, room = len(ids) - len(window), seq_len + 1 - len(window)
        for _ in range(seq_len // 4):
            context = window + ids[left_out + len(window) :]
            with torch.no_grad():
                logits = model(torch.tensor([context]))[0][0, -1]
            logits[[START, study.UNKNOWN]] = -math.inf
            if (best := int(logits.argmax())) == END or len(ids) > len(prompt) + n:
                return VOCAB.decode(ids[1:])
            ids.append(best)
        room -= seq_len // 4
    return VOCAB.decode(ids[1:])


class Scripted(torch.nn.Module):
    """A model that says what `say(characters read, the last of them)` likes: {character: liking}, "" ends."""

    seq_len = 10**6

    def __init__(self, say):
        super().__init__()
        self.weight, self.say = torch.nn.Parameter(torch.zeros(1)), say

    def empty_state(self, batch, length):
        return [torch.zeros(batch, dtype=torch.long)]

    def forward(self, tokens, state):
        logits = torch.full((*tokens.shape, len(VOCAB.chars)), -99.0)
        for row, step in enumerate((state[0] + tokens.size(1)).tolist()):
            for char, liking in self.say(step, VOCAB.chars[tokens[row, -1]]).items():
                logits[row, -1, VOCAB.chars.index(char) if char else END] = liking
        return logits, [state[0] + tokens.size(1)]


# --- sampling


@pytest.mark.parametrize("name", ["gpt_16w", "lstm_20w"])
def test_cached_sampling_is_uncached_sampling_also_beyond_the_window(name):
    model, prompts = random_model(name), [HEADER + "[V:1]CD", "X:1\n", "abc"]
    found = sample(model, VOCAB, prompts, max_chars=100, temperature=0)
    for prompt, tune in zip(prompts, found, strict=True):
        assert tune["text"] == slow_greedy(model, prompt, 100, 32)
    assert max(len(tune["text"]) for tune in found) > 90


@pytest.mark.parametrize("name", ["gpt_16w", "lstm_20w"])
def test_a_row_does_not_depend_on_its_batch(name, monkeypatch):
    model, prompts = random_model(name), [TUNE, "X:1\n", TUNE[:60], "ab"]
    together = sample(model, VOCAB, prompts, max_chars=60, seed=5)
    assert together[:1] == sample(model, VOCAB, prompts[:1], max_chars=60, seed=5)
    assert together != sample(model, VOCAB, prompts, max_chars=60, seed=6)
    monkeypatch.setattr(study, "SAMPLE_BATCH", 2)  # the others wait for a place
    assert together == sample(model, VOCAB, prompts, max_chars=60, seed=5)


def test_temperature_top_k_and_top_p_narrow_the_choice_to_the_likeliest():
    shares = torch.tensor([[0.9, 0.01, 0.9, 0.4, 0.2, 0.39]] * 1000)  # start and unknown are never drawn
    chance = torch.tensor(np.random.default_rng(0).random(1000))

    def drawn(*rule):
        return study.draw(shares.log(), chance, *rule).tolist()

    assert set(drawn(0, 0, 1.0)) == set(drawn(1.0, 1, 1.0)) == set(drawn(1.0, 0, 0.3)) == {3}
    assert set(drawn(1.0, 0, 0.6)) == set(drawn(1.0, 2, 1.0)) == {3, 5}
    assert set(drawn(1.0, 0, 1.0)) == {END, 3, 4, 5}
    likely = [drawn(t, 0, 1.0).count(3) for t in (0.5, 1.0, 2.0)]
    assert likely[0] > likely[1] > likely[2] and likely[1] == pytest.approx(400, abs=50)


def test_a_tune_stops_at_its_end_and_a_prompt_of_unknown_characters_is_refused():
    model = Scripted(lambda step, last: {"" if step == 5 else "a": 9})
    assert sample(model, VOCAB, ["b"], temperature=0) == [{"text": "baaa", "ended": True}]
    assert sample(model, VOCAB, ["b"], temperature=0, max_chars=2) == [{"text": "baa", "ended": False}]
    with pytest.raises(UserError, match="'é'"):
        sample(model, VOCAB, ["X:1é"])


def test_valid_draws_a_bar_again_until_it_is_whole_and_gives_up_at_last(monkeypatch):
    def say(step, last):  # bars of any number of notes, eight on average
        if last in "|\n[V:1":
            return {dict(zip("|\n[V:1", "\n[V:1]", strict=True))[last]: 9}
        return {"|": 1, **dict.fromkeys("CDEFGABc", 1)}

    model = Scripted(say)
    for tune in sample(model, VOCAB, [TUNE] * 6, max_chars=200, seed=3, valid=True):
        assert tune["text"].startswith(TUNE) and not study.reader_faults(tune["text"])[0]
        assert tune["gave_up"] or tune["tries"] > tune["bars"] > 0
    free = sample(model, VOCAB, [TUNE] * 6, max_chars=200, seed=3)
    assert all(study.reader_faults(tune["text"])[0] for tune in free)
    (never,) = sample(Scripted(lambda step, last: {"C\n"[last == "C"]: 9}), VOCAB, [TUNE], valid=True)
    assert never == {"text": TUNE, "ended": False, "bars": 0, "tries": study.MAX_TRIES, "gave_up": True}
    monkeypatch.setattr(study, "LONGEST_BAR", 20)
    assert sample(Scripted(lambda step, last: {"C": 9}), VOCAB, [TUNE], valid=True) == [never]  # no bar line


# --- judging


def test_a_real_tune_is_valid():
    assert check_abc(TUNE) == {
        **{"valid": True, "reasons": [], "first_fault": "", "notes": 19, "pitches": 8},
        **{"header": True, "bars": 4, "right": 4, "repeats": 0},
    }


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("silent", HEADER + "[V:1]CCCCCCCC|\n" * 2),
        ("mostly_rests", HEADER + BARS[0] + "[V:1]Z9|\n"),
        ("bar_length", TUNE.replace("c2B2", "c2B")),
        ("bar_length", TUNE.replace("M:4/4", "M:3/4")),
        ("no_bar_line", TUNE.replace("|", "")),
        ("open_tie", TUNE.replace("c8|", "c8-|")),
        ("open_bracket", TUNE.replace("c8|", "[ce8|")),
        ("open_tuplet", TUNE.replace("c8|", "c6(3c|")),
        ("bad_char", TUNE.replace("c8|", "c8?|")),
        ("no_header", "".join(BARS)),
    ],
)
def test_what_is_wrong_fails_for_the_right_reason(reason, text):
    check = check_abc(text)
    assert not check["valid"] and reason in check["reasons"] and check["first_fault"] in check["reasons"]
    rng = random.Random(reason)
    assert not check_abc(HEADER + "".join(rng.choices("ABCDEFGabc[]|-&2348z(\n", k=300)))["valid"]


def test_a_cut_tune_is_judged_up_to_its_last_bar_and_a_prompt_is_not_counted():
    assert check_abc(TUNE + "[V:1]CDE", ended=False)["reasons"] == ["cut"]
    open_tie = TUNE.replace("A2G2|", "A2G2-|") + "[V:1]c"
    assert check_abc(open_tie, ended=False)["reasons"] == ["open_tie", "cut"]
    assert "silent" in check_abc(HEADER + "[V:1]CD", ended=False)["reasons"]
    assert "silent" in check_abc(TUNE + "[V:1]z8|\n" * 3, prompt=TUNE)["reasons"]
    assert check_abc(TUNE + "".join(BARS), prompt=TUNE)["valid"]


def test_bars_are_counted_in_every_voice_and_a_header_must_be_whole():
    two = HEADER + "V:2\n" + "[V:1]CDEFGABc|[V:2]C8|\n[V:1]CDEFGABc|[V:2]C7|\n[V:1]c8|[V:2]C8|\n"
    found = {"first_fault": "bar_length", "bars": 6, "right": 5, "repeats": 1}
    assert study.reader_faults(two)[1].items() >= found.items()
    for broken in (two.replace("L:1/8\n", ""), two[5:], two[: two.index("[")]):
        assert check_abc(two)["header"] and not check_abc(broken)["header"]
    found = {"header": True, "reasons": ["silent", "cut"], "first_fault": "silent", "bars": 0}
    assert check_abc(two[:two.index("|")], ended=False).items() >= found.items()  # cut in the first line


def test_ties_into_what_was_cut_are_no_fault_of_several_voices():
    head = "X:1\nL:1/8\nM:4/4\nQ:1/4=120\nK:C\nV:1\nV:2\n"
    lines = "[V:1]cdefgfed|[V:2]C4E4|\n[V:1]efgagfed|[V:2]G4E4|\n[V:1]c4d4-|[V:2]C8-|\n[V:1]d8"
    assert check_abc(head + lines, ended=False)["reasons"] == ["cut"]
    assert "open_tie" in check_abc(head + lines.rpartition("[V:1]")[0])["reasons"]


def test_abc2midi_judges_the_text_itself_and_a_judge_that_cannot_run_is_no_verdict(monkeypatch):
    read, wrong = study.read_abc, study.read_abc(TUNE)
    wrong = wrong._replace(notes=wrong.notes._replace(pitch=wrong.notes.pitch + 1))
    monkeypatch.setattr(study, "read_abc", lambda text: wrong if text == TUNE else read(text))
    assert check_abc(TUNE)["reasons"] == ["other_notes"]
    monkeypatch.undo()
    assert "abc2midi_error" in study.abc2midi_faults(TUNE.replace("c8|", "c8-|"))

    def not_run(*args, **kwargs):
        raise PermissionError("noexec")

    monkeypatch.setattr(study.subprocess, "run", not_run)
    with pytest.raises(PermissionError):  # which a stage tells in one line
        check_abc(TUNE)


# --- measuring


def test_metrics_of_a_tune_that_can_be_counted_by_hand():
    text = HEADER + "[V:1]CCGGAAGG|\n" * 2 + "[V:1][CE]4z4|\n[V:1]z8|\n"
    share = np.array([5, 8, 4, 1]) / 18
    assert study.music_metrics(study.read_abc(text)) == pytest.approx({
        "pitch_class_entropy": -(share * np.log2(share)).sum(), "scale_consistency": 1,
        "polyphony": 12 / 10,  # 8 beats of one note, 2 of two
        "groove_consistency": 1 - (0 + 7 + 1) / 48 / 3, "notes_per_beat": 18 / 16,
        "empty_bars": 1 / 4, "repeated_bars": 1 / 3,
    })
    assert study.music_metrics(study.read_abc(HEADER)) == {}


def test_shares_and_means_have_intervals_and_loops_count_only_as_far_as_real_tunes_repeat():
    found = study.share_of([True] * 81 + [False] * 182)  # Newcombe 1998, table I
    assert (found["lo"], found["hi"]) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    found = study.mean_of([*np.random.default_rng(0).normal(5, 1, 400), None], Cfg())
    reach = found["hi"] - found["value"], found["value"] - found["lo"]
    assert reach == pytest.approx((0.098, 0.098), abs=0.02)
    assert study.mean_of([None], Cfg())["value"] is None
    tune = {"run": "gpt_1M", "kind": "unprompted", "ended": True, "metrics": {}}
    tune |= {"copy": {"known": 0.0, "share": 0.0}, "check": check_abc(HEADER + BARS[0] * 10)}
    row = study.emergence_row([tune, tune], 0.1, 0.2, Cfg())
    assert row["bars_right"] == pytest.approx(0.1 + 0.2) and row["header"]["value"] == 1
    assert study.emergence_row([tune], 0.1, 0.9, Cfg())["bars_right"] == 1


def test_a_copy_is_found_in_another_key_and_speed_with_the_place_of_the_passage():
    def tune_of(seed, **change):
        notes, voices, *_ = study.read_score(make_midi(seed, **change))
        return notes, study.are_drums(notes, voices)

    holders = {}
    for seed in range(40):
        for shingle in study.melodic_shingles(*tune_of(seed)).tolist():
            holders.setdefault(shingle, []).append(f"{seed}.mid")

    def nearest(notes, drums):
        shingles, first, last = study.melody(notes, drums)
        return study.nearest_tune(holders, shingles, first // 4 + 1, last // 4 + 1)

    notes, drums = tune_of(7, transpose=5)
    slow = notes._replace(onset=2 * notes.onset, duration=2 * notes.duration)
    half = notes._replace(pitch=np.where(notes.onset < 32, notes.pitch, notes.pitch % 12 + 40))
    whole, slower, part = (nearest(changed, drums) for changed in (notes, slow, half))
    assert (whole["nearest"], whole["known"], whole["share"]) == ("7.mid", 1, 1)
    assert slower["share"] == 1 and slower["bars"][1] == pytest.approx(2 * whole["bars"][1], abs=1)
    assert part["nearest"] == "7.mid" and 0.2 < part["share"] < 0.8 and part["bars"][1] <= 9
    assert nearest(*tune_of(50))["share"] < 0.1


def test_a_damaged_twin_differs_in_one_bar_and_a_model_that_knows_the_tune_prefers_it():
    text = HEADER.replace("V:1\n", "") + "cdefgabc|\nC2D2E2F2|\nG4A4|\nB2c2d2e2|\nz8|\n"
    twins, place = study.twins(text, np.random.default_rng(0))
    assert twins["true"] == text and [*twins] == ["true", "pitch", "swap", "loop"] and text[place - 1] == "\n"
    bars = [twin.split("\n") for twin in twins.values()]
    assert [sum(a != b for a, b in zip(bars[0], bar, strict=True)) for bar in bars] == [0, 1, 2, 1]
    assert study.twins(text[:50], np.random.default_rng(0)) == ({}, 0)

    class Knows(Scripted):
        seq_len = 128

        def forward(self, tokens, state=None):
            logits = torch.zeros(*tokens.shape, len(VOCAB.chars))
            for i, char in enumerate(VOCAB.encode(text)[: tokens.size(1)]):
                logits[:, i, char] = 9
            return logits, None

    assert all(share["value"] == 1 for share in study.twin_shares(Knows(None), VOCAB, [text], Cfg()).values())


def test_every_character_has_its_kind():
    text = HEADER + "[V:1](3^CDE2z/4[ce]&G,2-|\n"
    ids = np.concatenate([[START], VOCAB.encode(text), [END]])
    kinds = [study.KINDS[kind] for kind in study.char_kinds(ids, VOCAB)]
    assert kinds[: len(HEADER) + 1] == ["header"] * (len(HEADER) + 1)
    runs = [f"{kind} {len(list(run))}" for kind, run in itertools.groupby(kinds[len(HEADER) + 1 :])]
    assert runs == (
        "voice_tag 5, other 2, accidental 1, pitch 3, length 1, rest 1, length 2, other 1, pitch 2, other 2, "
        "pitch 2, length 1, other 1, bar 2, end 1"
    ).split(", ")


def test_the_evaluation_of_a_study_balances(smoke):
    save = Path(smoke.SAVE_DIR)
    evaluation = study.read_json(save / "evaluation.json")
    tunes = list(study.read_jsonl(save / "samples.jsonl"))
    in_table = Counter((tune["run"], tune["kind"]) for tune in tunes if tune["kind"] != "same")
    assert {(row["run"], row["kind"]): row["n"] for row in evaluation["music"]} == in_table
    for row in evaluation["models"]:
        mean = sum(kind["share"] * kind["bits"] for kind in row["by_kind"].values())
        assert mean == pytest.approx(row["test_bpc"], rel=1e-4)
        assert row["bits_per_note"] > row["test_bpc"]
    tries = [row["tries"] for row in evaluation["music"] if row["kind"] == "valid"]
    assert len(tries) == len(evaluation["models"]) and all(n is None or n >= 1 for n in tries)
    for tune in study.read_json(save / "best_samples" / "metadata.json"):
        abc, midi = (save / "best_samples" / f"{tune['name']}.{kind}" for kind in ("abc", "mid"))
        heard, written = study.read_score(midi).notes.pitch, study.read_abc(abc.read_text()).notes.pitch
        assert 0.9 * len(written) <= len(heard) <= len(written)  # a sampled note may be too short to be heard


def test_a_training_tune_is_found_among_those_of_the_study(smoke):
    rows = list(study.read_jsonl(smoke.tokens_root / "tunes.jsonl"))
    file = next(row["file"] for row in rows if row["split"] == "train" and "artist" in row["file"])
    tune = study.read_abc(study.abc_path(file, smoke).read_text("utf-8"))
    (found,) = study.find_copies([study.melody(tune.notes, study.are_drums(tune.notes, tune.voices))], smoke)
    assert found["share"] == found["known"] == 1 and found["nearest"] == file


# --- on demand


def test_a_prompt_may_be_text_an_abc_or_a_midi_file(tmp_path):
    def read(name, **options):
        return study.read_prompt(str(tmp_path / name), Cfg(), **options)

    (tmp_path / "mine.mid").write_bytes(make_midi(1))
    begun, whole = read("mine.mid"), study.midi_to_abc(make_midi(1), Cfg())
    assert "\n%24\n" in begun and "\n%16\n" in whole  # a file of 16 bars: it goes on for 16 after the eighth
    assert re.sub(r"%\d+\n", "", whole).startswith(re.sub(r"%\d+\n", "", begun))
    assert [study.read_abc(read("mine.mid", bars=n)).n_bars for n in (8, 99)] == [8, 15]
    (tmp_path / "other.abc").write_text("X:1\nT:A title\nM:2/4\nL:1/8\nK:G\nGABc|d2BG|ABcA|G4|]\n")
    assert read("other.abc").endswith("%19\nGABc|\nd2BG|\nABcA|\n")
    (tmp_path / "motif.abc").write_text("X:1\nL:1/8\nM:4/4\nK:C\nCDEF|\n")
    assert len(study.read_abc(read("motif.abc")).notes.pitch) == 4
    assert study.read_prompt("X:1\\nL:1/8", Cfg()) == "X:1\nL:1/8"
    two = "X:1\nK:C\nV:1\nV:2\n{}[V:1]CDEF|[V:2]C4|\n[V:1]GA"
    assert study.read_prompt(two.format("%3\n"), Cfg()) == two.format("%18\n")
    assert study.is_abc_text(TUNE * 9) and not study.is_abc_text("mine.mid") and study.is_abc_text("")
    (tmp_path / "bad.mid").write_bytes(b"no music")
    for bad in ("bad.mid", "missing.mid", "score.musicxml", "song.mid.gz"):
        with pytest.raises(UserError, match=bad):
            read(bad)


def test_of_a_prompt_with_strange_voices_the_melody_is_taken(tmp_path, capsys):
    (tmp_path / "mine.mid").write_bytes(make_midi(1, program=40))
    notes = study.read_abc(study.midi_to_abc(make_midi(1, program=40), Cfg())).notes
    known = study.Vocab((), ("V:1", "V:2", "%%MIDI program 40", "%%MIDI program 50"))
    prompts = [study.read_prompt(str(tmp_path / "mine.mid"), Cfg(), vocab=vocab) for vocab in (known, VOCAB)]
    assert [len(study.read_abc(prompt).voices) for prompt in prompts] == [2, 1]
    assert "program 40" in capsys.readouterr().out and "program" not in prompts[1]
    melody = study.read_abc(prompts[1]).notes
    assert melody.pitch.tolist() == notes.pitch[(notes.voice == 0) & (notes.onset < 32)].tolist()


def test_the_command_line_goes_on_from_a_file_and_never_overwrites(smoke, tmp_path, capsys):
    (tmp_path / "mine.mid").write_bytes(make_midi(1))
    flags = ["--SAVE_DIR", smoke.SAVE_DIR, "--DEVICE", "cpu", "--SAMPLE_CHARS", "80"]
    prompted = ["--sample", "2", "--prompt", str(tmp_path / "mine.mid"), "--bars", "3", *flags]
    assert main(prompted) == 0 and main(prompted) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".mid" in line]
    paths = [Path(line.split(".mid")[0]) for line in lines]
    assert len(set(paths)) == 4 and all("mine_" in str(path.parent) for path in paths)
    prompt = study.read_prompt(str(tmp_path / "mine.mid"), Cfg(), bars=3)
    for line, path in zip(lines, paths, strict=True):
        assert path.with_suffix(".abc").read_text().startswith(prompt)
        assert "almost nothing" in line or "yours: bars 1-3, new from 0:06" in line
    assert main(["--sample", "1", "--prompt", "X:1\né", *flags]) == 2
    assert main(["--sample", "-2", *flags]) == main(["--sample", "0", *flags]) == 2
    assert main(["--sample", "1", "--SAVE_DIR", str(tmp_path)]) == 2
