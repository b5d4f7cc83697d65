"""`python -m memattn demo`: train a small model on real text, read a long one with it, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

NEEDS = ("matplotlib", "safetensors", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the arguments after `demo`; returns the exit status."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        print(
            f"memattn demo: error: {', '.join(missing)} not installed; fix: pip install 'memattn[demo]'",
            file=sys.stderr,
        )
        return 1
    from memattn.demo import run

    return run.main(sys.argv[1:] if argv is None else argv)
