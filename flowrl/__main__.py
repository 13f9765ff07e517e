"""`python -m flowrl` is the command `flowrl`, for environments whose scripts are not on the PATH.

Tests: tests/graphs/test_commands.py
"""

from __future__ import annotations

import sys

from flowrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
