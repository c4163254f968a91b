#!/usr/bin/env bash
# What a GPU has to show, in the order of its worth; each part prints as it ends. About ten minutes on one H100.
#   bash benchmarks/gpu.sh DATA_ROOT     a folder with tokens/, as `python LakhMIDI.py --to tokenize` writes it
# The full study: python LakhMIDI.py --LMD_ZIP_PATH lmd_full.tar.gz
set -uo pipefail
data=$(realpath "${1:?the DATA_ROOT of a finished tokenize}")
cd "$(dirname "$0")/.."

echo "1 Tests that train on the GPU"
python3 -m pytest tests/test_train.py -q -k "gpu or compiled or number"

echo "2 Every model of the ladder: characters a second, share of peak, memory; minutes for 100 M characters each"
python3 benchmarks/bench_train.py "$data" --parts speed --steps 60

echo "3 Ways to run them: without a CUDA graph, other widths of the LSTM, larger passes"
python3 benchmarks/bench_train.py "$data" --parts options --models gpt_100M,lstm_50M,lstm_20M,lstm_5M \
  --steps 40 --only "no CUDA,wide,32 windows"

echo "4 A ladder of 10 M characters, three processes on one card, and 100 tunes judged"
runs=$(mktemp -d)
python3 -m torch.distributed.run --nproc_per_node=3 LakhMIDI.py --from train --DATA_ROOT "$data" --SAVE_DIR "$runs" \
  --TRAIN_TOKENS_TARGET 10_000_000 --SAMPLES 100 --SAMPLE_CHARS 1_000
echo "its report: $runs/report.html"
