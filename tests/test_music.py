"""Sampling, judging, measuring: what is sampled is what the model says, what is judged valid is music."""

import math
import re
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
    """The likeliest continuation by n characters, the whole context read again for each."""
    todo, ids, context, half = VOCAB.encode(prompt).tolist(), [START], [START], seq_len // 2
    with torch.no_grad():
        while len(ids) <= len(prompt) + n:
            logits = model(torch.tensor([context]))[0][0, -1]
            logits[[START, study.UNKNOWN]] = -math.inf
            best = todo.pop(0) if todo else int(logits.argmax())
            if best == END:
                break
            ids, context = [*ids, best], [*context, best]
            if len(context) > seq_len:
                music = re.search(r"\n(?!%|[A-Za-z]:)[^\0]{2}", VOCAB.decode(ids))  # not a field
                header = min(music.start() + 2, half * 3 // 4) if music else 0
                context = ids[:header] + ids[len(ids) - half + header :]
    return VOCAB.decode(ids)


class Noise(torch.nn.Module):
    """A model that knows nothing, with a liking for what makes notation hard."""

    seq_len = 10**6

    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generator = torch.Generator().manual_seed(seed)

    def empty_state(self, batch, length):
        return 0

    def forward(self, tokens, state):
        logits = 2 * torch.randn(*tokens.shape, len(VOCAB.chars), generator=self.generator)
        logits[..., VOCAB.encode("-|&")] += 2
        logits[..., VOCAB.encode("VQM")] -= 4
        logits[..., END] -= 6
        return logits, 0


# --- sampling


@pytest.mark.parametrize("name", ["gpt_16w", "lstm_20w"])
def test_cached_sampling_is_uncached_sampling_also_beyond_the_window(name):
    model, prompts = random_model(name), [HEADER + "[V:1]CD", "X:1\n", "abc"]
    found = sample(model, VOCAB, prompts, max_chars=100, temperature=0)
    for prompt, tune in zip(prompts, found, strict=True):
        assert tune["text"] == slow_greedy(model, prompt, 100, 32)
    assert max(len(tune["text"]) for tune in found) > 90


def test_a_renewed_window_keeps_the_header_of_any_abc():
    header = "X:1\nM:4/4\n%%MIDI program 5\nK:Gmaj\n"
    for music in ("|:GABc dedB|\n" * 20, "[V:1]GABcdedB|\n" * 20, "GABc dedB|\n" * 20):
        tokens = VOCAB.encode(header + music)[None]
        kept = VOCAB.decode(study.window_after(tokens, 128, VOCAB)[0])
        assert kept.startswith(header) and kept[len(header):] == music[-(len(kept) - len(header)):]


@pytest.mark.parametrize("name", ["gpt_16w", "lstm_20w"])
def test_a_row_does_not_depend_on_its_batch(name):
    model, prompts = random_model(name), [TUNE, "X:1\n", TUNE[:60], "ab"]
    together = sample(model, VOCAB, prompts, max_chars=60, seed=5)
    assert together[:1] == sample(model, VOCAB, prompts[:1], max_chars=60, seed=5)
    assert together[:2] == sample(model, VOCAB, prompts[:2], max_chars=60, seed=5)
    assert together == sample(model, VOCAB, prompts, max_chars=60, seed=5)
    assert together != sample(model, VOCAB, prompts, max_chars=60, seed=6)


def test_temperature_top_k_and_top_p_narrow_the_choice_to_the_likeliest():
    logits = np.tile(np.log([[0.1, 0.1, 0.1, 0.4, 0.2, 0.1]]), (1000, 1))
    chance = np.random.default_rng(0).random(1000)
    assert set(study.draw(logits, chance, 0, 0, 1.0)) == {3}
    assert set(study.draw(logits, chance, 1.0, 1, 1.0)) == {3}
    assert set(study.draw(logits, chance, 1.0, 0, 0.5)) == {3, 4}
    assert set(study.draw(logits, chance, 1.0, 0, 1.0)) == set(range(6))
    share = [np.mean(study.draw(logits, chance, t, 0, 1.0) == 3) for t in (0.5, 1.0, 2.0)]
    assert share[0] > share[1] > share[2] and share[1] == pytest.approx(0.4, abs=0.05)
    assert set(study.pick(logits.copy(), chance, (1.0, 0, 1.0), [])) == {END, 3, 4, 5}


def test_a_tune_stops_at_its_end_and_a_prompt_of_unknown_characters_is_refused():
    class Ending(Noise):
        def forward(self, tokens, state):
            logits = torch.zeros(*tokens.shape, len(VOCAB.chars))
            logits[..., END if state == 3 else VOCAB.encode("a")[0]] = 9
            return logits, state + 1

    assert sample(Ending(0), VOCAB, ["b"], temperature=0) == [{"text": "baaa", "ended": True, "forced": 0}]
    assert sample(Ending(0), VOCAB, ["b"], temperature=0, max_chars=2) == [
        {"text": "baa", "ended": False, "forced": 0}
    ]
    with pytest.raises(UserError, match="'é'"):
        sample(Ending(0), VOCAB, ["X:1é"])


def test_a_grammar_makes_whole_tunes_even_of_noise():
    for tune in sample(Noise(1), VOCAB, ["", "", "", TUNE], max_chars=400, constrained=True):
        parsed = study.read_abc(tune["text"])
        assert tune["ended"] and parsed.problems == [] and parsed.n_bars and tune["forced"] > 100


def test_a_grammar_follows_what_the_converter_writes_and_nothing_else():
    for seed in range(5):
        study.Grammar(VOCAB, study.midi_to_abc(make_midi(seed), Cfg()), 0)
    for wrong in (
        "X:2",
        HEADER + "[V:1]CDEFGABc2",
        HEADER + "[V:1]CDEF|",
        HEADER + BARS[0] + "[V:2]",
        "T:name\n",
        HEADER + "[V:1]C6D2-|\n[V:1]E8|",
        HEADER + "[V:1](3CDE2",
    ):
        with pytest.raises(UserError, match="constrained"):
            study.Grammar(VOCAB, wrong, 0)


# --- judging


def test_a_real_tune_is_valid():
    assert check_abc(TUNE) == {
        "valid": True,
        "reasons": [],
        "notes": 19,
        "pitches": 8,
        "bars": 4,
        "bad_bars": 0,
    }
    assert check_abc(study.midi_to_abc(make_midi(3), Cfg()))["valid"]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("silent", HEADER + "[V:1]z8|\n" * 4),
        ("silent", HEADER + "[V:1]CCCCCCCC|\n" * 2),
        ("mostly_rests", HEADER + BARS[0] + "[V:1]Z9|\n"),
        ("mostly_rests", HEADER + BARS[0] + "[V:1]z8|\n" * 9),
        ("bar_length", TUNE.replace("c2B2", "c2B")),
        ("bar_length", TUNE.replace("M:4/4", "M:3/4")),
        ("open_tie", TUNE.replace("c8|", "c8-|")),
        ("open_tie", TUNE.replace("A2G2|", "A2G2-|")),
        ("open_bracket", TUNE.replace("c8|", "[ce8|")),
        ("open_tuplet", TUNE.replace("c8|", "c6(3c|")),
        ("bad_char", TUNE.replace("c8|", "c8?|")),
        ("no_header", "".join(BARS)),
    ],
)
def test_what_is_wrong_fails_for_the_right_reason(reason, text):
    check = check_abc(text)
    assert not check["valid"] and reason in check["reasons"]


