"""The training recipe: learning rates, nanoGPT's recipe as a rival, ablations, speed; on any device.

    python benchmarks/bench_train.py DATA_ROOT                            speed, rival, sweep
    python benchmarks/bench_train.py DATA_ROOT --parts ablate --seeds 3   what each part of the recipe buys
    python benchmarks/bench_train.py DATA_ROOT --parts options            what each way of running it costs

DATA_ROOT holds tokens/ as `python LakhMIDI.py --to tokenize --DATA_ROOT DATA_ROOT` writes them.
"""
import argparse
import contextlib
import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from results import keep
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import LakhMIDI as study
from LakhMIDI import Cfg

make_optimizers = study.make_optimizers
# Dense matrix products per second in 16 bits, by the makers' data sheets.
PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "T4": 65e12}
DONE = {}  # the trainings of each part


class Rival(nn.Module):
    """nanoGPT's model: learned positions, LayerNorm, GELU, tied head (https://github.com/karpathy/nanoGPT)."""
    recurrent, kept_bytes = study.GPT.recurrent, study.GPT.kept_bytes

    def __init__(self, size, vocab_size, seq_len):
        super().__init__()
        self.size, self.seq_len = size, seq_len
        self.embed, self.positions = nn.Embedding(vocab_size, size.width), nn.Embedding(seq_len, size.width)
        self.blocks = nn.ModuleList(RivalBlock(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                added_up = 2 * size.layers if name.endswith("out.weight") else 1  # so many outputs
                nn.init.normal_(p, std=0.02 / math.sqrt(added_up))
        self.head.weight = self.embed.weight

    def forward(self, tokens, state=None):  # (B, T) -> (B, T, V)
        x = self.embed(tokens) + self.positions.weight[:tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)), None

    def flops_per_token(self):
        s, T = self.size, self.seq_len
        return 6 * (12 * s.layers * s.width**2 + self.head.weight.numel()) + 6 * s.layers * T * s.width


class RivalBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.up(self.norm2(x))))


def rival_optimizers(model, cfg):
    """AdamW with weight decay on all matrices and tables; the second one holds the norms."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [adamw_group(group, cfg.LR, decay) for group, decay in ((decayed, 0.1), (rest, 0.0))]


def adamw_group(parameters, lr, decay):
    return torch.optim.AdamW([{"params": parameters, "peak": lr}], lr=lr, betas=(0.9, 0.95),
                             weight_decay=decay, fused=True)


def cosine(step, steps, cfg):
    """nanoGPT's schedule: warm-up, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(cfg.WARMUP_FRAC * steps))
    if step <= warmup:
        return step / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def constant(step, steps, cfg):
    return min(1.0, step / max(1, round(cfg.WARMUP_FRAC * steps)))


def rival(lr):
    """A way to train the rival with the loop of the study. nanoGPT uses float32 on a CPU."""
    patches = {"build_model": lambda size, vocab_size, cfg: Rival(size, vocab_size, cfg.SEQ_LEN),
               "make_optimizers": rival_optimizers, "lr_scale": cosine,
               "count_params": lambda model: {"n_params": sum(p.numel() for p in model.parameters())}}
    if not torch.cuda.is_available():
        patches["amp_dtype"] = lambda recurrent, cfg: torch.float32
    return patch.multiple(study, **patches), {"LR": lr}


def changed_model(change):
    """Trains the study's model after `change(model)`."""
    build = study.build_model

    def build_changed(*args):
        model = build(*args)
        change(model)
        return model
    return patch.object(study, "build_model", build_changed)


def adamw_for_all(model, cfg):
    groups = [optimizer.param_groups[0] for optimizer in make_optimizers(model, cfg)]
    return [adamw_group(group["params"], group["peak"], decay)
            for group, decay in zip(groups, (0.1, 0.0), strict=True)]


class PositionedEmbedding(nn.Embedding):
    """A table of characters and one of learned positions."""

    def __init__(self, table, seq_len):
        super().__init__(*table.weight.shape)
        self.positions = nn.Parameter(torch.randn(seq_len, table.embedding_dim))

    def forward(self, tokens):
        return super().forward(tokens) + self.positions[:tokens.size(1)]


def learned_positions(model):
    model.embed = PositionedEmbedding(model.embed, model.seq_len)


def one_matrix(model):
    for p in model.parameters():
        vars(p).pop("stacked", None)


def unmixed(model):
    for block in model.blocks:
        mix = torch.zeros_like(block.mix)
        mix[-1] = 1
        del block.mix
        block.register_buffer("mix", mix)


def nothing(*args):
    return contextlib.nullcontext()


def without_key_norm():
    norm = study.rms_norm
    return patch.object(study, "rms_norm", lambda x: x if x.dim() == 4 else norm(x))


