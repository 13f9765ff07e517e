#!/usr/bin/env bash
# The whole pipeline on SmolLM2-135M: SFT, preference pairs sampled from it, a reward model, PPO against that model, DPO
# beside it, every checkpoint judged on held-out problems, and one table. About 22 minutes on 2 cores.
#   bash scripts/pipeline.sh [DIRECTORY]       (default: runs/pipeline; what is finished there is not done again)
# Every step's directory is the next one's input. Set QUICK=1 for a few steps of each: it proves that all fits together.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
out="$(realpath -m "${1:-runs/pipeline}")"
mkdir -p "$out"
cd "$root"
python="$root/.venv/bin/python"
model="${MODEL:-SmolLM2-135M-Instruct}"
sft_steps=26 reward_steps=24 ppo_steps=12 dpo_steps=24 samples=4
if [[ -n "${QUICK:-}" ]]; then sft_steps=2 reward_steps=2 ppo_steps=2 dpo_steps=2 samples=2; fi

# step NAME GRAPH SETTING...: run a graph into $out/NAME, or go on with a run that was cut short.
step() {
    local name="$1" graph="$2" began=$SECONDS set=()
    shift 2
    if [[ -f "$out/$name/done" ]]; then
        printf '%-18s done before\n' "$name"
        return
    fi
    for each in "$@"; do set+=(--set "$each"); done
    local where=(--name "$name" --runs-dir "$out")
    if compgen -G "$out/$name/checkpoints/step-*/manifest.json" >/dev/null; then
        where=(--resume "$out/$name")
    else
        rm -rf "${out:?}/$name"
    fi
    "$python" -m flowrl.cli run "graphs/$graph.py" "${where[@]}" "${set[@]}" >"$out/$name.out" 2>&1 || {
        tail -n 20 "$out/$name.out"
        printf 'pipeline: %s failed; all it said is in %s\n' "$name" "$out/$name.out"
        exit 1
    }
    touch "$out/$name/done"
    printf '%-18s %4d s\n' "$name" $((SECONDS - began))
}

# judge NAME MODEL: sample the held-out problems with a policy, score them by the reward model and by the verifier.
judge() {
    step "eval-$1" generate runtime=local "model=$2" "data.source=$out/prompts-heldout.jsonl" data.num_heldout=0 \
        "generator.group_size=$samples" "reward_models=[$out/reward]" "reference_model=$out/sft" \
        generator.threads=2
}

[[ -f "$out/demonstrations.jsonl" ]] || "$python" -m perf.pipeline_data "$out"

step sft sft "model=$model" "data.source=$out/demonstrations.jsonl" data.num_heldout=32 "steps=$sft_steps" \
    learner.lr=2e-5 learner.threads=2
step pairs generate runtime=local "model=$out/sft" "data.source=$out/prompts-train.jsonl" data.num_heldout=0 \
    generator.group_size=8 generator.threads=2 writer.take=pair
step reward reward_model "model=$out/sft" "data.source=$out/pairs" data.num_heldout=40 "steps=$reward_steps" \
    examples_per_step=8 learner.lr=2e-5 learner.threads=2
step ppo ppo_async "model=$out/sft" "critic_model=$out/reward" reward.function= "reward_models=[$out/reward]" \
    evaluation.function=reasoning_gym_score \
    "data.source=$out/prompts-train.jsonl" data.num_heldout=8 evaluation.samples=2 "steps=$ppo_steps" \
    learner.save_every=4 learner.keep_checkpoints=10 learner.lr=5e-6
step dpo preference "model=$out/sft" "data.source=$out/pairs" data.num_heldout=40 "steps=$dpo_steps" \
    examples_per_step=8 learner.lr=5e-6 learner.threads=2 learner.save_every=8 learner.keep_checkpoints=10

judge sft "$out/sft"
for method in ppo dpo; do
    for checkpoint in "$out/$method"/checkpoints/step-*/; do
        version="$(basename "$checkpoint")"
        judge "$method-${version#step-}" "${checkpoint}model"
    done
done
"$python" -m perf.pipeline_table "$out"
printf 'pipeline: %d s; table.txt, curves.csv and ppo-steps.csv are in %s\n' "$SECONDS" "$out"
