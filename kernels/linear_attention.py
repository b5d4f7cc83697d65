"""Linear attention, Triton: the chunk engine of gated_delta_rule.py and gated_delta_rule_backward.py, nothing erased.

What is here: the order of launches, and where o was divided by its denominator (o = n / d), the gradients of both,
    dn = dO / d        dd = −⟨dO, o⟩ / d        0 where |d| is below the smallest normal number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels import config
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import (
    OPERANDS,
    SIZES,
    Memory,
    Problem,
    new,
    output,
    prepare,
    reciprocal_or_zero,
    scan,
)
from memattn.kernels.gated_delta_rule_backward import gradient, reduce, reverse
from memattn.kernels.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def divide_backward_kernel(
    do, o, weight, dn, dweight, rows, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    live = i < rows - row
    dO = load_tile(do + row * V, i, live, V, 0, V, BLOCK_V).to(ACC)
    O = load_tile(o + row * V, i, live, V, 0, V, BLOCK_V).to(ACC)
    inverse = reciprocal_or_zero(tl.load(weight + row + i, mask=live, other=0.0), ACC)
    store_tile(dn + row * V, dO * inverse[:, None], i, live, V, 0, V, BLOCK_V)
    tl.store(dweight + row + i, -tl.sum(dO * O, 1) * inverse, mask=live)


def memory(normaliser: bool, divide: bool) -> Memory:
    """The op's two flags as one word."""
    if not normaliser:
        return Memory.SUM
    return Memory.NORMALISED_SUM if divide else Memory.SUM_AND_WEIGHT


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, normaliser: bool, divide: bool, chunk_size: int, checkpoint_every: int,
    output_final_state: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, denominator, final_state, states) as the op's schema says; the last three [0] where not asked for."""
    with torch.cuda.device_of(q):
        p = Problem.of(q, k, v, g, None, initial_state, cu_seqlens, chunk_size, memory(normaliser, divide))
        every = p.every(checkpoint_every)
        o = torch.empty_like(v, dtype=p.acc if normaliser and not divide else v.dtype)
        weight = new(v, *v.shape[:3], dtype=p.acc) if normaliser else new(v, 0, dtype=p.acc)
        states = new(q, p.slots(every), *p.state_shape, dtype=p.acc) if save else None
        final_state = new(q, p.N, *p.state_shape, dtype=p.acc) if output_final_state else None
        if save and (p.packed or not p.tokens):  # slots that no chunk owns are results too: finite, not leftovers
            states.zero_()
        if p.tokens:
            total, *_ = prepare(p, k, v, g, None, None)
            h, hz = scan(p, k, v, total, total, initial_state, states, final_state, p.every(p.T), every)
            output(p, q, k, v, h, hz, total, o, weight if normaliser else total, scale)
        elif final_state is not None:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return (o, weight, *(new(q, 0, dtype=p.acc) if x is None else x for x in (final_state, states)))


def cotangents(
    p: Problem, v: Tensor, do: Tensor, ddenominator: Tensor | None, o: Tensor | None, denominator: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dn [B,T,HV,V] in v's dtype and dd [B,T,HV], None where there is no d, from what the op's results received."""
    if not p.memory.divides:
        zero = p.memory.weighs and ddenominator is None
        return do.to(v.dtype), v.new_zeros(v.shape[:3], dtype=p.acc) if zero else ddenominator
    dn, dweight, rows = torch.empty_like(do), torch.empty_like(denominator), p.tokens * p.HV
    options = config.pinned("divide", OPERANDS[do.dtype], p.V, p.V)
    divide_backward_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        do, o, denominator, dn, dweight, rows, V=p.V, ACC=config.TYPES[p.acc], **options
    )  # fmt: skip
    return dn, dweight


def backward(
    do: Tensor, ddenominator: Tensor | None, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, o: Tensor | None,
    denominator: Tensor | None, states: Tensor, scale: float, normaliser: bool, divide: bool,
    chunk_size: int, checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dg, dinitial_state), each in its input's dtype; shape [0] where the input is None."""
    with torch.cuda.device_of(q):
        p = Problem.of(q, k, v, g, None, initial_state, cu_seqlens, chunk_size, memory(normaliser, divide))
        every = p.every(checkpoint_every)
        pair = normaliser and not divide
        require("do", do, q, (p.acc if pair else v.dtype,), v.shape)
        require("ddenominator", ddenominator, q, (p.acc,), v.shape[:3])
        require("dfinal_state", dfinal_state, q, (p.acc,), (p.N, *p.state_shape))
        require("states", states, q, (p.acc,), (p.slots(every), *p.state_shape))
        if divide:
            require("o", o, q, (v.dtype,), v.shape)
            require("denominator", denominator, q, (p.acc,), v.shape[:3])
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        if not p.tokens:
            if dinitial is not None:
                dinitial.zero_() if dfinal_state is None else dinitial.copy_(dfinal_state)
            grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, g)]
            return tuple(new(q, 0) if x is None else x for x in (*grads, dinitial))
        dn, dweight = cotangents(p, v, do, ddenominator, o, denominator)
        total, _, _, dvn = prepare(p, k, v, g, None, None, q, dn, scale)
        dweight = total if dweight is None else dweight
        shared = q.dtype == p.acc and not normaliser  # else h lacks the digits or z
        before = None if shared else new(q, p.slots(), *p.state_shape, dtype=p.acc)
        h, hz = scan(p, k, v, total, total, states, before, None, every, 1)
        before = h if shared else before
        dh, dhz, dv, terms = reverse(
            p, q, k, total, dn, dweight, None, total, total, before, dfinal_state, dvn, dinitial, scale
        )  # fmt: skip
        del before, dvn
        rows = q, k, total, total, 0
        dq, dk, dg, _ = gradient(p, rows, v, None, total, v, dv, dn, dweight, h, hz, dh, dhz, terms, scale)
        dq, dk = reduce(p, dq, q, False), reduce(p, dk, k, False)
        return tuple(new(q, 0) if x is None else x for x in (dq, dk, dv, None if g is None else dg, dinitial))
