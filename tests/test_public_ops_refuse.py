"""`torch.ops.memattn` called past the Python checks: legal calls run, spoilt ones raise one error that names the op."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import hostile

from memattn import backends
from memattn.ops import attention, gated_delta_rule, gated_scan

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    backends.why_not("gated_delta_rule", "cpu", backends.Request("cpu", torch.float32)) != [],
    reason="the C++ CPU kernels are not built here",
)


def test_spoilt_calls_are_refused(full):
    """In a process of its own, which a wrong access would end."""
    rounds = 400 if full else 25
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "python"), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(TESTS / "support" / "hostile.py"), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


def test_every_op_is_called():
    called = {call.op for seed in range(4) for family in hostile.FAMILIES for call in family(hostile.Draw(seed))}
    names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("memattn::")}
    assert called == {name for name in names if name.endswith(("_cpu", "_cpu_backward"))}


@pytest.mark.parametrize("size", [2**56, 2**58, 2**62, 2**63 - 1])
def test_sizes_beyond_every_length_are_no_limit(size):
    q, g = torch.randn(1, 40, 2, 16), -torch.rand(1, 40, 2)
    for run in (
        lambda n: gated_delta_rule(q, q, q, g, g + 1, checkpoint_every=n, backend="cpu")[0],
        lambda n: gated_scan(g, g, chunk_size=n, emit="both", backend="cpu"),
        lambda n: attention(q, q, q, window=n, backend="cpu").o,
        lambda n: attention(q, q, q, causal=False, block_size=n, backend="cpu").o,
        lambda n: attention(q, q, q, chunk_rule=("dilated", n, n, n), backend="cpu").o,
    ):
        assert all(torch.equal(a, b) for a, b in zip(tensors(run(size)), tensors(run(64)), strict=True))


def tensors(result):
    return [x for x in torch.utils._pytree.tree_leaves(result) if x is not None]


def attend(**change):
    """attention_cpu without a mask, with these arguments instead."""
    names = [a.name for a in torch.ops.memattn.attention_cpu.default._schema.arguments]
    q = torch.randn(1, 4, 2, 16)
    given = {"q": q, "k": q, "v": q, **dict.fromkeys(hostile.mask(hostile.Draw(0)), 0), "summary": 0, "q_offset": 0}
    given |= {"tile_heads": False, "scale": 0.25, **change}
    return torch.ops.memattn.attention_cpu(**{name: given.get(name) for name in names})


def test_a_position_beyond_every_key_is_refused():
    decay = torch.zeros(1, 4, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"attention_cpu: q_offset must be at most 2\^48; got 9223372036854775807"):
        attend(decay=decay, q_offset=2**63 - 1)


def test_tensors_on_two_devices_are_refused():
    there = torch.empty(1, 4, 2, 16, device="meta")
    with pytest.raises(RuntimeError, match="attention_cpu: all tensors must be on one device; got cpu and meta"):
        attend(k=there)
    assert attend(q=there, k=there, v=there)[0].is_meta
