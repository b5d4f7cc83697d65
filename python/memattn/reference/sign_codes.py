"""Sign codes in plain torch: `loop` is the definition, bit by bit; `chunked` packs whole words."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.reference.attention import accumulate_dtype

WORD = 32


def loop(x: Tensor, projection: Tensor, *, center: Tensor | None = None) -> Tensor:
    """Bit j of the code of x is set where (x − center)·R_j > 0."""
    dtype, bits = accumulate_dtype(x.dtype), projection.shape[1]
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    codes = torch.zeros(len(rows), -(-bits // WORD), dtype=torch.int32)
    for n, row in enumerate(rows if center is None else rows - center.to(dtype)):
        for word in range(codes.shape[1]):
            signs = [bool(row @ projection[:, j].to(dtype) > 0) for j in range(bits)[word * WORD : (word + 1) * WORD]]
            number = sum(1 << i for i, sign in enumerate(signs) if sign)
            codes[n, word] = number - (1 << WORD) if number >= 1 << (WORD - 1) else number
    return codes.view(*x.shape[:-1], -1)


def chunked(x: Tensor, projection: Tensor, *, center: Tensor | None = None) -> Tensor:
    """`loop` for all words at once."""
    dtype, bits = accumulate_dtype(x.dtype), projection.shape[1]
    moved = x.to(dtype) if center is None else x.to(dtype) - center.to(dtype)
    signs = (moved @ projection.to(dtype) > 0).long()
    signs = torch.nn.functional.pad(signs, (0, -bits % WORD)).unflatten(-1, (-1, WORD))
    words = (signs << torch.arange(WORD, device=x.device)).sum(-1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)


def differing_bits(a: Tensor, b: Tensor) -> Tensor:
    """How many bits of the int32 words [..., W] differ, summed over the last axis."""
    x = a ^ b
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101 >> 24) & 0x3F).sum(-1)