def test_a_cut_tune_is_judged_up_to_its_last_bar_and_counted_as_cut():
    assert check_abc(TUNE + "[V:1]CDE", ended=False)["reasons"] == ["cut"]
    assert check_abc(TUNE.replace("c8|", "c8-|") + "[V:1]c", ended=False)["reasons"] == ["cut"]
    assert check_abc(TUNE.replace("A2G2|", "A2G2-|") + "[V:1]c", ended=False)["reasons"] == [
        "open_tie",
        "cut",
    ]
    assert "silent" in check_abc(HEADER + "[V:1]CD", ended=False)["reasons"]


def test_a_prompt_is_not_counted_as_composed():
    assert "silent" in check_abc(TUNE, prompt=TUNE)["reasons"]
    assert "silent" in check_abc(TUNE + "[V:1]z8|\n" * 3, prompt=TUNE)["reasons"]
    assert check_abc(TUNE + "".join(BARS), prompt=TUNE)["valid"]


def test_voices_in_unison_are_valid():
    header = HEADER + "V:2\n%%MIDI program 40\n"
    assert check_abc(header + "".join(bar[:-1] + bar.replace("V:1", "V:2") for bar in BARS))["valid"]


def test_a_reader_that_finds_other_notes_is_a_reason(monkeypatch):
    monkeypatch.setattr(study, "music21_notes", lambda text: study.read_abc(TUNE.replace("c8", "z8")).notes)
    assert check_abc(TUNE)["reasons"] == ["music21"]


