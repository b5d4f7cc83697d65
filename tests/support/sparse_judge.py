"""Judgement of sparse_attention: the float64 loop, and plain torch with the kernels' rounding points beside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from memattn.reference import sparse_attention as reference
from support.compare import CEILING, assert_close_to_truth
from support.sparse import Case, evaluate, truth_of


@dataclass(frozen=True)
class Rounding:
    """Dtypes that results are stored in, and operands of products rounded to: of the queries' part, of the memory's."""

    stored: torch.dtype | None
    queries: torch.dtype | None
    memory: torch.dtype | None


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x with the precision of dtype."""
    return x if dtype is None else x.to(dtype).to(x.dtype)


def spread(bias: Tensor | None, unit: int, rows: Tensor, seen: Tensor, memory: int, heads: int) -> Tensor:
    """[H, C, 1, R]: what the score of each row of memory gains, −inf where the list does not name it."""
    added = torch.zeros_like(rows, dtype=torch.double) if bias is None else bias.double().repeat_interleave(unit, -1)
    rows, seen, added = (x.expand(-1, heads, -1) for x in (rows, seen, added))
    dense = added.new_full((*rows.shape[:2], memory + 1), -torch.inf)
    dense.scatter_(2, rows.masked_fill(~seen, memory), added)
    return dense[:, :, None, :memory].transpose(0, 1)


class ProductBlock(torch.autograd.Function):
    """`reference._block` as products of all queries with all of the memory, with the kernels' backward."""

    @staticmethod
    def forward(ctx, q, k, v, entries, used, last, bias, sink, sequence, memory, unit, rounding):
        rows, seen = memory.rows(sequence, reference._tokens(entries, used, last, unit))
        rows, seen = rows.flatten(2), seen.flatten(2)
        added = spread(bias, unit, rows, seen, len(k), k.shape[1]).to(q.dtype)
        keys, values = (x.nan_to_num(0.0).to(q.dtype).transpose(0, 1) for x in (k, v))  # [H, R, D]
        s = product(q, keys.mT) + added
        logits = s if sink is None else torch.cat([s, sink[:, None, :, None].expand(*s.shape[:3], 1)], -1)
        lse = logits.logsumexp(-1).nan_to_num(-torch.inf, neginf=-torch.inf)
        p = (s - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()
        o = product(rounded(p, rounding.queries).transpose(0, 1), values)
        ctx.save_for_backward(q, keys, values, p, o, lse, bias, sink, rows.masked_fill(~seen, 0), seen)
        ctx.rest = unit, rounding, k.dtype
        return o.transpose(0, 1), lse.transpose(0, 1)

    @staticmethod
    def backward(ctx, do, dlse):
        q, keys, values, p, o, lse, bias, sink, rows, seen = ctx.saved_tensors
        unit, rounding, stored = ctx.rest
        do_by_head = do.transpose(0, 1)
        delta = (do_by_head * rounded(o, rounding.stored)).sum(-1) - dlse.transpose(0, 1)
        ds = p * (product(do, values.mT) - delta[..., None])
        dq = product(rounded(ds, rounding.queries).transpose(0, 1), keys)
        dk, dv = (
            rounded(x, rounding.memory).flatten(1, 2).mT @ y.transpose(0, 1).flatten(1, 2)
            for x, y in ((ds, q), (p, do))
        )
        dbias = dsink = None
        if bias is not None:
            named = ds.sum(2).transpose(0, 1).gather(2, rows.expand(-1, ds.shape[0], -1)) * seen
            dbias = named.unflatten(-1, (-1, unit)).sum(-1)
            dbias = dbias if bias.shape[1] > 1 else dbias.sum(1, keepdim=True)
        if sink is not None:
            dsink = -((sink[:, None] - lse).exp() * delta).sum(1)
        dk, dv = (x.transpose(0, 1).to(stored) for x in (dk, dv))
        return dq.transpose(0, 1), dk, dv, None, None, None, dbias, dsink, None, None, None, None


def product(x: Tensor, y: Tensor) -> Tensor:
    """x [C, H, G, n] times y [H, n, m] -> [H, C, G, m]."""
    return (x.transpose(0, 1).flatten(1, 2) @ y).unflatten(1, (x.shape[0], x.shape[2]))


def comparator(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain torch with the kernels' rounding points, on the same inputs."""
    stored = dtype if dtype in (torch.bfloat16, torch.float16) else None
    by_blocks = case.unit >= 16
    rounding = Rounding(stored, stored if by_blocks and case.queries >= 16 else None, stored if by_blocks else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_block", ProductBlock.apply)
        patch.setattr(reference, "checkpoint", lambda block, *arguments, **_: block(*arguments))
        return evaluate(functools.partial(reference.chunked, operand_dtype=rounding), case.make(dtype))


def judge(case: Case, dtype: torch.dtype, actual: dict[str, Tensor], backend: str = "cpu") -> None:
    """The tolerance rule of support.compare; a handful of values proves nothing about the ratio of two roundings.

    Of "chunked", which is plain torch itself, the ceilings are what there is to judge.
    """
    truth, other = truth_of(case, dtype), actual if backend == "chunked" else comparator(case, dtype)
    other = {n: x if x.numel() >= 100 else truth[n] * (1 + CEILING[dtype]) for n, x in other.items()}
    assert_close_to_truth(actual, other, truth, CEILING[dtype])
