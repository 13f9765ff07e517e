#!/usr/bin/env bash
# Everything that needs seconds: format, lint, types, layers, unit tests. Runs all of them, fails if one failed.
# Needs .venv (scripts/setup.sh). Arguments go to pytest: bash scripts/check.sh -k staleness
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
export PATH="$root/.venv/bin:$PATH"
failed=()

step() {
    local name="$1" began=$SECONDS
    shift
    printf '\n-- %s\n' "$name"
    "$@" || failed+=("$name")
    printf '   (%s: %d s)\n' "$name" $((SECONDS - began))
}

step format ruff format --check --quiet .
step lint ruff check --quiet .
step layers lint-imports --no-logo
step types pyright
step "unit tests" python -m pytest tests/unit -m "not slow" --numprocesses 2 --quiet --tb=short "$@"

if ((${#failed[@]})); then
    printf '\ncheck: failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
printf '\ncheck: all passed\n'