def query_norm_too():
    attention, norm = study.attention, study.rms_norm
    return patch.object(study, "attention", lambda q, k, v: attention(norm(q).to(v.dtype), k, v))


def rotary_off():
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(study, "rotary", lambda x, cos, sin: x))
    stack.enter_context(changed_model(learned_positions))
    return stack


def gelu_mlp():
    return patch.object(study.Block, "mlp", lambda self, x: self.down(F.gelu(self.up(x))))


def zero_init(model):
    """Every block begins as the identity, and every character equally likely."""
    for name, weight in model.named_parameters():
        if name.endswith(("proj.weight", "down.weight", "head.weight")):
            nn.init.zeros_(weight)


def adamw():
    return patch.object(study, "make_optimizers", adamw_for_all)


# (name, families, how, knobs)
ABLATIONS = [
    ("the recipe", "gpt lstm", nothing, {}),
    ("no mixed characters", "gpt", lambda: changed_model(unmixed), {}),
    ("no norm of keys", "gpt", without_key_norm, {}),
    ("norm of queries too", "gpt", query_norm_too, {}),
    ("learned positions", "gpt", rotary_off, {}),
    ("GELU", "gpt", gelu_mlp, {}),
    ("zero init", "gpt lstm", lambda: changed_model(zero_init), {}),
    ("AdamW, LR .003", "gpt lstm", adamw, {"LR": 0.003}),
    ("AdamW, LR .006", "gpt lstm", adamw, {"LR": 0.006}),
    ("AdamW, LR .012", "gpt lstm", adamw, {"LR": 0.012}),
    ("stacked matrices as one", "gpt lstm", lambda: changed_model(one_matrix), {}),
    ("weight decay 0", "gpt lstm", nothing, {"WEIGHT_DECAY": 0.0}),
    ("weight decay .01", "gpt lstm", nothing, {"WEIGHT_DECAY": 0.01}),
    ("no warm-up", "gpt lstm", nothing, {"WARMUP_FRAC": 0.0}),
    ("warm-up 10 %", "gpt lstm", nothing, {"WARMUP_FRAC": 0.1}),
    ("constant rate", "gpt lstm", lambda: patch.object(study, "lr_scale", constant), {}),
    ("fall of a tenth", "gpt lstm", lambda: patch.object(study, "COOLDOWN", 0.1), {}),
]


class EnoughSteps(Exception):
    pass


def stop_after(steps):
    """A Training that ends after so many steps."""
    class Short(study.Training):
        def gradients(self, batch):
            if self.step >= steps:
                raise EnoughSteps
            return super().gradients(batch)
    return patch.object(study, "Training", Short)


