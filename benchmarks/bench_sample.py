"""How much faster is sampling than reading the window anew for each character? What does --valid cost?

    python benchmarks/bench_sample.py runs_lakh [gpt_1M lstm_1M ...]

Both samplers are greedy and must write the same text. Seconds are those of the process, since other programs
would disturb the clock on the wall. The ratios, not the rates, travel between machines. Steps a character
(calls of the model for each character written) say how much a GPU waits for Python.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import keep

import LakhMIDI as study

ROWS, CHARS = 16, 1_024


class Counted(torch.nn.Module):
    """A model that counts its steps; `endless`: no tune ends; `again`: it remembers no state, only tokens."""

    def __init__(self, model, endless=True, again=False):
        super().__init__()
        self.model, self.endless, self.again, self.seq_len = model, endless, again, model.seq_len
        self.steps = 0

    def empty_state(self, batch, length):
        if self.again:
            return [torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, dtype=torch.long)]
        return self.model.empty_state(batch, length)

    def forward(self, tokens, state):
        self.steps += 1
        if self.again:
            read, n = state
            rows = torch.arange(len(read))[:, None]
            places = n[:, None] + torch.arange(tokens.size(1))
            read[rows, places] = tokens
            logits = torch.stack([self.model(row[None, : place[-1] + 1])[0][0, -1:] for row, place in
                                  zip(read, places, strict=True)])
            state = [read, n + tokens.size(1)]
        else:
            logits, state = self.model(tokens, state)
        if self.endless:
            logits[..., study.END] = -1e9
        return logits, state


def timed(model, vocab, **options):
    """Tunes, characters a second, steps a character."""
    began, prompts = time.process_time(), ["X:1\n", "X:1\nL:1/8\nM:4/4\n"] * (ROWS // 2)
    tunes = study.sample(model, vocab, prompts, max_chars=CHARS, **options)
    chars = sum(len(tune["text"]) for tune in tunes) - sum(map(len, prompts))
    return tunes, chars / (time.process_time() - began), model.steps / chars


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", help="of checkpoints")
    parser.add_argument("names", nargs="*", default=["gpt_1M", "lstm_1M"], help="of models")
    args, rows = parser.parse_args(), []
    print(f"{ROWS} x {CHARS:,}", "cached char/s", "uncached char/s", "speed-up", "steps/char", "valid / free",
          "tries a bar", sep="   ")
    for name in args.names:
        model, vocab, _ = study.load(Path(args.folder, f"{name}.pt"))
        fast, fast_rate, steps = timed(Counted(model), vocab, temperature=0)
        slow, slow_rate, _ = timed(Counted(model, again=True), vocab, temperature=0)
        assert fast == slow, "the two samplers differ"
        free_rate = timed(Counted(model, endless=False), vocab, seed=1)[1]
        valid, valid_rate, _ = timed(Counted(model, endless=False), vocab, seed=1, valid=True)
        tries = sum(tune["tries"] for tune in valid) / max(1, sum(tune["bars"] for tune in valid))
        speed_up = fast_rate / slow_rate
        print(f"{name:10s} {fast_rate:15,.0f} {slow_rate:17,.0f} {speed_up:8.0f} x {steps:10.4f} "
              f"{valid_rate / free_rate:14.2f} {tries:12.2f}")
        rows.append({"model": name, "speed_up": speed_up, "steps_per_char": steps,
                     "valid_speed": valid_rate / free_rate, "tries_a_bar": tries, "seq_len": model.seq_len})
    keep("sample", tunes=ROWS, chars=CHARS, rows=rows)


if __name__ == "__main__":
    main()
