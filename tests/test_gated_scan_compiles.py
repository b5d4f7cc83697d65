"""The gated scan's Triton kernels, compiled for GPUs that are not there: no spills, no float64, few variants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

PROGRAM = """
import json, sys
import torch
import memattn
from memattn.kernels import gated_scan as op
from support.aot import compile_only, resources

def train(dtype, T=256, D=4096, chunk=16, packed=False):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")
    n = 3 if packed else 1
    g, k, v = empty(1, T, D), empty(1, T, D // 8, dtype=dtype), empty(1, T, D, dtype=dtype)
    states, bounds = (empty(n, D), empty(n, D)), empty(n + 1, dtype=torch.int32) if packed else None
    inputs = (g, k, v, *states, bounds, True, chunk)
    y, y2, ends, ends2, final, final2 = op.forward(*inputs, True, chunk > 0, True)
    if not chunk:
        ends = ends2 = None
    op.backward(y, y2, ends, ends2, final, final2, *inputs)

found = []
for dtype, packed, chunk in ((torch.bfloat16, False, 16), (torch.bfloat16, True, 0), (torch.float32, True, 16)):
    with compile_only(int(sys.argv[1])) as compiled:
        train(dtype, packed=packed, chunk=chunk)
    found += [{"kernel": n, "dtype": str(dtype), "chunk": chunk, **resources(k)} for n, k, _ in compiled]
with compile_only(int(sys.argv[1])) as compiled:
    for T in (63, 64, 2049):
        train(torch.bfloat16, T=T)
    variants = len({k.hash for _, k, _ in compiled})
print(json.dumps({"found": found, "variants": variants}))
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_within_budget(arch, full):
    pytest.importorskip("triton")
    if arch != 90 and not full:
        pytest.skip("other architectures run with --full")
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "python"), str(TESTS)])
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(arch)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["found"]) == 9, "forward, its pass for backward, backward"
    for kernel in result["found"]:
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        assert kernel["double"] == 0, kernel
        assert kernel["registers"] <= 128, kernel
    assert result["variants"] == 3, "one per launch, whatever the length"
