#!/usr/bin/env bash
# One machine, every GPU of it:  launch/one-node.sh MODEL [flags]
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${NPROC_PER_NODE:-gpu}" --no-python \
  mistral-chat "$@"
