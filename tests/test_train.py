"""Models and training: what is counted is there, what is interrupted goes on, what is measured is whole."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import LakhMIDI as study
from LakhMIDI import Cfg, UserError


@pytest.fixture
def tiny(tmp_path):
    """A study of one tiny model per family on random tokens, as far as the train stage needs one."""
    cfg = Cfg(DATA_ROOT=tmp_path / "data", SAVE_DIR=tmp_path / "runs", STUDY="smoke", DEVICE="cpu",
              SEQ_LEN=16, BATCH_TOKENS=64, TRAIN_TOKENS_TARGET=64 * 20, MODELS=("gpt_8w", "lstm_10w"),
              SAVE_EVERY_S=0.0)
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
    for size in cfg.MODELS:
        if size.family == family:
            model = study.build_model(size, 60, cfg)
            counts = study.count_params(model)
            vectors = size.layers * (8 if family == "lstm" else 4)  # biases, weights of mixed characters
            assert counts["n_fit"] == model.matmul_params() + vectors * size.width
            assert counts["n_params"] == counts["n_fit"] + 60 * size.width


@pytest.mark.parametrize("name", ["gpt_80K", "lstm_80K"])
def test_a_state_remembers_what_was_read_and_nothing_sees_the_future(name):
    cfg = Cfg(STUDY="cpu", DEVICE="cpu", SEQ_LEN=32)
    torch.manual_seed(0)
    model = study.build_model(name, 60, cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens = torch.randint(0, 60, (3, 32))
    with torch.no_grad():
        whole = model(tokens)[0]
        state, pieces = model.empty_state(3, 32), []
        for part in tokens.split([1, 1, 9, 1, 20], dim=1):
            logits, state = model(part, state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
        changed = tokens.clone()
        changed[:, 20:] = 0
        torch.testing.assert_close(model(changed)[0][:, :20], whole[:, :20], rtol=1e-4, atol=1e-4)


def test_the_transformer_is_one_graph_to_torch_compile():
    model = study.build_model("gpt_8w", 60, Cfg(STUDY="smoke", DEVICE="cpu"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens, gradients = torch.randint(0, 60, (2, 64)), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(tokens)[0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_flops_of_the_transformer_match_torch():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Cfg(STUDY="cpu", DEVICE="cpu")
    model = study.build_model("gpt_25K", 60, cfg)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(2, cfg.SEQ_LEN, dtype=torch.long))[0]
        logits.sum().backward()
    attention = 6 * model.size.layers * cfg.SEQ_LEN * model.size.width  # torch counts it whole
    counted = counter.get_total_flops() / (2 * cfg.SEQ_LEN)
    assert counted == pytest.approx(model.flops_per_token() + attention, rel=1e-6)


def test_flops_of_the_lstm_by_hand():
    cfg = Cfg(STUDY="cpu", DEVICE="cpu", MODELS=(("lstm", "tiny", 2, 40),))
    gates = 2 * 4 * 40 * (40 + 40)  # layers, gates, cells, inputs and states of each
    assert study.build_model("lstm_tiny", 60, cfg).flops_per_token() == 6 * (gates + 40 * 60)


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
    assert all(np.diff(shares[800:]) < 0) and 0 < shares[-1] < 0.01
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
    x = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale in (1e-6, 1e3):
            values = torch.linalg.svdvals(study.orthogonalise(scale * x, dtype).float())
            assert 0.5 < values.min() and values.max() < 1.5


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_the_loss_counts_every_character_once_whatever_the_batch(tiny, family, monkeypatch):
    cfg, vocab = tiny
    torch.manual_seed(0)
    model = study.build_model(next(s for s in cfg.MODELS if s.family == family), len(vocab.chars), cfg)
    torch.nn.init.normal_(model.head.weight)
    tokens = study.read_tokens("val", vocab, cfg)
    losses = study.token_losses(model, tokens, cfg)
    assert losses.shape == (len(tokens) - 1,)
    cfg.MICRO_TOKENS = cfg.BATCH_TOKENS = 16
    np.testing.assert_array_equal(study.token_losses(model, tokens, cfg), losses)
    monkeypatch.setattr(study, "EVAL_BATCH", 16)
    np.testing.assert_allclose(study.token_losses(model, tokens, cfg), losses, rtol=1e-4, atol=1e-5)
    mean, error = study.mean_loss(losses, tokens)
    assert mean == pytest.approx(losses.mean(), rel=1e-6) and 0 < error < mean


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_killed_ten_times_end_with_the_same_bits(tiny):
    cfg, _ = tiny
    knobs = {knob: getattr(cfg, knob) for knob in study.knob_names()}
    knobs |= {"TRAIN_TOKENS_TARGET": 64 * 150, "DECAY_FRAC": 0.5}  # every step in the log, long branches
    knobs = json.dumps(knobs, default=str)
    command = [sys.executable, Path(__file__).with_name("killed_training.py"), knobs, "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    starts = list(study.read_jsonl(Path(cfg.SAVE_DIR, "killed", "starts.jsonl")))
    for name in (size.name for size in cfg.MODELS):
        places = [tuple(place) for run, *place in starts if run == name]
        assert len(places) == 11 and places == sorted(places) and len(set(places)) > 8  # it went on
        assert {leg % 2 for leg, _ in places} == {0, 1}  # on the trunk and in branches
        files = [Path(cfg.SAVE_DIR, folder, f"{name}.pt") for folder in ("whole", "killed")]
        whole, killed = (torch.load(path)["model"] for path in files)
        assert all(torch.equal(whole[key], killed[key]) for key in whole)
        whole, killed = (study.read_json(path.parent / f"runs/{name}.json") for path in files)
        assert killed["curve"]["train_loss"] == whole["curve"]["train_loss"]
        losses = [row["val_loss"] for row in whole["rows"]]
        assert [row["val_loss"] for row in killed["rows"]] == losses and len(losses) == 3


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
    loss = study.mean_loss(study.token_losses(model, tokens, cfg), tokens)[0]
    assert loss == pytest.approx(result["val_loss"])
    whole = path.read_bytes()
    torch.save({"format": study.CHECKPOINT_FORMAT, "size": ["gpt", "8w", "wide"]}, tmp_path / "other.pt")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(64) + whole[middle + 64:]
    damaged = (whole[:500], whole[:-100], flipped, b"", b"no checkpoint",
               (tmp_path / "other.pt").read_bytes(), (tmp_path / "bomb.pt").read_bytes())
    for bad in damaged:
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.pt"):
            study.load(tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"no checkpoint .*none\.pt"):
        study.load(tmp_path / "none.pt")


class Bomb:
    """A pickle that would run code."""
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


@pytest.fixture
def trainer(tiny, monkeypatch):
    """Makes trainers of the tiny GPT, all of them alike."""
    cfg, vocab = tiny
    monkeypatch.setattr(study, "run_recipe", lambda run, cfg: "one recipe")
    data = np.fromfile(cfg.tokens_root / "train.bin", vocab.dtype)
    return lambda: study.Trainer(study.planned_runs(cfg)[0], vocab, cfg, data)


def weights(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def test_out_of_memory_makes_the_pieces_smaller_and_leaves_the_step(trainer, monkeypatch, capsys):
    whole, pieces = trainer(), trainer()
    forward = pieces.model.forward

    def small_memory(tokens, state=None):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return forward(tokens, state)
    monkeypatch.setattr(pieces.model, "forward", small_memory)
    for _ in range(3):
        assert pieces.train_step(1.0).item() == pytest.approx(whole.train_step(1.0).item(), rel=1e-2)
    assert pieces.micro == 1 and capsys.readouterr().out.count("out of memory") == 2  # 4 windows, 2, 1
    assert (weights(pieces) - weights(whole)).abs().max() < 0.02 * weights(whole).abs().max()


def test_where_compiling_fails_the_plain_model_trains_with_one_warning(trainer, capsys):
    plain, compiled = trainer(), trainer()

    def broken(tokens):
        raise RuntimeError("no compiler")
    compiled.forward = broken
    for _ in range(2):
        assert compiled.train_step(1.0).item() == plain.train_step(1.0).item()
    assert torch.equal(weights(compiled), weights(plain))
    assert capsys.readouterr().out.count("without torch.compile") == 1


def test_scaled_gradients_are_clipped_as_plain_ones_and_an_overflow_skips_the_whole_step(trainer):
    plain, scaled = trainer(), trainer()
    scaled.scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        plain.train_step(1.0), scaled.train_step(1.0)
    assert (weights(scaled) - weights(plain)).abs().max() < 0.02 * weights(plain).abs().max()
    before, scale = weights(scaled), scaled.scaler.get_scale()
    hook = scaled.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    scaled.train_step(1.0)
    assert torch.equal(weights(scaled), before) and scaled.scaler.get_scale() == scale / 2
    hook.remove()
    scaled.train_step(1.0)
    assert not torch.equal(weights(scaled), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_gradient_that_is_no_number_costs_one_step_in_every_precision(trainer, monkeypatch, bad):
    monkeypatch.setattr(study, "amp_dtype", lambda family, cfg: torch.bfloat16)
    one = trainer()
    one.train_step(1.0)
    before, momenta = weights(one), [dict(optimizer.state) for optimizer in one.optimizers]
    momenta = [v.clone() for states in momenta for state in states.values() for v in state.values()]
    first = torch.tensor([0])
    hook = one.model.head.weight.register_hook(lambda gradient: gradient.index_fill(0, first, bad))
    one.train_step(1.0)
    after = [v for optimizer in one.optimizers for state in optimizer.state.values() for v in state.values()]
    assert torch.equal(weights(one), before) and all(map(torch.equal, momenta, after))
    for _ in range(30):
        one.train_step(1.0)
    with pytest.raises(study.Diverged, match="no finite gradient"):
        one.check(2.0)
    hook.remove()
    one.train_step(1.0)
    one.check(2.0)
    assert weights(one).isfinite().all() and not torch.equal(weights(one), before)


def test_a_full_gpu_that_cublas_reports_is_no_failure_of_the_compiler(trainer, monkeypatch, capsys):
    one, forward = trainer(), study.GPT.forward

    def full(self, tokens, state=None):
        if len(tokens) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return forward(self, tokens, state)
    monkeypatch.setattr(study.GPT, "forward", full)
    assert one.train_step(1.0).isfinite() and one.micro == 2
    assert capsys.readouterr().out.count("out of memory") == 1


def test_weights_that_share_a_storage_are_saved_apart(tiny, monkeypatch, tmp_path):
    cfg, vocab = tiny
    model = study.build_model("lstm_10w", len(vocab.chars), cfg)
    weights = list(model.lstm.parameters())
    flat = torch.cat([p.data.flatten() for p in weights])  # as cuDNN keeps them
    for p, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        p.data = part.view_as(p)
    assert model.state_dict()["lstm.bias_hh_l0"].untyped_storage().nbytes() == flat.nbytes
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in study.own_weights(model).values())


def test_a_gpu_that_torch_cannot_use_is_told_in_one_line(monkeypatch):
    class Card:
        found, capability, cuda, driver = True, (6, 0), "13.0", None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: Card.found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: Card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_120", "compute_120"])
    monkeypatch.setattr(study.shutil, "which", lambda name: Card.driver)
    with pytest.raises(UserError, match=r"P100 \(sm_60\) is too old.*sm_75"):
        Cfg(DEVICE="cuda").check()
    Card.capability = (9, 0)
    Cfg(DEVICE="cuda").check()
    Card.found = False
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver is too old" in study.gpu_fault()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert study.gpu_fault() == ""
    Card.driver = "/usr/bin/nvidia-smi"
    assert "has no CUDA" in study.gpu_fault()


def test_a_checkpoint_without_a_loss_scale_goes_on_with_one(trainer):
    one, again = trainer(), trainer()
    one.train_step(1.0)
    one.save("resume")
    again.scaler = torch.amp.GradScaler("cpu")
    assert again.restore("resume") and again.train_step(1.0).isfinite()


def test_a_spike_stops_the_run_and_noise_does_not(trainer):
    one = trainer()
    one.check(2.0)
    for loss in (math.nan, math.inf, 50.0):
        with pytest.raises(study.Diverged, match="gpt_8w"):
            one.check(loss)
    one.curve["train_loss"] = [1.0 + 0.05 * (-1) ** i for i in range(20)]
    one.check(1.4)
    with pytest.raises(study.Diverged):
        one.check(1.6)
    one.curve["train_loss"] = [1.0 + 0.3 * (-1) ** i for i in range(20)]  # a batch of a single tune
    one.check(1.6)


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(trainer):
    one = trainer()
    one.save("resume")
    with torch.no_grad():
        one.model.head.weight[0, 0] = math.nan
    with pytest.raises(study.Diverged):
        one.save("resume")
    again = trainer()
    assert again.restore("resume") and weights(again).isfinite().all()


def test_precision_follows_the_hardware(monkeypatch):
    cuda, cpu = Cfg(DEVICE="cuda"), Cfg(DEVICE="cpu")
    for capability, gpt in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert study.amp_dtype("gpt", cuda) is gpt and study.amp_dtype("lstm", cuda) is torch.float16
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        found = {"avx512_bf16": native}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert study.amp_dtype("gpt", cpu) is study.amp_dtype("lstm", cpu) is dtype


def test_peaks_of_gpus_are_found_by_name(monkeypatch):
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Tesla T4", 65e12),
                       ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
                       ("NVIDIA GeForce RTX 4060", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert study.peak_flops(Cfg(DEVICE="cuda")) == peak
    assert study.peak_flops(Cfg(DEVICE="cpu")) is None


def test_large_models_see_a_batch_in_pieces_and_small_ones_whole():
    cfg = Cfg(STUDY="full", DEVICE="cuda")
    pieces = {size.name: study.windows_per_pass(size, cfg) for size in cfg.MODELS}
    assert pieces["gpt_100M"] * cfg.SEQ_LEN <= 16_384 and pieces["gpt_1M"] == pieces["lstm_50M"] == cfg.batch
    cfg.MICRO_TOKENS = 2_048
    assert study.windows_per_pass(cfg.MODELS[0], cfg) == 2


def test_divergence_stops_the_run(tiny, monkeypatch):
    cfg, vocab = tiny
    monkeypatch.setattr(study, "run_recipe", lambda run, cfg: "one recipe")
    monkeypatch.setattr(study.Trainer, "backward", lambda self, chunk: torch.tensor(math.nan))
    monkeypatch.setattr(study.Trainer, "train_step", lambda self, share: self.backward(None))
    with tqdm(disable=True) as bar, pytest.raises(study.Diverged):
        trainer = study.Trainer(study.planned_runs(cfg)[0], vocab, cfg, np.zeros(3_000, np.uint8))
        trainer.step = 1
        study.train_leg(trainer, 5, 0, bar)
