#!/usr/bin/env bash
# Build the book into .site/site/ without network: bash scripts/docs.sh. Fails on a broken link, a page that no menu
# names and a setting, command or error without words. Needs .venv (scripts/setup.sh).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
export PATH="$root/.venv/bin:$PATH"
rm -rf .site
mkdir .site
cp docs/zensical.toml .site/
cp -r docs .site/pages
rm .site/pages/zensical.toml
python scripts/reference.py .site/pages
cd .site
zensical build --strict
printf 'docs: %s pages, begin with %s\n' "$(find site -name '*.html' | wc -l)" "$root/.site/site/index.html"
