#!/usr/bin/env bash
# What a GPU has to show, in the order of its worth: each part prints as it goes and ends, none waits for
# another to succeed, all end within 15 minutes. One H100 needs about ten.
#   bash benchmarks/gpu.sh DATA_ROOT [KNOBS]   a folder that `python LakhMIDI.py --to tokenize KNOBS` has filled
#   DRY=1 bash benchmarks/gpu.sh DATA_ROOT     the same in small, to see on a CPU that all of it runs
# The full study: python LakhMIDI.py --LMD_DOWNLOAD full
set -uo pipefail
data=$(realpath "${1:?the DATA_ROOT of a finished tokenize}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
runs=$(mktemp -d)
if [ -n "${DRY:-}" ]; then
  cp benchmarks/results.jsonl "$runs" && trap 'cp "$runs/results.jsonl" benchmarks/' EXIT
  steps=(3 3) models=gpt_25K,lstm_25K
  ladder=(--STUDY smoke --DEVICE cpu --EVAL_TOKENS 4000 --SAMPLES 4 --SAMPLE_CHARS 200)
else
  steps=(60 40) models=gpt_100M,lstm_50M,lstm_20M,lstm_5M
  ladder=(--TRAIN_TOKENS_TARGET 10_000_000 --SAMPLES 100 --SAMPLE_CHARS 1_000)
fi
failed=0

part() { # title, seconds it may take, command
  local began=$SECONDS title=$1 seconds=$2
  echo "== $title"
  timeout -k 30 "$seconds" "${@:3}"
  local code=$?
  echo "== ended after $((SECONDS - began)) s with code $code$([ $code = 124 ] && echo ', its time was over')"
  [ $code = 0 ] || failed=$((failed + 1))
}

part "1 Tests that train on the GPU" 150 \
  "$python" -m pytest tests/test_train.py -q -rs -k "gpu or compiled or number or graph"
part "2 Every model of the ladder: characters a second, share of peak, memory; minutes for 100 M characters each" 300 \
  "$python" benchmarks/bench_train.py "$data" --parts speed --steps "${steps[0]}"
part "3 Ways to run them: without a CUDA graph, other widths of the LSTM, larger passes" 200 \
  "$python" benchmarks/bench_train.py "$data" --parts options --models "$models" --steps "${steps[1]}" \
  --only "as it is,no CUDA,no cuDNN,wide,32 windows"
part "4 A ladder of 10 M characters, three processes on one card, and 100 tunes judged" 240 \
  "$python" -m torch.distributed.run --standalone --nproc_per_node=3 LakhMIDI.py --from train \
  --DATA_ROOT "$data" --SAVE_DIR "$runs" "${ladder[@]}" "${@:2}"
echo "Report of part 4: $runs/report.html. Parts that failed: $failed"
exit "$failed"
