"""The gated scan's and the convolution's Triton kernels on a short sequence past element 2^31: see far.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.far import FIRST, SIZE, moved, run_last_programs  # first: chooses the interpreter  # noqa: E402, I001

import torch  # noqa: E402

from memattn.kernels import causal_conv1d, gated_scan  # noqa: E402


def scan(g, x, dy, bounds) -> dict:
    """y and the gradients, in chunks of 64 tokens."""
    y = gated_scan.forward(g, x, None, None, None, bounds, True, 64, True, False, False)[0]
    gradients = gated_scan.backward(dy, None, None, None, None, None, g, x, None, None, None, bounds, True, 64)
    return {"y": y, "dg": gradients[0], "dx": gradients[1]}


def convolve(x, weight, bounds) -> dict:
    return {"conv y": causal_conv1d.forward(x, weight, None, None, bounds, True, False)[0]}


def main() -> None:
    noise = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, 70, SIZE, generator=noise).half() for _ in range(2))
    g, weight = -torch.rand(1, 70, SIZE, generator=noise), torch.randn(SIZE, 4, generator=noise)
    bounds = torch.tensor([0, 70])
    near = scan(g, x, dy, bounds) | convolve(x, weight, bounds)
    run_last_programs()
    there = bounds + FIRST
    far = scan(moved(g), moved(x), moved(dy), there) | convolve(moved(x), weight, there)
    for name, result in near.items():
        assert torch.equal(far[name][:, FIRST:], result), f"{name} differs past element 2^31"


if __name__ == "__main__":
    main()
