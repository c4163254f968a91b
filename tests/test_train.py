"""Models and training: what is counted is there, what is interrupted goes on, what is measured is whole."""
import contextlib
import gc
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import LakhMIDI as study
from LakhMIDI import Cfg, UserError


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of one tiny model per family on random tokens, as far as training needs one."""
    monkeypatch.setattr(study.tokenize, "identity", lambda cfg: "one corpus")
    cfg = Cfg(DATA_ROOT=tmp_path / "data", SAVE_DIR=tmp_path / "runs", STUDY="smoke", DEVICE="cpu",
              SEQ_LEN=16, BATCH_TOKENS=64, TRAIN_TOKENS_TARGET=64 * 20, MODELS=("gpt_8w", "lstm_10w"),
              SAVE_EVERY_S=0.0)
    rng, vocab = np.random.default_rng(0), study.Vocab(("<start>", "<end>", "<unknown>", *"\nabcdefg"))
    cfg.tokens_root.mkdir(parents=True)
    for split, n in (("train", 3_000), ("val", 500), ("test", 500)):
        tokens = rng.integers(4, 11, n).astype(np.uint8)
        tokens[10::10], tokens[::50], tokens[49::50] = 3, study.START, study.END
        tokens.tofile(cfg.tokens_root / f"{split}.bin")
    study.write_json(cfg.tokens_root / "vocab.json", {"chars": vocab.chars})
    return cfg, vocab


def train_run(cfg, family="gpt"):
    """Trains the model of a family; returns the record that it leaves."""
    run = next(run for run in study.planned_runs(cfg) if run.size.family == family)
    vocab = study.read_vocab(cfg)
    windows = study.Windows(study.read_training(vocab, cfg)[0], vocab, cfg.SEQ_LEN)
    study.train_model(run, windows, vocab, cfg)
    return study.finished(run, cfg)


@pytest.fixture
def watched(monkeypatch):
    """A list that collects, before each step of a training, all that a step changes; `after(t)` comes between
    the gradients and the step."""
    class Watched(study.Training):
        states, after = [], staticmethod(lambda t: None)

        def gradients(self, batch):
            kept = [v for optimizer in self.optimizers for s in optimizer.state.values() for v in s.values()]
            self.states.append([v.detach().clone() for v in [*self.model.parameters(), *kept]])
            loss = super().gradients(batch)
            self.after(self)
            return loss
    Watched.states = []
    monkeypatch.setattr(study, "Training", Watched)
    return Watched


def equal(state, other):
    return len(state) == len(other) and all(map(torch.equal, state, other))


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_parameters_are_counted_by_formula_and_alike_in_both_families(family):
    for name in ("cpu", "full"):
        cfg = Cfg(STUDY=name, DEVICE="cpu")
        for size in cfg.MODELS:
            with torch.device("meta"):
                model = study.build_model(size, 60, cfg)
            counts = study.count_params(model)
            vectors = size.layers * (8 if size.family == "lstm" else 4)  # biases, weights of mixed characters
            attention = 0 if model.recurrent else size.layers * cfg.SEQ_LEN * size.width
            assert counts["n_fit"] == model.flops_per_token() / 6 - attention + vectors * size.width
            assert counts["n_params"] == counts["n_fit"] + 60 * size.width
            twin = study.rough_weights(size) / study.rough_weights(
                next(s for s in cfg.MODELS if s.size == size.size and s.family == "gpt"))
            assert twin == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("name", ["gpt_60K", "lstm_60K"])
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


def test_flops_match_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Cfg(STUDY="cpu", DEVICE="cpu", MODELS=("gpt_25K", ("lstm", "tiny", 2, 40)))
    gpt, lstm = (study.build_model(size, 60, cfg) for size in cfg.MODELS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(torch.zeros(2, cfg.SEQ_LEN, dtype=torch.long))[0].sum().backward()
    attention = 6 * gpt.size.layers * cfg.SEQ_LEN * gpt.size.width  # torch counts it whole
    counted = counter.get_total_flops() / (2 * cfg.SEQ_LEN)
    assert counted == pytest.approx(gpt.flops_per_token() + attention, rel=1e-6)
    gates = 2 * 4 * 40 * (40 + 40)  # layers, gates, cells, inputs and states of each; torch counts none
    assert lstm.flops_per_token() == 6 * (gates + 40 * 60)


def test_the_rate_rises_stays_and_falls():
    cfg = Cfg(STUDY="cpu", DEVICE="cpu")
    shares = [study.lr_scale(step, 1000, cfg) for step in range(1, 1001)]
    assert 0 < shares[0] < 0.1 and shares[100:800] == [1.0] * 700
    assert all(0 < low < high for high, low in itertools.pairwise(shares[800:])) and shares[-1] < 0.01


def music(seed=0, tunes=40):
    """Ids of made-up tunes of 2 to 40 lines behind a header, and their vocabulary."""
    rng = np.random.default_rng(seed)
    vocab = study.Vocab(("<start>", "<end>", "<unknown>", *sorted("\nX:1MKVABCDEFG|%")))
    ids = []
    for _ in range(tunes):
        lengths = rng.integers(4, 30, rng.integers(2, 40))
        bars = ["".join(rng.choice([*"ABCDEFG"], length)) for length in lengths]
        text = "X:1\nM:1\nK:C\n" + "%V\n" * int(rng.integers(3)) + "|\n".join(bars) + "|\n"
        ids += [study.START, *vocab.encode(text), study.END]
    return np.array(ids, np.uint8), vocab


@pytest.mark.parametrize("seq_len", [16, 64, 128, 4096])
def test_windows_know_their_tune_and_count_every_character_once(seq_len):
    tokens, vocab = music()
    windows = study.Windows(tokens, vocab, seq_len)
    assert windows.plan.dtype.itemsize == 16
    counted, text = np.zeros(len(tokens), int), vocab.decode(tokens)
    for i in range(len(windows)):
        ids, targets = windows.read(np.array([i]), "cpu")[0].numpy()
        source, _ = windows.places(np.array([i]))
        np.add.at(counted, source[0, 1:][targets >= 0], 1)
        begin, head = int(windows.plan[i]["begin"]), int(windows.plan[i]["head"])
        if seq_len >= 64:  # long enough for whole lines: each begins behind a line's end, and has a header
            assert ids[0] == study.START
            assert tokens[begin] == study.START or tokens[begin - 1] == vocab.encode("\n")
            assert head == 0 or vocab.decode(ids[:head]).startswith("X:1\nM:1\nK:C\n"[:head - 1])
    assert (counted == (tokens != study.START)).all() and windows.counted == counted.sum()
    assert text.count("X:1") == 40


def test_each_pass_takes_every_window_once_in_an_order_of_its_own():
    windows = study.Windows(*music(), 64)
    n = len(windows)
    taken = np.concatenate([windows.chosen(step, 7, seed=3) for step in range(n)])  # seven passes
    orders = taken.reshape(7, n)
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 7
    assert list(windows.chosen(5, 7, seed=4)) != list(windows.chosen(5, 7, seed=3))


class Reading(nn.Module):
    """A model that notes what it is given to read."""

    def __init__(self, seq_len):
        super().__init__()
        self.weight, self.seq_len = nn.Parameter(torch.zeros(1)), seq_len

    def empty_state(self, batch, length):
        return []

    def forward(self, tokens, state):
        self.read = tokens[0].tolist()
        return None, state


def test_sampling_renews_a_full_window_in_the_layout_of_the_training():
    tokens, vocab = music(tunes=3)
    text = "X:1" + max(vocab.decode(tokens).split("X:1"), key=len)[:-9]  # it stops within a line
    header = text[:text.rindex("\n", 0, re.search(r"^[A-G]+\|", text, re.M).start()) + 1]
    draft, model = study.Draft(text, vocab, 1_000, [0, 0]), Reading(96)
    draft.read_window(model, 8)
    newest = vocab.decode(model.read[1 + len(header):])
    assert model.read[0] == study.START and vocab.decode(model.read[1:]).startswith(header)
    assert f"\n{newest}" in text and text[:-1].endswith(newest)  # lines from a line's start
    assert 48 - 31 <= len(model.read) <= 48 and draft.room == 96 - len(model.read)


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
    windows = study.Windows(study.read_tokens("val", vocab, cfg), vocab, cfg.SEQ_LEN)
    losses, places = study.token_losses(model, windows, cfg)
    monkeypatch.setattr(study, "EVAL_BATCH", 16)
    np.testing.assert_allclose(study.token_losses(model, windows, cfg)[0], losses, rtol=1e-4, atol=1e-5)
    assert (np.isnan(losses) == (windows.tokens == study.START)).all()

    # The same by hand: each character from those before it in its window
    for i in (0, 3, len(windows) - 1):
        ids, targets = windows.read(np.array([i]), "cpu")[0]
        source = windows.places(np.array([i]))[0][0]
        chance = model(ids[None])[0][0].log_softmax(-1)
        for place in np.flatnonzero(targets >= 0):
            assert losses[source[place + 1]] == pytest.approx(-chance[place, targets[place]].item(), rel=1e-3)
            assert places[source[place + 1]] == place
    mean, error = study.mean_loss(losses, windows.tokens)
    assert mean == pytest.approx(np.nanmean(losses), rel=1e-6) and 0 < error < mean


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_killed_ten_times_end_with_the_same_bits(tiny):
    cfg, _ = tiny
    knobs = json.dumps({"DATA_ROOT": cfg.DATA_ROOT, "SAVE_DIR": cfg.SAVE_DIR}, default=str)
    command = [sys.executable, Path(__file__).with_name("killed_training.py"), knobs, "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    for family in ("gpt", "lstm"):
        whole, killed = json.loads(done.stdout)[family]
        assert len(killed["places"]) == 11 and len(set(killed["places"])) > 8  # it went on
        assert killed["weights"] == whole["weights"] and killed["train_loss"] == whole["train_loss"]
        assert killed["val_loss"] == whole["val_loss"] and len(killed["val_loss"]) == 4


def test_a_budget_has_the_mean_of_its_last_weights_and_the_largest_the_last(tiny, monkeypatch):
    """By a second account of the weights after each step."""
    cfg, vocab = tiny
    weights, means, gradients, result = [], {}, study.Training.gradients, study.result

    def noted(t, batch):
        weights.append(t.model.head.weight.detach().clone())  # after so many steps as there are before it
        return gradients(t, batch)

    def measured(t, *args):
        means[t.step] = t.average.head.weight.clone()
        return result(t, *args)
    monkeypatch.setattr(study.Training, "gradients", noted)
    monkeypatch.setattr(study, "result", measured)
    rows = train_run(cfg)["rows"]
    steps = round(20 * 64 / (64 * study.Windows(study.read_training(vocab, cfg)[0], vocab, 16).share))
    assert [row["main"] for row in rows] == [False, False, False, True]
    assert [row["seen"] // 64 for row in rows] == [*means] == [round(share * steps) for share in cfg.BUDGETS]
    assert rows[-1]["tokens"] == pytest.approx(20 * 64, rel=0.05) and rows[-1]["flops"] > rows[-1]["tokens"]
    model, _, _ = study.load(study.planned_runs(cfg)[0].path("model.pt", cfg))
    weights.append(model.head.weight)
    for end, mean in means.items():
        last = weights[math.floor(0.8 * end) + 1:end + 1] if end < steps else weights[-1:]
        torch.testing.assert_close(mean, torch.stack(last).mean(0), rtol=1e-4, atol=1e-6)


class Bomb:
    """A pickle that would run code."""
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_a_model_loads_in_one_line_and_a_broken_file_says_so(tiny, tmp_path):
    cfg, vocab = tiny
    train_run(cfg)
    path = study.planned_runs(cfg)[0].path("model.pt", cfg)
    model, loaded_vocab, result = study.load(path)
    windows = study.Windows(study.read_tokens("val", vocab, cfg), vocab, cfg.SEQ_LEN)
    assert loaded_vocab == vocab
    loss = study.mean_loss(study.token_losses(model, windows, cfg)[0], windows.tokens)[0]
    assert loss == pytest.approx(result["val_loss"])
    torch.save({"format": study.CHECKPOINT_FORMAT, "size": ["gpt", "8w", "wide"]}, tmp_path / "other.pt")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    whole, others = path.read_bytes(), [(tmp_path / name).read_bytes() for name in ("other.pt", "bomb.pt")]
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(64) + whole[middle + 64:]
    for bad in (whole[:500], whole[:-100], flipped, b"", b"no checkpoint", *others):
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.pt"):
            study.load(tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"no checkpoint .*none\.pt"):
        study.load(tmp_path / "none.pt")


def test_out_of_memory_makes_the_passes_smaller_and_leaves_the_losses(tiny, monkeypatch, capsys):
    cfg, _ = tiny
    forward, whole = study.GPT.forward, train_run(cfg)
    for error in (torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in cublasCreate"),
                  RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
                  RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory.")):
        def small_memory(self, tokens, state=None, error=error):
            if self.training and len(tokens) > 1:
                raise error
            return forward(self, tokens, state)
        monkeypatch.setattr(study.GPT, "forward", small_memory)
        cfg.SAVE_DIR = f"{cfg.SAVE_DIR}_again"
        pieces = train_run(cfg)
        assert capsys.readouterr().out.count("out of memory") == 2  # 4 windows, 2, 1
        assert pieces["curve"]["train_loss"] == pytest.approx(whole["curve"]["train_loss"], rel=1e-2)


def test_a_compiled_step_gives_the_losses_of_the_plain_one(tiny, watched, capsys):
    """And where compiling fails, the plain model trains, with one warning."""
    cfg, _ = tiny
    losses = [train_run(cfg)["curve"]["train_loss"]]
    for loss_of in (torch.compile(study.summed_loss, fullgraph=True, backend="aot_eager"),
                    lambda model, windows: 1 / 0):
        cfg.SAVE_DIR = f"{cfg.SAVE_DIR}_again"
        before = watched.__init__

        def compiled(self, *args, before=before, loss_of=loss_of):
            before(self, *args)
            self.compiled, self.loss_of = True, loss_of
        watched.__init__ = compiled
        losses.append(train_run(cfg)["curve"]["train_loss"])
        watched.__init__ = before
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == losses[0]
    assert capsys.readouterr().out.count("without torch.compile") == 1


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs as a CPU can have them: replaying one does its work again, on the same tensors."""
    made = SimpleNamespace(use=False, trainings=[], captures=0, replays=0, error=None, loss_of=None)
    before = study.Training.__init__

    def begun(self, *args):
        before(self, *args)
        self.graphed, self.compiled = made.use, made.loss_of is not None
        self.loss_of = made.loss_of or self.loss_of
        made.trainings.append(self)

    @contextlib.contextmanager
    def capture(graph, stream):
        made.captures += 1
        yield
        made.gradients = [p.grad for p in made.trainings[-1].model.parameters()]
        if made.error:
            raise made.error

    class Graph:
        def replay(self):
            made.replays += 1
            t = made.trainings[-1]
            assert all(p.grad is there for p, there in zip(t.model.parameters(), made.gradients, strict=True))
            t.graph_loss.copy_(t.one_pass(t.graph_input))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"CUDAGraph": Graph, "graph": capture, "stream": contextlib.nullcontext,
                        "Stream": lambda: stream, "current_stream": lambda: stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(study.Training, "__init__", begun)
    return made


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_a_replayed_graph_gives_the_losses_of_a_plain_step(tiny, family, graphs):
    cfg, _ = tiny
    cfg.BATCH_TOKENS, cfg.BUDGETS = 7 * 16, (1.0,)
    losses = train_run(cfg, family)["curve"]["train_loss"]
    for micro, replays in (0, 1), (3 * 16, 2):  # of 7 windows: 7; 3, 3 and 1 without a graph
        graphs.use = True
        graphs.captures = graphs.replays = 0
        again = Cfg(**cfg.given | {"MICRO_TOKENS": micro, "SAVE_DIR": f"{cfg.SAVE_DIR}_{replays}"})
        assert train_run(again, family)["curve"]["train_loss"] == pytest.approx(losses, rel=1e-3)
        assert graphs.captures == 1 and graphs.replays == replays * len(losses)


