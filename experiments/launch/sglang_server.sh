#!/usr/bin/env bash
# One process of an SGLang server with the flags that reinforcement learning needs, on GPUs.
#
#   sglang_server.sh MODEL_DIR PORT [SGLANG_FLAG ...]
#
# Run it on each node of the server, from SGLang's own environment or container. Flags given here
# come last and win. docs/sglang.md says why each flag is there.
#
#   TENSOR_PARALLEL  GPUs of the server, over all its nodes (default 8)
#   NODES            nodes of the server (default 1)
#   NODE_RANK        of this one, from 0; the one of rank 0 answers HTTP (default 0)
#   HEAD             host:port where the nodes meet, needed where NODES > 1
#   DETERMINISTIC    1: a request's tokens depend on its seed alone; slower (default 0)
#   PYTHON           interpreter that has SGLang (default python3)
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sglang_server.sh MODEL_DIR PORT [SGLANG_FLAG ...]" >&2
  exit 2
fi
model=$1
port=$2
shift 2
nodes=${NODES:-1}

flags=(
  --model-path "$model"
  --host 0.0.0.0
  --port "$port"
  --tp-size "${TENSOR_PARALLEL:-8}"
  --weight-version 0
  --enable-return-routed-experts
  --enable-fp32-lm-head
  --tool-call-parser glm45
  --reasoning-parser glm45
  --enable-metrics
  --mem-fraction-static 0.85
)
if [ "$nodes" -gt 1 ]; then
  flags+=(
    --nnodes "$nodes"
    --node-rank "${NODE_RANK:?NODE_RANK: expected one where NODES > 1}"
    --dist-init-addr "${HEAD:?HEAD: expected host:port where NODES > 1}"
  )
fi
if [ "${DETERMINISTIC:-0}" = 1 ]; then
  flags+=(--enable-deterministic-inference --attention-backend fa3)
fi
exec "${PYTHON:-python3}" -m sglang.launch_server "${flags[@]}" "$@"
