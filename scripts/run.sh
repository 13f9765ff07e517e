#!/usr/bin/env bash
# Set up where needed, then train: bash scripts/run.sh [arguments of `flowrl run graphs/ppo_async.py`].
# Works from anywhere; the run is written under runs/ of the directory it is called from.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/flowrl" run "$root/graphs/ppo_async.py" "$@"
