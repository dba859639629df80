#!/usr/bin/env bash
# Starts a router and two expert workers on the trained demo model, streams an answer to stdout, and stops them.
# $1 is the bin folder of the virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=$1
prompt='Question: What is expert parallelism? Answer:'

say() { printf 'demo: %s\n' "$*" >&2; }

say "starting a router and two expert workers on examples/demo_model, a model of 6 million parameters"
say "prompt: $prompt"
"$bin/expertmesh" generate "$prompt" --model examples/demo_model --expert-workers 2 --temperature 0 --max-tokens 64
say "that was streamed over gRPC; router and expert workers are stopped"
say "talk to it: $bin/expertmesh chat --model examples/demo_model --temperature 0"
say "your own model: $bin/expertmesh up --model DIR, then $bin/expertmesh generate 'Hello'"