def test_wilson_interval_has_its_textbook_values():
    found = study.wilson(81, 263)  # Newcombe 1998, table I
    assert (found["lo"], found["hi"]) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert study.wilson(10, 10)["hi"] == 1 and study.wilson(0, 0)["value"] is None


# --- measuring


def test_metrics_of_a_tune_that_can_be_counted_by_hand():
    text = HEADER + "[V:1]CCGGAAGG|\n" * 2 + "[V:1][CE]4z4|\n[V:1]z8|\n"
    found = study.music_metrics(study.read_abc(text))
    share = np.array([5, 8, 4, 1]) / 18
    assert found["pitch_class_entropy"] == pytest.approx(-(share * np.log2(share)).sum())
    assert found["scale_consistency"] == 1 and found["notes_per_beat"] == 18 / 16
    assert found["polyphony"] == pytest.approx(12 / 10)  # 8 beats of one note, 2 of two
    assert found["repeated_bars"] == pytest.approx(1 / 3) and found["empty_bars"] == 1 / 4
    assert found["groove_consistency"] == pytest.approx(1 - (0 + 7 + 1) / 48 / 3)
    assert study.music_metrics(study.read_abc(HEADER)) == {}


def test_a_copied_tune_is_caught_in_another_key_and_speed():
    def tune_of(seed, **change):
        notes, voices = study.score_notes(study.read_score(make_midi(seed, **change)))
        return notes, np.array([drum for _, drum in voices])

    corpus = np.concatenate([study.melody(*tune_of(seed)) for seed in range(40)])
    others = study.longest_runs([study.melody(*tune_of(seed)) for seed in range(40, 60)], corpus)
    notes, drums = tune_of(7, transpose=5)
    slow = notes._replace(onset=2 * notes.onset, duration=2 * notes.duration)
    half = notes._replace(pitch=np.where(notes.onset < 32, notes.pitch, notes.pitch % 12 + 40))
    copies = study.longest_runs([study.melody(n, drums) for n in (notes, slow, half)], corpus)
    assert copies[0] == copies[1] > copies[2] > others.max()
    length = len(study.melody(notes, drums)) // 2
    assert copies[0] > length / 2


def test_longest_runs_are_those_of_an_exhaustive_search():
    rng = np.random.default_rng(0)
    corpus, tunes = (
        rng.integers(0, 4, 3000).astype(np.uint8),
        [rng.integers(0, 4, n).astype(np.uint8) for n in (0, 1, 9, 80)],
    )
    tunes.append(corpus[100:180].copy())
    text = corpus.tobytes()
    expected = [
        max(
            (
                j - i
                for i in range(len(t))
                for j in range(i, len(t) + 1)
                if 0 not in t[i:j] and t[i:j].tobytes() in text
            ),
            default=0,
        )
        for t in tunes
    ]
    assert (study.longest_runs(tunes, corpus) - 1).tolist() == expected


