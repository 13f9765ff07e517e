"""The blocks of a page that a reader would write or run, and no others."""

from __future__ import annotations

from scripts.tested_pages import blocks

PAGE = """# A page

```console
rm -rf never
```

```python title="a.py"
x = 1
```

<!-- tested -->
```console
python a.py
```

```text
not a file
```
"""


def test_titled_and_marked_blocks_are_found_each_by_itself():
    assert blocks(PAGE) == [(7, "python", "a.py", "x = 1\n"), (12, "console", "", "python a.py\n")]
