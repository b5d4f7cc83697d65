"""The kernels of the gated delta rule, compiled for GPUs that are not there: budgets, tensor cores, compiles."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from support import aot  # noqa: E402

# What multiplies matrices; l2norm and reduce only stream rows.
HEAVY = {"prepare_kernel", "scan_kernel", "output_kernel", "reverse_kernel", "pairs_kernel", "gradient_kernel"}
KERNELS = HEAVY | {"l2norm_kernel", "reduce_kernel"}
# Whole K×V states of 256 keys in IEEE float32 outgrow the registers in the two sequential kernels; nothing else spills.
MAY_SPILL = {("float32", "256x256", "scan_kernel"), ("float32", "256x256", "reverse_kernel")}


def cases():
    """(arch, dtype, dims) and whether it is part of the default run."""
    for arch in aot.ARCHS:
        for dtype in aot.DTYPES:
            for dims in aot.DIMS:
                yield arch, dtype, dims


@pytest.mark.parametrize("arch,dtype,dims", cases(), ids=lambda x: str(x))
def test_within_budget(arch, dtype, dims, full):
    if not full and (arch, dtype, dims) != (90, "bfloat16", "128x128"):
        pytest.skip("other architectures, dtypes and head dims run with --full")
    found = {x["kernel"]: x for x in aot.report("--arch", str(arch), "--dtype", dtype, "--dims", dims)}
    assert found.keys() == KERNELS
    budgets = aot.load_budgets().get(aot.key(arch, dtype, *map(int, dims.split("x"))), {})
    assert budgets.keys() == KERNELS, f"no budget for triton {aot.version()}: run python tests/support/aot.py --update"
    excess = {name: worse for name, x in found.items() if (worse := aot.worse(x, budgets[name]))}
    assert not excess, f"beyond tests/budgets.json: {excess}"
    for name, x in found.items():
        assert x["shared"] <= aot.SHARED_LIMIT[arch], f"{name}: {x['shared']} bytes of shared memory"
        assert x["double"] == 0, f"{name}: {x['double']} float64 instructions in a {dtype} kernel"
        if aot.version() == "3.9" and (dtype, dims, name) not in MAY_SPILL and dtype != "tf32":
            assert x["spills"] == x["stack"] == 0, f"{name}: {x}"
        if arch == 90 and dtype in ("bfloat16", "float16") and name in HEAVY:
            assert x.get("HGMMA", 0) > 0, f"{name} does not use wgmma"


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_number_of_compiles(arch, full):
    """T in {1, 63, 64, 2048, 2049}, packed or not, with and without states: sizes and flags are not compiled in."""
    if not full and arch != 90:
        pytest.skip("other architectures run with --full")
    (counts,) = aot.report("--arch", str(arch), "--count")
    assert counts["forward"] <= 4, counts
    assert counts["training"] <= 8, counts


def test_worse_than_the_budget_is_noticed():
    budget = {"registers": 100, "stack": 0, "spills": 0, "shared": 1024, "HGMMA": 8}
    assert aot.worse(dict(budget, registers=90, HGMMA=9), budget) == []
    assert aot.worse(dict(budget, spills=2), budget) == ["spills 2 > 0"]
    assert aot.worse(dict(budget, HGMMA=0), budget) == ["HGMMA 0 < 8"]
