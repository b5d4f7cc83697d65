"""The Triton kernel of attention_mass on a sequence past element 2^31 of q and k, in the interpreter: see far.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.far import FIRST, SIZE, moved, run_last_programs  # first: chooses the interpreter  # noqa: E402, I001

import torch  # noqa: E402

from memattn.kernels.attention_mass import forward  # noqa: E402

MASK = 1, 20, 0, 0, 0, 0, 0, 0, 0, False, SIZE**-0.5, -40, 2**31 - 1, False  # causal, a window of 20, the last 40 rows


def main() -> None:
    noise = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 70, 1, SIZE, generator=noise).half() for _ in range(2))
    lse, bounds = torch.rand(1, 70, 1, generator=noise) + 3, torch.tensor([0, 70])
    near = forward(q, k, lse, None, bounds, bounds, *MASK)
    run_last_programs()
    far = forward(moved(q), moved(k), moved(lse), None, bounds + FIRST, bounds + FIRST, *MASK)
    assert near.any() and torch.equal(far[:, FIRST:], near), "the mass differs past element 2^31"


if __name__ == "__main__":
    main()