@pytest.mark.parametrize("failing", ["a CUDA graph", "torch.compile", "memory"])
def test_where_a_graph_or_compiling_fails_only_that_is_left_out(tiny, monkeypatch, capsys, graphs, failing):
    cfg, _ = tiny
    graphs.use, graphs.loss_of = True, study.summed_loss
    if failing == "a CUDA graph":
        graphs.error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    elif failing == "torch.compile":
        graphs.loss_of = lambda model, windows: 1 / 0
    else:
        graphs.error = RuntimeError("CUDA error: out of memory")
        monkeypatch.setattr(study, "say", lambda words: setattr(graphs, "error", None))
    train_run(cfg)
    t = graphs.trainings[-1]
    told = re.findall("going on without (.*), which failed", capsys.readouterr().out)
    assert told == [failing] * (failing != "memory") and t.compiled == (failing != "torch.compile")
    assert bool(t.graph) == bool(graphs.replays) == (failing != "a CUDA graph")
    assert t.micro == (2 if failing == "memory" else 4)


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_a_model_goes_with_its_training_and_leaves_no_cycle(tiny, watched, monkeypatch, family):
    """Else its CUDA graph stays until the collector comes, maybe while the next one is captured."""
    cfg, _ = tiny
    seen, before = [], watched.__init__

    def compiled(self, *args):
        before(self, *args)
        seen.append(weakref.ref(self))
        if family == "gpt":
            self.loss_of = torch.compile(self.loss_of, backend="aot_eager")
    monkeypatch.setattr(watched, "__init__", compiled)
    watched.after = staticmethod(lambda t: seen.append(weakref.ref(t.model)))
    gc.disable()
    try:
        train_run(cfg, family)
        assert len(seen) > 2 and not any(one() for one in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_costs_one_step(tiny, watched, monkeypatch, dtype, bad):
    cfg, _ = tiny
    cfg.BUDGETS = (1.0,)
    monkeypatch.setattr(study, "amp_dtype", lambda recurrent, cfg: dtype)
    watched.after = staticmethod(lambda t: t.step == 5 and t.model.head.weight.grad[0].fill_(bad))
    record = train_run(cfg)
    same = [equal(state, after) for state, after in zip(watched.states, watched.states[1:], strict=False)]
    assert [i for i, skipped in enumerate(same) if skipped] == [5]
    steps = np.rint(np.array(record["curve"]["tokens"]) / record["curve"]["tokens"][0]).astype(int).tolist()
    assert steps == [n for n in range(1, len(same) + 2) if n != 6]  # a point of the curve for every other one
    assert math.isfinite(record["rows"][0]["val_loss"])
    watched.after = staticmethod(lambda t: t.model.head.weight.grad[0].fill_(bad))
    cfg.TRAIN_TOKENS_TARGET *= 2
    with pytest.raises(study.Diverged, match="no finite gradient"):
        train_run(cfg)


def test_float16_scales_its_gradients_and_clips_the_true_ones(tiny, watched, monkeypatch):
    cfg, _ = tiny
    scales, losses = [], []
    watched.after = staticmethod(lambda t: scales.append(t.scaler.get_scale()))
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(study, "amp_dtype", lambda recurrent, cfg, dtype=dtype: dtype)
        cfg.SAVE_DIR = f"{cfg.SAVE_DIR}_again"
        losses.append(train_run(cfg)["curve"]["train_loss"])
    n = len(scales) // 2
    assert n >= 20 and set(scales[:n]) == {1.0} and set(scales[n:]) == {65_536.0}
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_hard_windows_in_a_row_are_no_divergence_and_a_lost_model_is():
    learning = list(0.4 + 2 * np.exp(-np.arange(400) / 40))  # 4 windows of 1,024 characters a step
    for hard in ([1.14] * 20, [5.0] * 4, [math.nan] * 24, []):
        assert study.divergence(learning + hard, 4_096, 60) == ""
    assert "mean loss" in study.divergence(learning + [1.14] * 40, 4_096, 60)
    assert "mean loss" in study.divergence([9.0] * 30, 4_096, 60)
    assert "gradient" in study.divergence(learning + [math.nan] * 25, 4_096, 60)


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(tiny):
    cfg, vocab = tiny
    one, again = (study.Training(study.planned_runs(cfg)[0], len(vocab.chars), 1, cfg) for _ in range(2))
    one.save()
    with torch.no_grad():
        one.model.head.weight[0, 0] = math.nan
    with pytest.raises(study.Diverged):
        one.save()
    assert again.restore() and all(p.isfinite().all() for p in again.model.parameters())


def test_weights_that_share_a_storage_are_saved_apart(tiny):
    cfg, vocab = tiny
    model = study.build_model("lstm_10w", len(vocab.chars), cfg)
    weights = list(model.lstm.parameters())
    flat = torch.cat([p.data.flatten() for p in weights])  # as cuDNN keeps them
    for p, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        p.data = part.view_as(p)
    assert model.state_dict()["lstm.0.bias_hh_l0"].untyped_storage().nbytes() == flat.nbytes
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in study.own_weights(model).values())


