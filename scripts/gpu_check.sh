#!/usr/bin/env bash
# Run what one GPU shows of flowrl (tests/gpu: minutes) and print its figures as one table; without a GPU it says so.
# With --anywhere it runs on the CPU what can run there. Other arguments go to pytest: -k sleeping
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
export PATH="$root/.venv/bin:$PATH"
code=0
timeout --foreground --kill-after=20 1200 python -m pytest tests/gpu --quiet --tb=short --durations=0 --durations-min=1 "$@" || code=$?
exit $((code == 5 ? 0 : code)) # 5: none was run
