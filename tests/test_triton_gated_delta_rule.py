"""The Triton kernels of the gated delta rule through the public op: on a GPU, or on CPU tensors in the interpreter."""

import functools
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import BASE, by_name
from support.compare import CEILING, assert_close_to_truth, evaluate, to_float64
from support.metamorphic import CHECKS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memattn.ops import gated_delta_rule
from memattn.ops._library import resolve
from memattn.reference import gated_delta_rule as reference

pytestmark = pytest.mark.usefixtures("interpreter")
SMALL = replace(BASE, name="small", batch=1, length=37, heads=1, value_heads=2, key_dim=16, value_dim=24)
DEFAULT = (
    SMALL,
    *(replace(SMALL, name=f"T{t}", length=t) for t in (1, 16, 65)),
    replace(SMALL, name="packed", lengths=(17, 0, 1, 20)),
    replace(SMALL, name="bare", decay=None, beta=None, state=False),
    replace(SMALL, name="grouped", batch=2, heads=2, value_heads=4, scale=0.4),
    replace(SMALL, name="no_l2norm", qk_l2norm=False, beta=0.02),
    replace(SMALL, name="odd_dims", key_dim=40, value_dim=24),
)
FULL = (
    replace(SMALL, name="wide", length=130, key_dim=256, value_dim=128),
    replace(BASE, name="long", length=300),
    by_name("square128"),
)
op = functools.partial(gated_delta_rule, backend="triton")


@pytest.mark.parametrize("chunk_size", [16])
@pytest.mark.parametrize("case", [*DEFAULT, *FULL], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_within_tolerance_of_truth(case, dtype, chunk_size, device, full):
    if not full and case in FULL:
        pytest.skip("larger cases run with --full")
    inputs = case.make(dtype, device)
    rounding = None if dtype == torch.float32 else dtype
    actual = evaluate(functools.partial(op, chunk_size=chunk_size), inputs)
    comparator = evaluate(functools.partial(reference.chunked, operand_dtype=rounding, chunk_size=chunk_size), inputs)
    truth = evaluate(reference.loop, to_float64(inputs))
    assert_close_to_truth(actual, comparator, truth, CEILING[dtype])


@pytest.mark.parametrize("case", DEFAULT, ids=lambda c: c.name)
def test_float64_equals_the_definition(case, device):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    inputs = case.make(torch.float64)
    actual, truth = evaluate(functools.partial(op, chunk_size=16), inputs), evaluate(reference.loop, inputs)
    for name, expected in truth.items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    inputs = replace(SMALL, length=19, value_dim=16).make(torch.float64, grad=True)
    names = ("q", "k", "v", "g", "beta", "initial_state")

    def run(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return op(**given, qk_l2norm=True, output_final_state=True, chunk_size=16)

    assert torch.autograd.gradcheck(run, [inputs[n] for n in names], fast_mode=True)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, device):
    CHECKS[check](op, device)


def test_every_result_is_written(device, poisoned):
    inputs = replace(SMALL, lengths=(17, 0, 20)).make(device=device)
    for name, x in evaluate(functools.partial(op, chunk_size=16), inputs).items():
        assert x.isfinite().all(), f"{name} holds memory that nobody wrote"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise(dtype, device):
    inputs = replace(SMALL, lengths=(17, 0, 20)).make(dtype, device)
    first, *others = (evaluate(functools.partial(op, chunk_size=16), inputs) for _ in range(3))
    for name, x in first.items():
        assert all(torch.equal(x, other[name]) for other in others), f"{name}: another run gives other bits"


def test_sequence_past_element_2_31(device):
    if device != "cpu":
        pytest.skip("untouched memory is free on the CPU only")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9 * 2**30:
        pytest.skip("the system refuses to reserve 8 GiB at once")
    worker = Path(__file__).parent / "support" / "far.py"
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr[-2000:]}"


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return result


class NotLaunched:
    """Stands for a kernel; launching it does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_forward_memory_without_gradient(dim, monkeypatch):
    """At its height a forward call holds at most twice the bytes of q, k, v and o, heads expanded to value heads."""
    from memattn.kernels import gated_delta_rule as kernels

    for name in vars(kernels).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, NotLaunched())
    q, k, v = (torch.empty(1, 2048, 4, dim, dtype=torch.bfloat16, device="meta") for _ in range(3))
    g = torch.empty(1, 2048, 4, device="meta")
    with LiveBytes() as live:
        o, *_ = kernels.forward(q, k, v, g, None, None, None, 1.0, True, 64, 8, False, False)
    assert live.now >= o.nbytes, "live tensors were not counted"
    assert live.most <= 2 * 4 * v.nbytes, f"{live.most} bytes against {4 * v.nbytes} of q, k, v and o"


@pytest.mark.parametrize("every", [1, 3])
def test_checkpoints_do_not_change_gradients(every, device):
    inputs = replace(SMALL, length=80).make(device=device)
    whole = functools.partial(op, chunk_size=16)
    expected = evaluate(functools.partial(whole, checkpoint_every=64), inputs)
    for name, x in evaluate(functools.partial(whole, checkpoint_every=every), inputs).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_opcheck(device):
    inputs = replace(SMALL, length=20).make(device=device, grad=True)
    names = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")
    args = (*(inputs[n] for n in names), 0.25, True, 16, 2, True, True)
    assert set(torch.library.opcheck(resolve("gated_delta_rule_triton"), args).values()) == {"SUCCESS"}
