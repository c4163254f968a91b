"""Models and training: what is counted is there, what is interrupted goes on, what is measured is the whole."""
import math

import numpy as np
import pytest
import torch
from tqdm import tqdm

import LakhMIDI as study
from LakhMIDI import Cfg, UserError


@pytest.fixture
def tiny(tmp_path):
    """A study of one tiny model per family on random tokens, as far as the train stage needs one."""
    cfg = Cfg(DATA_ROOT=tmp_path / "data", SAVE_DIR=tmp_path / "runs", STUDY="smoke", DEVICE="cpu", SEQ_LEN=16,
              BATCH_TOKENS=64, TRAIN_TOKENS_TARGET=64 * 20, MODELS=("gpt_8w", "lstm_10w"), SAVE_EVERY_S=0.0)
    rng, vocab = np.random.default_rng(0), study.Vocab(("<start>", "<end>", "<unknown>", *"abcdefg"))
    cfg.tokens_root.mkdir(parents=True)
    for split, n in (("train", 3_000), ("val", 500), ("test", 500)):
        tokens = rng.integers(3, 10, n).astype(np.uint8)
        tokens[::50] = study.END
        tokens.tofile(cfg.tokens_root / f"{split}.bin")
    study.write_json(cfg.tokens_root / "vocab.json", {"chars": vocab.chars})
    return cfg, vocab


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_parameter_counts_by_formula(family):
    cfg = Cfg(STUDY="cpu", DEVICE="cpu")
    for size in cfg.ladder:
        if size.family == family:
            model = study.build_model(size, 60, cfg)
            counts = study.count_params(model)
            biases = 8 * size.layers * size.width if family == "lstm" else 0
            assert counts["n_fit"] == model.matmul_params() + biases
            assert counts["n_params"] == counts["n_fit"] + 60 * size.width


def test_flops_of_the_transformer_match_torch():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Cfg(STUDY="cpu", DEVICE="cpu")
    model = study.build_model("gpt_25K", 60, cfg)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(2, cfg.seq_len, dtype=torch.long))[0]
        logits.sum().backward()
    attention = 6 * model.size.layers * cfg.seq_len * model.size.width  # a causal kernel does half; torch counts all
    counted = counter.get_total_flops() / (2 * cfg.seq_len)
    assert counted == pytest.approx(model.flops_per_token() + attention, rel=1e-6)


def test_the_ladders_match_between_families():
    for name in ("cpu", "full"):
        sizes = {size.name: study.build_model(size, 96, Cfg(STUDY=name, DEVICE="cpu")).matmul_params()
                 for size in study.STUDIES[name].ladder}
        for lstm in (n for n in sizes if n.startswith("lstm")):
            assert sizes[lstm] == pytest.approx(sizes[lstm.replace("lstm", "gpt")], rel=0.15)


def test_the_schedule_rises_stays_and_falls_to_nothing():
    cfg = Cfg(STUDY="cpu", DEVICE="cpu", TRAIN_TOKENS_TARGET=4096 * 1000)
    shares = [study.lr_scale(step, 1000, cfg) for step in range(1, 1001)]
    assert max(shares) == 1 and 0 < shares[0] < 0.1
    assert shares[100:800] == [1.0] * 700
    assert all(a > b for a, b in zip(shares[800:], shares[801:], strict=False)) and 0 < shares[-1] < 0.01
    assert [study.lr_scale(step, 0, cfg) for step in (100, 900)] == [1, 1]


def test_every_window_once_per_epoch():
    starts = np.concatenate([study.batch_starts(1000, 16, 4, step, 7) for step in range(61)])
    per_epoch = (1000 - 16) // 16
    first, second = starts[:per_epoch], starts[per_epoch:2 * per_epoch]
    for epoch in (first, second):
        assert len(set(epoch)) == per_epoch and set(np.diff(np.sort(epoch))) == {16}
        assert epoch.min() >= 0 and epoch.max() + 17 <= 1000
    assert list(first) != list(second)
    assert list(study.batch_starts(1000, 16, 4, 5, 7)) == list(starts[20:24])
    assert list(study.batch_starts(1000, 16, 4, 5, 8)) != list(starts[20:24])