def train_once(args, part, label, model, seed=1, steps=math.inf, **knobs):
    """One training with one budget, by the loop of the study, or its first steps; returns its row.

    The rate is the median of what the loop measured; seconds are those of the process on a CPU, where other
    programs would disturb the clock on the wall, on CUDA those of all steps at that rate.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = Cfg(**{"DATA_ROOT": args.data_root, "SAVE_DIR": folder, "SEED": seed, "BUDGETS": (1.0,),
                     "SAVE_EVERY_S": 1e9, "TRAIN_TOKENS_TARGET": args.tokens, "MODELS": (model,), **knobs})
        run, vocab = study.planned_runs(cfg)[0], study.read_vocab(cfg)
        windows = study.Windows(study.read_training(vocab, cfg)[0], vocab, cfg.SEQ_LEN)
        began, wall, loss = time.process_time(), time.monotonic(), math.inf
        with contextlib.suppress(study.Diverged, EnoughSteps), stop_after(steps):
            study.train_model(run, windows, vocab, cfg)
            loss = study.finished(run, cfg)["rows"][-1]["val_loss"]
        seconds, wall = time.process_time() - began, time.monotonic() - wall
        log = list(study.read_jsonl(run.path("log.jsonl", cfg)))
        rate = statistics.median(point["tokens_per_s"] for point in log)
        with torch.device("meta"):
            flops = study.build_model(run.size, len(vocab.chars), cfg).flops_per_token()
    if cfg.DEVICE == "cuda":
        seconds = log[-1]["step"] * cfg.BATCH_TOKENS / rate
    name = study.device_name(cfg)
    peak = next((peak for gpu, peak in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)
    row = {"part": part, "label": label, "model": run.name, "seed": seed, "tokens": log[-1]["tokens"],
           "seen": log[-1]["step"] * cfg.BATCH_TOKENS,
           "knobs": knobs, "val_loss": loss if loss < math.inf else None, "seconds": round(seconds, 2),
           "tokens_per_s": rate, "flops_per_s": rate * flops, "of_peak": peak and rate * flops / peak,
           "train_loss": log[-1]["train_loss"], "wall": round(wall, 1), "device": name,
           "gb": torch.cuda.max_memory_allocated() / 1e9 if cfg.DEVICE == "cuda" else None}
    record(row)
    return row


def record(row):
    DONE.setdefault(row["part"], []).append(row)
    keep("train", row["part"], rows=DONE[row["part"]])


def sweep(args):
    """Half and twice each learning rate: neither may be more than .3 % better."""
    points = list(itertools.product(args.knobs, args.factors))
    print(f"\nChange of the loss in % at a share of a learning rate, {args.seeds} seed(s)\n"
          f"{'model':10s} {'loss':>7s}", *(f"{knob} x {factor:g}".rjust(13) for knob, factor in points))
    for model in args.models:
        base = [train_once(args, "sweep", "default", model, seed) for seed in args.seed_list]
        print(f"{model:10s} {mean_loss(base):7.4f}", end="", flush=True)
        for knob, factor in points:
            knobs = {knob: getattr(Cfg, knob) * factor}
            rows = [train_once(args, "sweep", f"{knob} x {factor:g}", model, seed, **knobs)
                    for seed in args.seed_list]
            print(f"{mean_change(rows, base):>14s}", end="", flush=True)
        print()


def mean_loss(rows):
    return statistics.mean(row["val_loss"] or math.inf for row in rows)


def mean_change(rows, base):
    """By how many per cent the loss is above that of the same seeds with the recipe."""
    return f"{100 * (mean_loss(rows) / mean_loss(base) - 1):+.2f}"


def compare(args):
    """The rival, tuned in learning rate; the share of its tokens and time in which the study has its loss."""
    model = [m for m in args.models if m.startswith("gpt")][-1]
    ways = {lr: rival(lr) for lr in args.rival_lrs}
    rows = {}
    for lr, (patched, knobs) in ways.items():
        with patched:
            row = rows[lr] = train_once(args, "rival", f"nanoGPT, LR {lr}", model, **knobs)
        print(f"nanoGPT, {model}, LR {lr}: loss {row['val_loss']:.4f}, {row['seconds']} s", flush=True)
    best = min(rows.values(), key=lambda row: row["val_loss"])
    for share in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1):
        tokens = int(share * best["tokens"])
        ours = train_once(args, "rival", f"ours, {share} of the tokens", model, TRAIN_TOKENS_TARGET=tokens)
        print(f"ours, {share:4} of the tokens: loss {ours['val_loss']:.4f} (nanoGPT {best['val_loss']:.4f}) "
              f"in {ours['seconds'] / best['seconds']:.3f} of its time", flush=True)
        if ours["val_loss"] <= best["val_loss"]:
            break
    print("tokens per second, ours / rival, medians of steps taken in turn:")
    for name in [m for m in args.models if m.startswith("gpt")]:
        print(f"  {name:10s} {step_ratio(args, name):.2f}", flush=True)


def step_ratio(args, model, rounds=5):
    """Rate of the study over that of the rival, both trained in turn so that they meet the same machine."""
    rates = ([], [])
    for _ in range(rounds):
        for (patched, knobs), found in zip([(nothing(), {}), rival(1e-3)], rates, strict=True):
            with patched:
                found.append(train_once(args, "ratio", "", model, steps=30, **knobs)["tokens_per_s"])
    return statistics.median(rates[0]) / statistics.median(rates[1])


def ablate(args):
    """What the loss does without a part of the recipe, over seeds; the spread of the seeds beside it."""
    for model in args.models:
        family, base = model.split("_")[0], None
        print(f"\n{model}: loss, change in %, spread over {args.seeds} seeds in %")
        for label, families, how, knobs in ABLATIONS:
            chosen = base is None or any(text in label for text in args.only.split(","))
            if family not in families or not chosen:
                continue
            with how():
                rows = [train_once(args, "ablate", label, model, seed, **knobs) for seed in args.seed_list]
            base = base or rows
            losses = [row["val_loss"] for row in rows]
            spread = 100 * statistics.stdev(losses) / mean_loss(rows) if len(rows) > 1 else math.nan
            change = mean_change(rows, base)
            print(f"  {label:26s} {mean_loss(rows):.4f} {change:>7s} {spread:.2f}", flush=True)


HEADER = (f"{'':34s} {'char/s':>10s} {'TFLOP/s':>8s} {'of peak':>8s} {'GB':>5s} {'start, s':>8s} "
          f"{'whole run, s':>12s} {'loss':>7s}")


def speed_line(args, label, model, **knobs):
    """Trains for a while and prints a line of HEADER; the start is compiling and the first steps."""
    cuda = torch.cuda.is_available()
    knobs = {"TRAIN_TOKENS_TARGET": 0, **knobs}  # the steps between two lines of the log are the study's
    row = train_once(args, "speed", label, model, steps=args.steps or (120 if cuda else 40), **knobs)
    start = row["wall"] - row["seen"] / row["tokens_per_s"]
    whole = start + Cfg().TRAIN_TOKENS_TARGET / row["tokens_per_s"]
    print(f"{row['model'] + ' ' + label:34s} {row['tokens_per_s']:10,.0f} {row['flops_per_s'] / 1e12:8.3f} "
          f"{row['of_peak'] or math.nan:8.1%} {row['gb'] or math.nan:5.2f} {start:8.1f} {whole:12.0f} "
          f"{row['train_loss']:7.4f}", flush=True)
    return whole


def speed(args):
    """Characters per second, share of peak and memory of every model of the study's ladder."""
    cfg = Cfg(DATA_ROOT=args.data_root)
    print(f"\n{study.device_name(cfg)}, {cfg.BATCH_TOKENS:,} characters per step\n{HEADER}")
    total = sum(speed_line(args, "", size.name) for size in cfg.MODELS)
    print(f"the whole ladder at one budget: {total / 60:.1f} minutes, one model after the other")


