"""The convolution's Triton kernels, compiled for GPUs that are not there: no spills, no float64, few variants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
REGISTERS = {"forward_kernel": 128, "backward_kernel": 168}  # 4 and 3 blocks of 128 threads on a multiprocessor

PROGRAM = """
import json, sys
import torch
import memattn
from memattn.kernels import causal_conv1d as op
from support.aot import compile_only, resources

def train(dtype, T=256, D=4096, W=4, packed=False, state=True):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")
    n = 3 if packed else 1
    x, weight, bias = empty(1, T, D), empty(D, W), empty(D)
    initial = empty(n, D, W - 1, dtype=torch.float32) if state else None
    bounds = empty(n + 1, dtype=torch.int32) if packed else None
    y, final = op.forward(x, weight, bias, initial, bounds, True, state)
    op.backward(torch.empty_like(y), final if state else None, x, weight, bias, initial, bounds, True)

found = []
for dtype in (torch.bfloat16, torch.float32):
    for packed in (False, True):
        with compile_only(int(sys.argv[1])) as compiled:
            train(dtype, packed=packed)
        found += [{"kernel": n, "dtype": str(dtype), "packed": packed, **resources(k)} for n, k, _ in compiled]
with compile_only(int(sys.argv[1])) as compiled:
    for T in (1, 63, 64, 2048, 2049):
        train(torch.bfloat16, T=T)
    variants = len({k.hash for _, k, _ in compiled})
    train(torch.bfloat16, D=1, W=2)
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
    assert len(result["found"]) == 20, "five kernels, two dtypes, packed and not"
    for kernel in result["found"]:
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        assert kernel["double"] == 0, kernel
        assert kernel["registers"] <= REGISTERS.get(kernel["kernel"], 128), kernel
    assert result["variants"] == 5, "one per kernel, whatever the length"
