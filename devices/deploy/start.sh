#!/bin/sh
# usage: start.sh [OPTIONS OF edgeq run...]
#
# Chat with the model of this bundle; with text piped in, answer it. EDGEQ_MODEL: another GGUF file.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for edgeq in "${HOME:-}/.local/share/edgeq/venv/bin/edgeq" /opt/edgeq/venv/bin/edgeq edgeq; do
  if command -v "$edgeq" >/dev/null; then break; fi
  [ "$edgeq" != edgeq ] || { echo "start.sh: edgeq is not installed: sh $here/install.sh" >&2; exit 2; }
done
model=${EDGEQ_MODEL:-}
for found in "$here"/models/*.gguf; do
  if [ -z "$model" ] && [ -f "$found" ]; then model=$found; fi
done
[ "$model" ] || { echo "start.sh: no model in $here/models: set EDGEQ_MODEL" >&2; exit 2; }
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-2}" # glibc: no heap for each thread
exec "$edgeq" run "$model" "$@"
