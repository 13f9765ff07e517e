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

# Types take one core for as long as all the rest takes: they are checked beside it, and told of at the end.
types="$(mktemp)"
pyright >"$types" 2>&1 &
typing=$!
trap 'kill "$typing" 2>/dev/null; rm -f "$types"' EXIT
types_checked() {
    local code=0
    wait "$typing" || code=$?
    cat "$types"
    return "$code"
}

step format ruff format --check --quiet .
step lint ruff check --quiet .
step layers lint-imports --no-logo
step "unit tests" python -m pytest tests/unit -m "not slow" --numprocesses 2 --quiet --tb=short "$@"
step types types_checked

if ((${#failed[@]})); then
    printf '\ncheck: failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
printf '\ncheck: all passed\n'
