"""Every op's Triton kernels, compiled for GPUs that are not there: budgets, tensor cores, number of compiles."""

from itertools import product

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from support import aot  # noqa: E402
from support.launches import OPS  # noqa: E402

CASES = [
    (op, arch, dtype, case)
    for op, launches in OPS.items()
    for arch, dtype, case in product(aot.ARCHS, launches.dtypes, launches.cases)
]


@pytest.mark.parametrize("op,arch,dtype,case", CASES, ids=lambda x: str(x))
def test_within_budget(op, arch, dtype, case, full):
    launches = OPS[op]
    if not full and (arch != 90 or (dtype, case) not in launches.quick):
        pytest.skip("--full: other architectures, dtypes and sizes")
    found = {x["kernel"]: x for x in aot.report("--op", op, "--arch", str(arch), "--dtype", dtype, "--case", case)}
    budgets = aot.load_budgets().get(aot.key(op, arch, dtype, case), {})
    assert budgets.keys() == found.keys(), (
        f"budgets of other kernels for triton {aot.version()}: run python tests/support/aot.py --op {op} --update"
    )
    assert found.keys() >= launches.matrices
    excess = {name: worse for name, x in found.items() if (worse := aot.worse(x, budgets[name]))}
    assert not excess, f"beyond tests/budgets.json: {excess}"
    for name, x in found.items():
        assert x["shared"] <= aot.SHARED_LIMIT[arch], f"{name}: {x['shared']} bytes of shared memory"
        assert x["double"] == 0, f"{name}: {x['double']} float64 instructions in a {dtype} kernel"
        if aot.version() == "3.9" and not launches.may_spill(arch, dtype, case, name) and dtype != "tf32":
            assert x["spills"] == x["stack"] == 0, f"{name}: {x}"
        if arch == 90 and dtype in ("bfloat16", "float16") and name in launches.matrices:
            assert x.get("HGMMA", 0) > 0, f"{name} does not use wgmma"


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_number_of_compiles(op, arch, full):
    """Lengths, packed or not, with and without states: sizes and flags are not compiled in."""
    if not full and arch != 90:
        pytest.skip("--full: other architectures")
    (counts,) = aot.report("--op", op, "--arch", str(arch), "--count")
    assert counts["all"] == counts["one"], counts


def test_worse_than_the_budget_is_noticed():
    budget = {"registers": 100, "stack": 0, "spills": 0, "shared": 1024, "HGMMA": 8}
    assert aot.worse(dict(budget, registers=90, HGMMA=9), budget) == []
    assert aot.worse(dict(budget, spills=2), budget) == ["spills 2 > 0"]
    assert aot.worse(dict(budget, HGMMA=0), budget) == ["HGMMA 0 < 8"]
