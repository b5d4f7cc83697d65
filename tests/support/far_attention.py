"""Attention's Triton kernels on a short sequence past element 2^31 of every tensor, in the interpreter: see far.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.far import FIRST, SIZE, moved, run_last_programs  # first: chooses the interpreter  # noqa: E402, I001

import torch  # noqa: E402

from memattn.kernels.attention import forward  # noqa: E402
from memattn.kernels.attention_backward import backward  # noqa: E402

MASK = 1, 20, 0, 0, 0, 0, 0, 0, 0, False, SIZE**-0.5  # causal, a window of 20


def train(q, k, v, do, bounds) -> dict:
    """o, lse and all gradients."""
    inputs = (q, k, v, None, None, bounds, bounds, None, None)
    o, lse = forward(*inputs, *MASK)
    dq, dk, dv, *_ = backward(do, None, o, lse, *inputs, *MASK)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def main() -> None:
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 70, 1, SIZE, generator=noise).half() for _ in range(4)]
    bounds = torch.tensor([0, 70])
    near = train(*tensors, bounds)
    run_last_programs(backwards=("forward_kernel", "queries_kernel"))
    far = train(*map(moved, tensors), bounds + FIRST)
    for name, x in near.items():
        assert torch.equal(far[name][:, FIRST:], x), f"{name} differs past element 2^31"


if __name__ == "__main__":
    main()