def test_orthogonalised_steps_have_singular_values_near_one():
    x = study.orthogonalise(torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x)
    assert 0.5 < values.min() and values.max() < 1.5


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_the_loss_counts_every_character_once_whatever_the_batch(tiny, family):
    cfg, vocab = tiny
    torch.manual_seed(0)
    model = study.build_model(next(s for s in cfg.ladder if s.family == family), len(vocab.chars), cfg)
    torch.nn.init.normal_(model.head.weight)
    tokens = study.read_tokens("val", vocab, cfg)
    losses = study.token_losses(model, tokens, cfg)
    assert losses.shape == (len(tokens) - 1,)
    cfg.MICRO_TOKENS = 16
    np.testing.assert_allclose(study.token_losses(model, tokens, cfg), losses, rtol=1e-4, atol=1e-5)
    mean, error = study.mean_loss(losses, tokens)
    assert mean == pytest.approx(losses.mean(), rel=1e-6) and 0 < error < mean


@pytest.mark.parametrize("name", ["gpt_8w", "lstm_10w"])
def test_an_interrupted_run_ends_with_the_same_bits(tiny, name, monkeypatch):
    cfg, vocab = tiny
    monkeypatch.setattr(study, "run_recipe", lambda run, cfg: "one recipe")
    run = next(run for run in study.planned_runs(cfg) if run.name == name)
    with tqdm(disable=True) as bar:
        study.train_model(run, vocab, cfg, bar)
        whole = torch.load(run.path("model", cfg), weights_only=True)
        record = study.read_json(run.path("record", cfg))
        run.path("model", cfg).unlink()
        step = study.Trainer.train_step
        for stop_at in (3, 7, 11, 17):  # on the trunk, in branches, and once more after a resume
            def dying_step(self, share, stop_at=stop_at):
                if self.trained >= stop_at * 64:
                    raise KeyboardInterrupt
                return step(self, share)
            monkeypatch.setattr(study.Trainer, "train_step", dying_step)
            with pytest.raises(KeyboardInterrupt):
                study.train_model(run, vocab, cfg, bar)
        monkeypatch.setattr(study.Trainer, "train_step", step)
        study.train_model(run, vocab, cfg, bar)
    again = torch.load(run.path("model", cfg), weights_only=True)
    assert all(torch.equal(whole["model"][key], again["model"][key]) for key in whole["model"])
    resumed = study.read_json(run.path("record", cfg))
    assert [row["val_loss"] for row in resumed["rows"]] == [row["val_loss"] for row in record["rows"]]
    assert resumed["curve"]["train_loss"] == record["curve"]["train_loss"]


def test_budgets_end_decayed_and_only_the_last_is_main(tiny, monkeypatch):
    cfg, vocab = tiny
    monkeypatch.setattr(study, "run_recipe", lambda run, cfg: "one recipe")
    run = study.planned_runs(cfg)[0]
    with tqdm(disable=True) as bar:
        study.train_model(run, vocab, cfg, bar)
    rows = study.read_json(run.path("record", cfg))["rows"]
    assert [row["tokens"] for row in rows] == [5 * 64, 10 * 64, 20 * 64]
    assert [row["main"] for row in rows] == [False, False, True]
    assert study.steps_with_branches(cfg) == 20 + 1 + 2


def test_a_model_loads_in_one_line_and_a_broken_file_says_so(tiny, monkeypatch, tmp_path):
    cfg, vocab = tiny
    monkeypatch.setattr(study, "run_recipe", lambda run, cfg: "one recipe")
    run = study.planned_runs(cfg)[0]
    with tqdm(disable=True) as bar:
        study.train_model(run, vocab, cfg, bar)
    path = run.path("model", cfg)
    model, loaded_vocab, result = study.load(path)
    tokens = study.read_tokens("val", vocab, cfg)
    assert loaded_vocab == vocab
    assert study.mean_loss(study.token_losses(model, tokens, cfg), tokens)[0] == pytest.approx(result["val_loss"])
    for bad in (path.read_bytes()[:500], b"", b"not a checkpoint"):
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.pt"):
            study.load(tmp_path / "bad.pt")


def test_divergence_stops_the_run(tiny, monkeypatch):
    cfg, vocab = tiny
    monkeypatch.setattr(study, "run_recipe", lambda run, cfg: "one recipe")
    monkeypatch.setattr(study.Trainer, "backward", lambda self, chunk: torch.tensor(math.nan))
    monkeypatch.setattr(study.Trainer, "train_step", lambda self, share: self.backward(None))
    with tqdm(disable=True) as bar, pytest.raises(study.Diverged):
        trainer = study.Trainer(study.planned_runs(cfg)[0], vocab, cfg, np.zeros(3_000, np.uint8))
        trainer.step = 1
        study.train_leg(trainer, 5, 0, bar)
