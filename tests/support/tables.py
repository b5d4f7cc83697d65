"""Every instruction-set table of the CPU backend: a process chooses its table once, so each has a process of its own.

def table_errors():
    return tables.misses(check, [(case, dtype), ...])

@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from memattn import _native

TESTS = Path(__file__).parent.parent
AVAILABLE = _native.host().available_isas() if _native.host() else ["portable"]
PRODUCTS_ONLY = ("avx512_bf16", "amx")  # differ from avx512 in matrix products alone

each = pytest.mark.parametrize("isa", AVAILABLE)


def misses(check: Callable[..., object], calls: Iterable[tuple]) -> list[str]:
    """What check(*call) says against those of the calls that fail it."""
    wrong = []
    for call in calls:
        try:
            check(*call)
        except AssertionError as failure:
            named = " ".join(str(getattr(x, "name", x)) for x in call)
            wrong.append(f"{named}: {str(failure).splitlines()[0]}")
    return wrong


def assert_no_errors(isa: str, module: str, *, products: bool = True) -> None:
    """`table_errors()` of the test module finds none with the table `isa`; products: whether the op has any."""
    if not products and isa in PRODUCTS_ONLY:
        pytest.skip(f"the op has no matrix products: its table for {isa} is avx512's")
    code = f"import json, {module} as t; print(json.dumps(t.table_errors()))"
    path = os.pathsep.join([str(TESTS.parent / "python"), str(TESTS)])
    env = {**os.environ, "MEMATTN_CPU_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