def test_every_character_has_its_kind():
    text = HEADER + "[V:1](3^CDE2z/4[ce]&G,2-|\n"
    ids = np.concatenate([[START], VOCAB.encode(text), [END]])
    kinds = [study.KINDS[kind] for kind in study.char_kinds(ids, VOCAB)]
    assert kinds[: len(HEADER) + 1] == ["header"] * (len(HEADER) + 1)
    assert kinds[len(HEADER) + 1 :] == [
        *["voice_tag"] * 5,
        *["other"] * 2,
        "accidental",
        *["pitch"] * 3,
        "length",
        "rest",
        *["length"] * 2,
        "other",
        *["pitch"] * 2,
        *["other"] * 2,
        *["pitch"] * 2,
        "length",
        "other",
        *["bar"] * 2,
        "end",
    ]


def test_the_evaluation_of_a_study_balances(smoke):
    save = Path(smoke.SAVE_DIR)
    evaluation = study.read_json(save / "evaluation.json")
    tunes = list(study.read_jsonl(save / "samples.jsonl"))
    assert sum(row["n"] for row in evaluation["music"]) == len(tunes)
    assert {row["run"] for row in evaluation["music"]} == {
        "real",
        *(row["run"] for row in evaluation["models"]),
    }
    for row in evaluation["models"]:
        mean = sum(kind["share"] * kind["bits"] for kind in row["by_kind"].values())
        assert mean == pytest.approx(row["test_bpc"], rel=1e-4)
        assert row["bits_per_note"] > row["test_bpc"]
    real = next(row for row in evaluation["music"] if row["kind"] == "real")
    assert real["valid_or_cut"]["value"] == 1
    for tune in study.read_json(save / "best_samples" / "metadata.json"):
        files = [save / "best_samples" / f"{tune['name']}.{kind}" for kind in ("abc", "mid")]
        assert all(path.exists() for path in files)
        assert len(study.score_notes(study.read_score(files[1]))[0].pitch) == len(
            study.read_abc(files[0].read_text()).notes.pitch
        )


# --- on demand


def test_a_prompt_may_be_text_an_abc_or_a_midi_file(tmp_path):
    (tmp_path / "mine.mid").write_bytes(make_midi(1))
    whole = study.midi_to_abc(make_midi(1), Cfg())
    prompt = study.read_prompt(str(tmp_path / "mine.mid"), Cfg())
    assert whole.startswith(prompt) and prompt.endswith("|\n") and whole.count("\n") - prompt.count("\n") == 1
    (tmp_path / "other.abc").write_text("X:1\nT:A title\nM:2/4\nL:1/8\nK:G\nGABc|d2BG|ABcA|G4|]\n")
    assert study.read_prompt(str(tmp_path / "other.abc"), Cfg()).endswith("[V:1]d2BG|\n[V:1]ABcA|\n")
    assert study.read_prompt("X:1\\nL:1/8", Cfg()) == "X:1\nL:1/8"
    (tmp_path / "bad.mid").write_bytes(b"no music")
    for bad in ("bad.mid", "missing.mid"):
        with pytest.raises(UserError, match=bad):
            study.read_prompt(str(tmp_path / bad), Cfg())


def test_the_command_line_writes_tunes(smoke, tmp_path, capsys):
    (tmp_path / "mine.mid").write_bytes(make_midi(1))
    flags = ["--SAVE_DIR", smoke.SAVE_DIR, "--DEVICE", "cpu", "--SAMPLE_CHARS", "80", "--constrained"]
    assert main(["--sample", "2", "--prompt", str(tmp_path / "mine.mid"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        path = Path(line.split(".mid")[0])
        prompt = study.read_prompt(str(tmp_path / "mine.mid"), Cfg())
        assert path.with_suffix(".abc").read_text().startswith(prompt)
        assert len(study.score_notes(study.read_score(path.with_suffix(".mid")))[0].pitch) > 20
    assert main(["--sample", "1", "--prompt", "X:1\né", *flags]) == 2
    assert main(["--sample", "1", "--SAVE_DIR", str(tmp_path)]) == 2
