#!/usr/bin/env bash
# Run the commands that README.md shows: every ```console block right below a line `<!-- tested -->`, each in a shell of
# its own at the root, so that what the README says is what works. Exits 5 where no block is marked, as pytest does.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
export PATH="$root/.venv/bin:$PATH"
blocks="$(mktemp -d)"
trap 'rm -rf "$blocks"' EXIT

awk -v into="$blocks" '
    /^```/ && inside { inside = 0; close(file); next }
    /^```console/ && marked { inside = 1; file = sprintf("%s/%03d.sh", into, ++count); next }
    inside { print > file }
    { marked = /^<!-- tested -->/ }
' README.md

shopt -s nullglob
found=("$blocks"/*.sh)
if ((${#found[@]} == 0)); then
    echo "README.md marks no block as tested"
    exit 5
fi
for block in "${found[@]}"; do
    echo "-- README: $(head -n 1 "$block")"
    bash -euo pipefail "$block" || { echo "README.md: a command of this block failed:"; cat "$block"; exit 1; }
done
