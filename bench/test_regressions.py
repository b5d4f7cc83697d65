"""CPU speed from commit to commit, carried by pytest-benchmark. Each case passes its gate before it is timed.

    B="python -m pytest bench/test_regressions.py --benchmark-enable"
    $B --benchmark-autosave                                                      on one commit
    $B --benchmark-compare --benchmark-compare-fail=median:10%                   on the next

Without --benchmark-enable each case runs once, as a test.
"""

import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from bench.candidates import ours  # noqa: E402
from bench.compare import Candidate, Gate, copy_of  # noqa: E402
from bench.contest import Choice, Contest, contests  # noqa: E402
from bench.registry import MODES, OPS  # noqa: E402

GROUPS = ("training", "decode", "call")
CHOICE = Choice(OPS, MODES, GROUPS, ("float32", "bfloat16"), "cpu", quick=True)


def name(contest: Contest) -> str:
    """As pytest shows it."""
    return f"{contest.entry.op}-{contest.mode}-{contest.dtype_name}-{contest.group}"


@pytest.mark.parametrize("contest", list(contests(CHOICE)), ids=name)
def test_speed(contest: Contest, benchmark) -> None:
    """The backend a user gets, on input sets that take turns."""
    (candidate,) = (
        c for c in ours(contest.entry, contest.mode, "cpu", contest.dtype, "auto") if isinstance(c, Candidate)
    )
    sets = contest.sets("cpu")
    before = copy_of(sets[0])
    gate = Gate(contest.entry, contest.mode, contest.entry.ceiling[contest.dtype])
    errors, wrong = gate.judge(0, before, sets[0], candidate.call(sets[0]))
    assert not wrong, wrong
    work = contest.entry.work(contest.case, contest.mode, contest.dtype)
    benchmark.group = f"{contest.entry.op} {contest.mode}"
    benchmark.extra_info |= {"backend": candidate.name, "shape": contest.case.name, "dtype": contest.dtype_name}
    benchmark.extra_info |= {"bytes": work.bytes, "flops": work.flops, "errors": errors}
    turns = itertools.cycle(sets)
    benchmark.pedantic(candidate.call, setup=lambda: ((next(turns),), {}), rounds=20, warmup_rounds=8)
