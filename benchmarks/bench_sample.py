"""How much faster is the sampler than one that reads its window anew for every character? What does the
grammar cost?

    python benchmarks/bench_sample.py runs_lakh [gpt_1M lstm_1M ...]

Both samplers are greedy and must write the same text. Seconds are those of the process, since other programs
would disturb the clock on the wall. The ratios, not the rates, travel between machines.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import LakhMIDI as study

ROWS, CHARS = 16, 1_024


class Endless(torch.nn.Module):
    """A model that never ends a tune, so that every row has its full length; without a cache if `again`."""

    def __init__(self, model, again=False):
        super().__init__()
        self.model, self.again, self.seq_len = model, again, model.seq_len

    def empty_state(self, batch, length):
        return (
            torch.zeros(batch, 0, dtype=torch.long) if self.again else self.model.empty_state(batch, length)
        )

    def forward(self, tokens, state):
        if self.again:
            state = torch.cat([state, tokens], 1)
            logits = self.model(state)[0]
        else:
            logits, state = self.model(tokens, state)
        logits[..., study.END] = -1e9
        return logits, state


def timed(model, vocab, **options):
    began = time.process_time()
    tunes = study.sample(
        model, vocab, ["X:1\n", "X:1\nL:1/8\nM:4/4\n"] * (ROWS // 2), max_chars=CHARS, **options
    )
    seconds = time.process_time() - began
    return tunes, sum(len(tune["text"]) for tune in tunes) / seconds, sum(tune["forced"] for tune in tunes)


def main(folder, *names):
    heads = ("cached char/s", "uncached char/s", "speed-up", "constrained / free", "chosen by the grammar")
    print(f"{ROWS} x {CHARS:,}", *heads, sep="   ")
    for name in names or ("gpt_1M", "lstm_1M"):
        model, vocab, _ = study.load(Path(folder, f"{name}.pt"))
        fast, fast_rate, _ = timed(Endless(model), vocab, temperature=0)
        slow, slow_rate, _ = timed(Endless(model, again=True), vocab, temperature=0)
        assert fast == slow, "the two samplers differ"
        free_rate = timed(model, vocab, seed=1)[1]
        bound, bound_rate, forced = timed(model, vocab, seed=1, constrained=True)
        chosen = forced / sum(len(tune["text"]) for tune in bound)
        print(
            f"{name:10s} {fast_rate:15,.0f} {slow_rate:17,.0f} {fast_rate / slow_rate:8.0f} x "
            f"{bound_rate / free_rate:20.2f} {chosen:23.1%}"
        )
        result = {
            "bench": "sample",
            "model": name,
            "speed_up": fast_rate / slow_rate,
            "constrained_speed": bound_rate / free_rate,
            "chosen_by_grammar": chosen,
            "rows": ROWS,
            "chars": CHARS,
            "seq_len": model.seq_len,
        }
        with open(Path(__file__).with_name("results.jsonl"), "a", encoding="utf-8") as results:
            results.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
