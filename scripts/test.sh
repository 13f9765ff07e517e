#!/usr/bin/env bash
# Set up where needed, then run every check and every test that this machine can run; fails at the end if one failed.
# About 15 minutes on 2 cores, set-up not counted. A tier that hangs is ended after 10 minutes.
# With --all also the proofs of minutes: tests marked long, and faults on real processes, which print their own table.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
bash scripts/setup.sh || exit 1
export PATH="$root/.venv/bin:$PATH"
summary=()
status=0

# tier NAME EXPECTED COMMAND...: run one tier under a heading; pytest's 5 (nothing collected) is said, not failed.
tier() {
    local name="$1" expected="$2" code=0 began=$SECONDS outcome=passed
    shift 2
    printf '\n==== %s (about %s)\n' "$name" "$expected"
    timeout --foreground --kill-after=20 600 "$@" || code=$?
    case "$code" in
        0) ;;
        5) outcome="has no tests" ;;
        124 | 137) outcome="FAILED: ended after 600 s"; status=1 ;;
        *) outcome="FAILED (exit $code)"; status=1 ;;
    esac
    summary+=("$(printf '%-12s %-16s %4d s' "$name" "$outcome" $((SECONDS - began)))")
}

pytest_tier() {
    tier "$1" "$2" python -m pytest "tests/$1" -m "(${3:-not gpu}) and not long" --tb=short --durations=5 "${@:4}"
}

printf 'test: check, slow units, contracts, graphs, ray, book, pages: about 15 minutes\n'
tier check "75 s" bash scripts/check.sh
tier "slow units" "90 s" python -m pytest tests/unit -m "slow and not gpu and not long" --tb=short --numprocesses 2
pytest_tier contracts "4 min" "not gpu" --numprocesses 2 --dist loadfile
pytest_tier graphs "2 min" "not gpu" --numprocesses 2 --dist loadfile
pytest_tier ray "5 min" "not gpu" --numprocesses 2 --dist loadfile
if nvidia-smi -L >/dev/null 2>&1 && [[ -d tests/gpu ]]; then pytest_tier gpu "3 min" gpu; fi
tier book "10 s" bash scripts/docs.sh
tier pages "3 min" python scripts/tested_pages.py

if [[ "${1:-}" == --all ]]; then
    tier "long tests" "5 min" python -m pytest tests -m "long and not gpu" --tb=short --durations=5
    tier faults "8 min" python -m perf.faults --faults 20 --seeds 0
fi

printf '\n==== summary (%d s)\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
if ((status)); then printf 'test: FAILED\n'; else printf 'test: all passed\n'; fi
exit "$status"