def changed_training(change):
    """Trains by a Training that `change` has altered."""
    class Changed(study.Training):
        def __init__(self, *args):
            super().__init__(*args)
            change(self)
    return patch.object(study, "Training", Changed)


def without_graph(t):
    t.graphed = False


def without_compiling(t):
    t.loss_of = study.summed_loss


# (label, families, how, knobs): ways to run the same training
OPTIONS = [
    ("as it is", "gpt lstm", nothing, {}),
    ("no CUDA graph", "gpt lstm", lambda: changed_training(without_graph), {}),
    ("not compiled", "gpt", lambda: changed_training(without_compiling), {}),
    ("neither", "gpt lstm", nothing, {"COMPILE": False}),
    ("no cuDNN attention", "gpt", lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), {}),
    ("8 windows a pass", "gpt lstm", nothing, {"MICRO_TOKENS": 8 * 1024}),
    ("16 windows a pass", "gpt lstm", nothing, {"MICRO_TOKENS": 16 * 1024}),
    ("32 windows a pass", "gpt lstm", nothing, {"MICRO_TOKENS": 32 * 1024}),
    ("512 wide", "lstm_5M", nothing, {"MODELS": (("lstm", "5M", 2, 512),)}),
    ("1,024 wide", "lstm_20M", nothing, {"MODELS": (("lstm", "20M", 2, 1024),)}),
    ("6 layers, 1,024 wide", "lstm_50M", nothing, {"MODELS": (("lstm", "50M", 6, 1024),)}),
]


def options(args):
    """What each way of running it costs in time and memory; --only chooses among them."""
    print(f"\n{study.device_name(Cfg())}\n{HEADER}")
    for model in args.models:
        for label, models, how, knobs in OPTIONS:
            chosen = any(text in label for text in args.only.split(","))
            if chosen and any(name in (model, model.split("_")[0]) for name in models.split()):
                with how():
                    speed_line(args, label, model, **knobs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data_root")
    parser.add_argument("--parts", default="speed,rival,sweep", help="and ablate, options")
    parser.add_argument("--models", help="names from the ladder; default: two of each family, far apart")
    parser.add_argument("--tokens", type=int, default=0, help="per training; 0 = the study's, on CUDA 20 M")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--knobs", default="LR,LR_ADAM", help="learning rates to sweep")
    parser.add_argument("--factors", default="0.5,2", help="of the learning rates")
    parser.add_argument("--only", default="", help="ablations or options whose name holds one of these texts")
    parser.add_argument("--steps", type=int, default=0, help="of speed and options; 0 = 40, on CUDA 120")
    parser.add_argument("--rival_lrs", default="0.001,0.002,0.004,0.008")
    args = parser.parse_args()
    if not Path(args.data_root, "tokens", "vocab.json").exists():
        parser.error(f"no tokens in {args.data_root}: python LakhMIDI.py --to tokenize --DATA_ROOT ...")
    cuda = torch.cuda.is_available()
    args.tokens = args.tokens or (20_000_000 if cuda else 0)
    far_apart = "gpt_1M,gpt_20M,lstm_1M,lstm_20M" if cuda else "gpt_60K,gpt_1M,lstm_60K,lstm_1M"
    args.models, args.knobs = (args.models or far_apart).split(","), args.knobs.split(",")
    args.factors, args.rival_lrs = (list(map(float, x.split(","))) for x in (args.factors, args.rival_lrs))
    args.seed_list = range(args.first_seed, args.first_seed + args.seeds)
    for part in args.parts.split(","):
        {"sweep": sweep, "rival": compare, "ablate": ablate, "speed": speed, "options": options}[part](args)


if __name__ == "__main__":
    main()
