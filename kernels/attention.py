"""Attention, Triton forward:

    o_i = Σ_j e^{s_ij − ℓ_i} v_j        s_ij = scale · q_i·k_j + c_i − c_j        ℓ_i = log Σ_j e^{s_ij}

A program owns BLOCK_M query rows of one head of one sequence and passes over the tiles of keys that any of them sees
(attention_mask.py says which) with an online softmax: running maximum m and sum l in base 2. They start from a sink,
and from a score and a value of each row where those are given. First the tiles that must be masked, then those that
every row sees whole; where keys are dilated, then those are gathered, so that tiles of them hold nothing else.

q·k is summed over BLOCK_K columns at a time (dO·v in backward over BLOCK_V): all at once where operands may stay in
shared memory for the tensor cores, few where IEEE float32 needs them in registers.

Shapes: q, o [B,Tq,HQ,K|V]; k, v [B,Tk,HKV,K|V]; lse, first_scores [B,Tq,HQ]; first_values like o; sink [HQ]; high, low
[B,Tk,HQ], c split into two numbers so that c_i − c_j keeps its small part; packed sequences with B = 1. Slots of
BLOCK_M rows: see tiles.py.

Numerics: scores, softmax and sums in the accumulation type; P is rounded to v's dtype for the product with V. A row
that sees nothing gives o = 0, ℓ = −inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels import config
from memattn.kernels.attention_mask import key_tiles, seen_pairs, seen_range, visited
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import OPERANDS, new
from memattn.kernels.tiles import (
    dot,
    load_column,
    load_tile,
    locate,
    row_products,
    rows_or_address,
    sequence_bounds,
    store_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = [  # run-time numbers: never compiled in, whatever their value
    "N", "TQ", "TK", "HQ", "HKV", "packed", "has_sink", "tile_heads", "q_offset", "causal", "window", "prefix_len",
    "block_size", "summary", "dilation", "dilated_window", "dilated_prefix", "has_first", "steps", "rows",
]  # fmt: skip


@triton.jit
def first_position(q_offset, rows, length):
    """Of the queries of a sequence; q_offset −1 puts the last query at the last key."""
    return tl.where(q_offset < 0, tl.maximum(length - rows, 0), q_offset)


@triton.jit
def key_head_of(head, HQ, HKV, tile_heads):
    return tl.where(tile_heads != 0, head % HKV, head // (HQ // HKV))


@triton.jit
def scaled_scores(products, scale, high_i, low_i, high_j, low_j, DECAY: tl.constexpr, ACC: tl.constexpr):
    """s in base 2, from q·k and what decays; i and j broadcast over the products."""
    s = products * (tl.full((), scale, ACC) * LOG2E)
    if DECAY:
        s += ((high_i - high_j) + (low_i - low_j)) * LOG2E
    return s


@triton.jit
def key_scores(
    queries, y, live_y, high_i, low_i, keys, high, low, x, live, stride, seen, scale, HQ, HKV,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """s of a tile of queries and one of keys, in base 2. Key x of the tile lies x·stride tokens after its first."""
    products = row_products(queries, y, live_y, HQ * K, keys, x, live, stride * HKV * K, K, BLOCK_K, ACC, PRECISION)
    if DECAY:
        high_j, low_j = load_column(high, x, live, stride * HQ, ACC), load_column(low, x, live, stride * HQ, ACC)
        s = scaled_scores(products, scale, high_i, low_i, high_j[None, :], low_j[None, :], DECAY, ACC)
    else:
        s = scaled_scores(products, scale, 0, 0, 0, 0, DECAY, ACC)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def own_decay(high, low, x, live, first, head, HQ, ACC: tl.constexpr, DECAY: tl.constexpr):
    """c of one head at tokens first + x, in its two parts, as columns; 0 without decay."""
    if DECAY:
        at = first * HQ + head
        return load_column(high + at, x, live, HQ, ACC)[:, None], load_column(low + at, x, live, HQ, ACC)[:, None]
    else:
        return tl.zeros((1, 1), ACC), tl.zeros((1, 1), ACC)


@triton.jit
def query_rows(slot, cu_seqlens_q, cu_seqlens_k, N, TQ, TK, q_offset, packed, BLOCK_M: tl.constexpr):
    """Of the queries in a slot: their first row, how many their sequence has, its first query and key, how many keys
    it has (0 for a slot nobody owns), and the position of its first query."""
    n, first_q, rows, part = locate(slot, cu_seqlens_q, N, TQ, BLOCK_M, packed)
    first_k, length = sequence_bounds(n, cu_seqlens_k, TK, packed)
    row, rows, length = (part * BLOCK_M).to(tl.int32), rows.to(tl.int32), length.to(tl.int32)
    return row, rows, first_q, first_k, tl.where(row < rows, length, 0), first_position(q_offset, rows, length)


@triton.jit
def over_keys(
    ADD: tl.constexpr, sums, own, k, v, high, low, row, rows, length, q_offset, mask, scale, HQ, HKV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    """`sums` after ADD of each tile of keys that any of the rows sees; k, v, high and low point at the first key."""
    wide = HQ.to(tl.int64) * 0  # makes the offset that it is added to 64 bits wide
    x, i = tl.arange(0, BLOCK_N), row + tl.arange(0, BLOCK_M) + q_offset
    begin, end = seen_range(i, length, mask)
    first, last = row + q_offset, tl.minimum(row + BLOCK_M, rows) - 1 + q_offset
    a, b, c, d, e = key_tiles(first, last, length, mask, BLOCK_N, DILATED)
    for t in range(a + (c - b) + (e - d)):
        from_key = visited(t, a, b, c, d) * BLOCK_N
        at = from_key + wide
        j = from_key + x
        seen = seen_pairs(i[:, None], begin[:, None], end[:, None], j[None, :], length, mask, DILATED)
        sums = ADD(
            sums, own, k + at * HKV * K, v + at * HKV * V, high + at * HQ, low + at * HQ, x, j < length, 1, seen,
            scale, HQ, HKV, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, True,
        )  # fmt: skip
    if DILATED:
        dilation = mask[5]
        before = c * BLOCK_N // dilation
        count = d * BLOCK_N // dilation - before
        for t in range((count + BLOCK_N - 1) // BLOCK_N):
            at = (before + 1 + t * BLOCK_N + wide) * dilation - 1
            j = (at + x * (dilation + wide)).to(tl.int32)
            there = x < count - t * BLOCK_N
            seen = there[None, :] & (j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None])
            sums = ADD(
                sums, own, k + at * HKV * K, v + at * HKV * V, high + at * HQ, low + at * HQ, x, there,
                dilation + wide, seen, scale, HQ, HKV, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, True,
            )  # fmt: skip
    else:
        for tile in range(c, d):
            at = tile * BLOCK_N + wide
            sums = ADD(
                sums, own, k + at * HKV * K, v + at * HKV * V, high + at * HQ, low + at * HQ, x, x < BLOCK_N, 1, x,
                scale, HQ, HKV, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, False,
            )  # fmt: skip
    return sums


@triton.jit
def take_in(
    sums, own, k, v, high, low, x, live, stride, seen, scale, HQ, HKV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys into (m, l, out)."""
    m, l, out = sums
    queries, y, live_y, high_i, low_i = own
    keys = rows_or_address(k, x, live, stride * HKV * K, K, BLOCK_K)
    s = key_scores(
        queries, y, live_y, high_i, low_i, keys, high, low, x, live, stride, seen, scale, HQ, HKV, K, BLOCK_K, ACC,
        PRECISION, DECAY, MASKED,
    )  # fmt: skip
    most = tl.maximum(m, tl.max(s, 1))
    reference = tl.where(most == float("-inf"), 0.0, most)  # of a row that has seen nothing yet
    p = tl.exp2(s - reference[:, None])
    shrink = tl.exp2(m - reference)
    values = load_tile(v, x, live, stride * HKV * V, 0, V, triton.next_power_of_2(V))
    out = dot(p.to(values.dtype), values, out * shrink[:, None], PRECISION)
    return most, l * shrink + tl.sum(p, 1), out


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, sink, high, low, cu_seqlens_q, cu_seqlens_k, first_scores, first_values, o, lse, scale,
    N, TQ, TK, HQ, HKV, packed, tile_heads, q_offset, causal, window, prefix_len, block_size, summary, dilation,
    dilated_window, dilated_prefix, has_sink, has_first,
    K: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)  # under a causal mask the last rows see most
    head, slot = program % HQ, program // HQ
    mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
    row, rows, first_q, first_k, length, q_offset = query_rows(
        slot, cu_seqlens_q, cu_seqlens_k, N, TQ, TK, q_offset, packed, BLOCK_M
    )
    y = tl.arange(0, BLOCK_M)
    live = y < rows - row
    token = (first_q + row) * HQ + head
    key = first_k * HKV + key_head_of(head, HQ, HKV, tile_heads)
    known = live & (row + y + q_offset < length)
    high_i, low_i = own_decay(high, low, y, known, first_k + row + q_offset, head, HQ, ACC, DECAY)
    own = (rows_or_address(q + token * K, y, live, HQ * K, K, BLOCK_K), y, live, high_i, low_i)

    logit = tl.load(sink + head, mask=has_sink != 0, other=float("-inf")).to(ACC) * LOG2E
    first = y < (rows - row) * has_first
    given = tl.load(first_scores + token + y * HQ, mask=first, other=float("-inf")).to(ACC) * LOG2E
    m = tl.maximum(given, logit)
    reference = tl.where(m == float("-inf"), 0.0, m)
    weight = tl.exp2(given - reference)
    l = tl.exp2(logit - reference) + weight
    out = load_tile(first_values + token * V, y, given != float("-inf"), HQ * V, 0, V, triton.next_power_of_2(V))
    out = out.to(ACC) * weight[:, None]

    m, l, out = over_keys(
        take_in, (m, l, out), own, k + key * K, v + key * V, high + first_k * HQ + head, low + first_k * HQ + head,
        row, rows, length, q_offset, mask, scale, HQ, HKV, K, V, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, ACC, PRECISION,
        DECAY, DILATED,
    )  # fmt: skip
    empty = l == 0
    out *= tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l))[:, None]
    store_tile(o + token * V, out, y, live, HQ * V, 0, V, triton.next_power_of_2(V))
    total = (m + tl.log2(tl.where(empty, 1.0, l))) * LN2
    tl.store(lse + token + y * HQ, tl.where(empty, float("-inf"), total), mask=live)


