"""How much faster is the sampler than one that reads its window again for every character, and what does the grammar cost?

    python benchmarks/bench_sample.py runs_lakh [gpt_1M lstm_1M ...]

Both samplers are greedy and must write the same text. Seconds are those of the process, where other programs would disturb
the clock on the wall. Ratios come from one run; they, not the rates, travel between machines.
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
        return torch.zeros(batch, 0, dtype=torch.long) if self.again else self.model.empty_state(batch, length)

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
    tunes = study.sample(model, vocab, ["X:1\n" + "L:1/8\n" * (i % 2) for i in range(ROWS)], max_chars=CHARS, **options)
    seconds = time.process_time() - began
    return tunes, sum(len(tune["text"]) for tune in tunes) / seconds, sum(tune["forced"] for tune in tunes)


def main(folder, *names):
    print(f"{ROWS} x {CHARS:,} characters   cached char/s   uncached char/s   speed-up   constrained / free   chosen by the grammar")
    for name in names or ("gpt_1M", "lstm_1M"):
        model, vocab, _ = study.load(Path(folder, f"{name}.pt"))
        fast, fast_rate, _ = timed(Endless(model), vocab, temperature=0)
        slow, slow_rate, _ = timed(Endless(model, again=True), vocab, temperature=0)
        assert fast == slow, "the two samplers differ"
        free_rate = timed(Endless(model), vocab, seed=1)[1]
        bound, bound_rate, forced = timed(Endless(model), vocab, seed=1, constrained=True)
        chosen = forced / sum(len(tune["text"]) for tune in bound)
        print(f"{name:20s} {fast_rate:18,.0f} {slow_rate:17,.0f} {fast_rate / slow_rate:9.0f} x {bound_rate / free_rate:18.2f} "
              f"{chosen:22.1%}")
        result = {"bench": "sample", "model": name, "speed_up": fast_rate / slow_rate, "constrained_speed": bound_rate / free_rate,
                  "chosen_by_grammar": chosen, "rows": ROWS, "chars": CHARS, "seq_len": model.seq_len}
        with open(Path(__file__).with_name("results.jsonl"), "a", encoding="utf-8") as results:
            results.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
