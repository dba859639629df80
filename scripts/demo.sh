#!/usr/bin/env bash
# Starts a router and two expert workers on a small checkpoint, streams an answer to stdout, and stops them.
# $1 is the bin folder of the virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=$1
model=.cache/demo
prompt='The experts of a mixture'

say() { printf 'demo: %s\n' "$*" >&2; }

if [[ ! -f $model/config.json ]]; then
  say "writing a small DeepSeek-V3-shaped checkpoint with random weights to $model (once)"
  rm -rf "$model" "$model.partial"
  mkdir -p .cache
  "$bin/python" -m tests.tiny_checkpoint "$model.partial" --family v3
  mv "$model.partial" "$model"
fi

say "starting a router and two expert workers; the text will be random, because the weights are"
say "prompt: $prompt"
"$bin/expertmesh" generate "$prompt" --model "$model" --expert-workers 2 \
  --max-tokens 48 --ignore-eos --temperature 0.8 --seed 7
say "that was random text from random weights, streamed over gRPC; router and expert workers are stopped"
say "your own: $bin/expertmesh up --model DIR, then $bin/expertmesh generate 'Hello'"