# --- launchers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What every launch needs to know of the inputs: sizes, the mask's numbers, c in two parts, types."""

    N: int
    TQ: int
    TK: int
    HQ: int
    HKV: int
    K: int
    V: int
    packed: int
    tile_heads: int
    mask: tuple[int, ...]  # of attention_mask.py
    q_offset: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    decay: tuple[Tensor, Tensor]
    decays: bool
    acc: torch.dtype
    precision: str

    @classmethod
    def of(cls, q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k, mask, q_offset, tile_heads) -> Problem:
        """Checks what memory safety needs and collects the sizes."""
        B, TQ, HQ, K = q.shape
        TK, HKV, V = k.shape[1], k.shape[2], v.shape[3]
        packed = cu_seqlens_q is not None
        if HKV == 0 or HQ == 0 or HQ % HKV or not 1 <= K <= 256 or not 1 <= V <= 256:
            raise ValueError(
                f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: "
                "allowed: HQ a positive multiple of HKV, K and V up to 256"
            )
        if min(*mask, q_offset + 1) < 0 or mask[0] > 2:
            raise ValueError(f"mask {mask}, q_offset {q_offset}: allowed: causal 0, 1 or 2, sizes ≥ 0, q_offset ≥ −1")
        if packed and (B != 1 or cu_seqlens_q.dim() != 1 or not len(cu_seqlens_q) or cu_seqlens_k is None):
            raise ValueError(f"cu_seqlens_q {list(cu_seqlens_q.shape)} with B = {B}; allowed: both [N+1] with B = 1")
        N = len(cu_seqlens_q) - 1 if packed else B
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        require("q", q, q, tuple(OPERANDS), q.shape)
        require("k", k, q, (q.dtype,), (B, TK, HKV, K))
        require("v", v, q, (q.dtype,), (B, TK, HKV, V))
        require("sink", sink, q, (acc,), (HQ,))
        require("decay", decay, q, (torch.float64,), (B, TK, HQ))
        for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            require(name, x, q, (torch.int32, torch.int64), (N + 1,))
        none = new(q, 1, dtype=torch.int32)
        bounds = (cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)) if packed else (none, none)
        high = new(q, 1, dtype=acc) if decay is None else decay.to(acc)
        low = high if decay is None else (decay - high).to(acc)
        return cls(
            N, TQ, TK, HQ, HKV, K, V, int(packed), int(tile_heads), tuple(mask), q_offset, *bounds, (high, low),
            decay is not None, acc, config.precision(),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.N, self.TQ, self.TK, self.HQ, self.HKV, self.packed, self.tile_heads, self.q_offset, *self.mask

    def slots(self, total: int, block: int) -> int:
        """Number of tiles of `block` rows of all sequences, with a bound for packed ones."""
        return total // block + self.N if self.packed else self.N * -(-total // block)

    def has_first(self, q: Tensor, scores: Tensor | None, values: Tensor | None) -> int:
        """Whether every row's softmax begins with a score and a value; checks them."""
        require("first_scores", scores, q, (self.acc,), q.shape[:3])
        require("first_values", values, q, (q.dtype,), (*q.shape[:3], self.V))
        return int(scores is not None and values is not None)

    def launch(self, kernel: str, bits: int) -> dict:
        """Constexpr arguments and launch options of a kernel."""
        options = config.pinned(kernel, bits, self.K, self.V)
        terms = {"DECAY": self.decays, "DILATED": self.mask[5] > 1}
        return dict(options, **terms, K=self.K, V=self.V, ACC=config.TYPES[self.acc], PRECISION=self.precision)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, decay: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, first_scores: Tensor | None, first_values: Tensor | None, causal: int, window: int,
    prefix_len: int, block_size: int, summary: int, dilation: int, dilated_window: int, dilated_prefix: int,
    q_offset: int, tile_heads: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B,Tq,HQ,V], lse [B,Tq,HQ])."""
    with torch.cuda.device_of(q):
        mask = causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix
        p = Problem.of(q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k, mask, q_offset, tile_heads)
        o, lse = new(q, *q.shape[:3], p.V), new(q, *q.shape[:3], dtype=p.acc)
        has_first = p.has_first(q, first_scores, first_values)
        if o.numel():
            options = p.launch("attention", OPERANDS[q.dtype])
            forward_kernel[(p.slots(p.TQ, options["BLOCK_M"]) * p.HQ,)](
                q, k, v, lse if sink is None else sink, *p.decay, p.cu_seqlens_q, p.cu_seqlens_k,
                *((first_scores, first_values) if has_first else (lse, o)), o, lse, scale, *p.sizes,
                int(sink is not None), has_first, **options,
            )  # fmt: skip
        return o, lse
