"""Benchmarks: what is timed (registry, ops), how (compare, roofline), against whom (peers), pages (report)."""

import sys
from pathlib import Path

# The case generator and the comparison live with the tests: speed is measured on shapes that are tested, by their rule.
_tests = str(Path(__file__).resolve().parent.parent / "tests")
if _tests not in sys.path:
    sys.path.append(_tests)