def test_only_a_half_trained_model_asks_for_its_device_and_going_back_is_free(tiny, monkeypatch):
    cfg, vocab = tiny
    monkeypatch.setattr(study.tokenize, "status", lambda cfg, outputs=True: "up to date")
    study.train(cfg)
    models = {path: path.stat().st_mtime_ns for path in Path(cfg.SAVE_DIR).rglob("model.pt")}
    first = Path(cfg.SAVE_DIR, "gpt_8w.pt").read_bytes()
    cfg.SEED += 1
    study.train(cfg)
    assert len(models) == 2 and Path(cfg.SAVE_DIR, "gpt_8w.pt").read_bytes() != first
    cfg.SEED -= 1
    monkeypatch.setattr(study, "train_model", None)  # nothing is trained again
    study.train(cfg)
    assert Path(cfg.SAVE_DIR, "gpt_8w.pt").read_bytes() == first
    assert models.items() <= {p: p.stat().st_mtime_ns for p in Path(cfg.SAVE_DIR).rglob("model.pt")}.items()
    run = study.planned_runs(cfg)[0]
    study.Training(run, len(vocab.chars), 1, cfg).save()
    state = torch.load(run.path("resume.pt", cfg))
    torch.save(state | {"device": "cuda"}, run.path("resume.pt", cfg))
    with pytest.raises(UserError, match="half trained on cuda"):
        study.Training(run, len(vocab.chars), 1, cfg).restore()


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = study.signal.signal(study.signal.SIGXFSZ, study.signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"/resume\.pt: .*disk") as failure:
            study.write_checkpoint(tmp_path / "resume.pt", {"weights": torch.zeros(100_000)})
        with pytest.raises(UserError, match=r"/log\.jsonl: "):
            study.append_line(tmp_path / "log.jsonl", {"text": "x" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        study.signal.signal(study.signal.SIGXFSZ, handler)
    assert "\n" not in str(failure.value) and not list(tmp_path.glob("resume*"))


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda, cpu = Cfg(DEVICE="cuda"), Cfg(DEVICE="cpu")
    for capability, gpt in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert study.amp_dtype(False, cuda) is gpt and study.amp_dtype(True, cuda) is torch.float16
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        found = {"avx512_bf16": native}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert study.amp_dtype(False, cpu) is study.amp_dtype(True, cpu) is dtype


def test_large_models_see_a_batch_in_pieces_and_small_ones_whole():
    cfg = Cfg(STUDY="full", DEVICE="cpu")
    cfg.DEVICE = "cuda"
    with torch.device("meta"):
        models = {size.name: study.build_model(size, 60, cfg) for size in cfg.MODELS}
    pieces = {name: study.windows_per_pass(model, cfg) for name, model in models.items()}
    assert pieces["gpt_100M"] * cfg.SEQ_LEN <= 16_384 and pieces["gpt_1M"] == pieces["lstm_50M"] == cfg.batch
    cfg.MICRO_TOKENS = 2_048
    assert study.windows_per_pass(models["gpt_1M"], cfg) == 2


def test_a_gpu_that_torch_cannot_use_is_told_in_one_line(monkeypatch):
    class Card:
        found, capability, driver = True, (6, 0), None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: Card.found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: Card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_120", "compute_120"])
    monkeypatch.setattr(study.shutil, "which", lambda name: Card.driver)
    with pytest.raises(UserError, match=r"P100 is sm_60, .* only for sm_75"):
        Cfg(DEVICE="cuda").check()
    for Card.capability, fits in {(8, 9): False, (9, 0): True, (12, 1): True, (15, 0): True}.items():
        assert (study.gpu_fault() == "") == fits  # PTX suits what comes later
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a"])
    assert study.gpu_fault() == ""
    Card.found = False
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver is too old" in study.gpu_fault()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert study.gpu_fault() == ""
    Card.driver = "/usr/bin/nvidia-smi"
    assert "has no CUDA" in study.gpu_fault()


class GRU(study.LSTM):
    """A third family, as a user would add it: layers of torch's GRU, whose state is its output alone."""

    def __init__(self, size, vocab_size, seq_len):
        super().__init__(size, vocab_size, seq_len)
        self.lstm = nn.ModuleList(nn.GRU(size.width, size.width) for _ in range(size.layers))

    def empty_state(self, batch, length):
        return super().empty_state(batch, length)[:1]

    def forward(self, tokens, state=None):
        x, after = study.rms_norm(self.embed(tokens)).transpose(0, 1), []
        for i, layer in enumerate(self.lstm):
            x, output = layer(x, state and state[0][:, i].unsqueeze(0).contiguous())
            after.append(output[0])
        return self.head(study.rms_norm(x.transpose(0, 1))), state and [torch.stack(after, dim=1)]

    def flops_per_token(self):
        return 6 * (6 * self.size.layers * self.size.width**2 + self.head.weight.numel())


def test_a_third_family_takes_a_class_and_a_row(smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(study.FAMILIES, "gru", study.Family("GRU", "#009E73", "^", ":", GRU, 6))
    cfg = Cfg(**smoke.given | {"SAVE_DIR": tmp_path, "MODELS": (
        *(("gru", f"{width}w", 1, width) for width in (10, 20, 30, 40)), "gpt_8w")})
    study.run_stages(cfg)
    assert "GRU" in (tmp_path / "report.html").read_text("utf-8")
    assert (tmp_path / "gru_scaling.png").exists() and (tmp_path / "gru_10w.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["gpt", "lstm"])
@pytest.mark.parametrize("micro", [0, 48])  # 7 windows a pass; 3, 3 and 1 without a graph
def test_a_gpu_reaches_the_losses_of_a_cpu(tiny, family, micro, capsys):
    cfg, _ = tiny
    cfg.BATCH_TOKENS, cfg.MICRO_TOKENS = 7 * 16, micro
    losses = []
    for device in ("cpu", "cuda"):
        cfg.DEVICE, cfg.SAVE_DIR = device, f"{cfg.SAVE_DIR}_{device}"
        losses.append(train_run(cfg, family)["curve"]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert "going on without" not in capsys.readouterr().out
