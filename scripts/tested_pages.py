"""Do what README.md and the book say, as a reader would, so that what they say is what works.

Every block ```console right below a line `<!-- tested -->` is run by a shell that stops at the first error: README's at
the root of the checkout, a page's in a scratch directory of the page's own, where its blocks with a title
(```python title="my_rewards.py"```) have been written to files of that name first, in the order of the page.
Called by scripts/test.sh: python scripts/tested_pages.py [PAGE ...]; all of them by default. Exits 1 if a block
failed, with its page, its line and what it said.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "<!-- tested -->\n"
AT_ONCE = 3  # pages, on two cores: each waits now and then for what it has started


def main(names: list[str]) -> int:
    """Do the tested blocks of the named pages, or of all, three pages at a time."""
    pages = [Path(name).resolve() for name in names] or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        each = [pool.submit(follow, page) for page in pages]
        done = [one.result() for one in each]
    num_run = sum(one or 0 for one in done)
    if None in done or not num_run:
        return 1
    print(f"{num_run} blocks of {len(pages)} pages do what they say")
    return 0


def follow(page: Path) -> int | None:
    """Return how many blocks of a page were run; None after the first that failed."""
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    num_run = 0
    with tempfile.TemporaryDirectory(prefix="flowrl-page-") as scratch:
        directory = ROOT if page == ROOT / "README.md" else Path(scratch)
        for line, kind, title, body in blocks(page.read_text()):
            if title:
                path = Path(scratch) / title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(body)
            elif kind == "console":
                where, began_s = f"{page.relative_to(ROOT)}:{line}", time.monotonic()
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", body], cwd=directory, env=environment,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
                num_run += 1
                print(f"-- {where}: exit {done.returncode} ({time.monotonic() - began_s:.0f} s)", flush=True)
                if done.returncode:
                    print(f"{where}: a command of this block failed:\n{body}\n{done.stdout}", flush=True)
                    return None
    return num_run


def blocks(text: str) -> list[tuple[int, str, str, str]]:
    """Return line, language, title and body of the blocks that are written or run."""
    found: list[tuple[int, str, str, str]] = []
    for match in FENCE.finditer(text):
        kind, title, body = match[1], match[2] or "", match[3]
        if title or (kind == "console" and text[: match.start()].endswith(MARK)):
            found.append((text.count("\n", 0, match.start()) + 1, kind, title, body))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
