"""Steps, caches and long keys past element 2^31 on the CPU. Memory that nobody touches costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memattn import backends, ops
from memattn.ops.rat_attention import RATState

PAST = 2**31
needs_cpu_kernels = pytest.mark.skipif(
    backends.why_not("gated_delta_rule", "cpu", backends.Request("cpu", torch.float32)) != [],
    reason="the C++ CPU kernels are not built here",
)


def far(x: torch.Tensor) -> torch.Tensor:
    """x as the last rows of a tensor of more than 2^31 elements."""
    try:
        pool = torch.empty(PAST // x[0].numel() + 1 + len(x), *x.shape[1:], dtype=x.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    pool[-len(x) :] = x
    return pool


def last(pool: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Numbers of the last rows of a pool."""
    return torch.arange(len(pool) - rows, len(pool))


@needs_cpu_kernels
@pytest.mark.parametrize("name", ["gated_delta_rule_step", "linear_attention_step"])
def test_state_pool(name):
    q, k, v = (torch.randn(1, 2, 4, 256) / 16 for _ in range(3))
    g, state = -torch.rand(1, 2, 4), torch.randn(1, 4, 256, 256)
    inputs = {"q": q, "k": k, "v": v, "g": g} | ({"beta": g.exp()} if name == "gated_delta_rule_step" else {})
    pool = far(state)
    near, there = (
        getattr(ops, name)(**inputs, state=held, state_indices=rows, backend="cpu")
        for held, rows in ((state, torch.tensor([0])), (pool, last(pool)))
    )
    assert torch.equal(there, near) and torch.equal(pool[-1:], state)


@needs_cpu_kernels
def test_rat_state_pool():
    q, k, v = (torch.randn(1, 3, 4, 64) for _ in range(3))
    g = -torch.rand(1, 3, 4, 64)
    parts = [torch.randn(1, 700, 4, 64), torch.randn(1, 700, 4, 64), torch.randn(1, 4, 64), torch.randn(1, 4, 64)]
    near = RATState(*(x.clone() for x in parts), torch.tensor([2601]))
    pool = [far(x) for x in parts[:2]]
    running = [torch.empty(len(pool[0]), 4, 64) for _ in range(2)]
    for to, x in zip(running, parts[2:], strict=True):
        to[-1:] = x
    there = RATState(*pool, *running, torch.zeros(len(pool[0]), dtype=torch.int64).index_fill(0, last(pool[0]), 2601))
    outputs = [
        ops.rat_attention_step(q, k, v, g, state, chunk_size=4, state_indices=rows, backend="cpu")
        for state, rows in ((near, torch.tensor([0])), (there, last(pool[0])))
    ]
    assert torch.equal(*outputs) and int(there.length[-1]) == 2604
    for name in ("keys", "values", "running_key", "running_value"):
        assert torch.equal(getattr(there, name)[-1:], getattr(near, name)), name


@needs_cpu_kernels
def test_paged_cache():
    q, k, v = torch.randn(1, 2, 4, 64).bfloat16(), *(torch.randn(3, 64, 2, 64).bfloat16() for _ in range(2))
    settings = {"cache_seqlens": torch.tensor([150]), "backend": "cpu"}
    near = ops.attention_decode(q, k, v, page_table=torch.arange(3, dtype=torch.int32)[None], **settings)
    keys, values = far(k), far(v)
    there = ops.attention_decode(q, keys, values, page_table=last(keys, 3).int()[None], **settings)
    assert torch.equal(there.o, near.o) and torch.equal(there.lse, near.lse)


@needs_cpu_kernels
def test_long_keys():
    """The end of a text of 33 million tokens, under a window: tiles before it are skipped."""
    q, k, v = torch.randn(1, 4, 2, 64).bfloat16(), *(torch.randn(100, 1, 64).bfloat16() for _ in range(2))
    settings = {"window": 90, "q_offset": "end", "backend": "cpu"}
    near = ops.attention(q, k[None], v[None], **settings)
    there = ops.attention(q, far(k)[None], far(v)[None], **settings)
    torch.testing.assert_close(there.o, near.o, rtol=0.02, atol=0.02)
    torch.testing.assert_close(there.lse, near.lse)


@needs_cpu_kernels
def test_long_packed_keys_of_slots():
    """A sequence without slots is not read, however long it is."""
    q, k, v = torch.randn(1, 4, 2, 64).bfloat16(), *(torch.randn(100, 1, 64).bfloat16() for _ in range(2))
    keys, values = far(k), far(v)
    bounds = torch.tensor([0, len(keys) - 100, len(keys)])
    write = torch.ops.memattn.slot_write_cpu
    near = write(q, k[None], v[None], None, None, None, None, 0.125)
    there = write(q, keys[None], values[None], None, None, torch.tensor([0, 0, 4]), bounds, 0.125)
    assert torch.equal(there[0], near[0]) and torch.equal(there[1], near[1])


def test_triton_scan_and_convolution(device):
    """A sequence past element 2^31 in the interpreter, in a process of its own, which a 32-bit offset ends."""
    pytest.importorskip("triton", reason="triton is not installed")
    if device != "cpu":
        pytest.skip("untouched memory is free on the CPU only")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9 * 2**30:
        pytest.skip("the system refuses to reserve 8 GiB at once")
    worker = Path(__file__).parent / "support" / "far_scan.py"
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr[-2000:]}"
