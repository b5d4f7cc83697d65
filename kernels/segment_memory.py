"""Segment memory, Triton forward: every segment at once, and one short scan over segments.

With M_s [K, V] and z_s [K] the memory and its normaliser before segment s, rows of K, V, Q as in ops/segment_memory.py:
    z_{s+1} = z_s + Σ_t γ_t k_t                    o = (Q M_s) / (Q z_s + ε)
    M_{s+1} = M_s + B_s − A_s M_s                  B_s = Kᵀ β V        A_s = Kᵀ diag(β r) K, r = 1 / (K z_s + ε)
Once z is known the frozen delta is affine in M, so A and B of all segments are made in parallel, and only K×K by K×V
products are left in order. Segments of at most K tokens have no A: M_s is read and written by their rows, which is less
work. Without delta nothing is erased, without the normaliser r = 1 and there is no z.

Kernels:
    outer       per segment, head and block of rows and columns: Σ_t x_tᵀ w_t y_t, that is B, A, and the backward's QᵀdO
    sums        per segment, head and block of columns: Σ_t w_t x_t, what a segment adds to z
    scan        per sequence, head and block of columns, segment after segment: what a table holds of every segment
                becomes the state before it. Also z (a table of one column) and, in reverse, gradients
    normaliser  z with `correction`, whose γ needs the z before it: segment after segment, tile after tile
    factors     per tile of keys and head: r, γ
    read        per tile of queries, head and block of value columns: o

Symbols and shapes: q, o [B,T,HQ,K|V]; k, v [B,S,H,K|V]; beta, factor (= r), gain (= γ) [B,S,H]; table [memories,H,K,
    columns], columns = V + 1 with the normaliser (z is the last one); erase (= A) [memories,H,K,K].
    Memory s of sequence n: n·(⌈S/C⌉ + 1) + s, packed cu_seqlens_k[n]//C + 2n + s; a sequence has one more memory than
    segments, and what segment s writes is first kept in memory s + 1. Grids cover bounds, so nothing is read back.

Numerics: tables, sums, z, r and γ are float32 (float64 for float64 inputs); operands of a product over tokens or with
    q, k are in the input dtype, A M is tf32 for 16-bit inputs, which keeps more of A and M than their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels import config
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import OPERANDS, load_factor, new, reciprocal_or_zero
from memattn.kernels.tiles import dot, first_slot, load_tile, locate, sequence_bounds, store_tile

SIZES = [  # run-time numbers: never compiled in, whatever their value
    "N", "T", "S", "HQ", "H", "size", "key_size", "packed", "causal", "tiles", "shift", "add",
    "tokens", "first_column",
    "has_beta", "has_factor", "has_gain", "has_weight", "has_start", "has_end",
]  # fmt: skip
FREE_READS = 256  # queries that share a slot of the grid where segments do not bound what they read


@triton.jit
def memories_of(n, cu_seqlens_k, S, key_size, packed):
    """Of sequence n: its first memory, the number of its segments, its first key and the number of those."""
    first, length = sequence_bounds(n, cu_seqlens_k, S, packed)
    begin = first_slot(n, first, S, key_size, packed) + n
    return begin, (length + key_size - 1) // key_size, first, length


@triton.jit
def locate_memory(memory, cu_seqlens_k, N, S, key_size, packed):
    """Sequence n of a memory, its number s there, and the sequence's segments, first key and number of keys."""
    low, high = memory * 0, memory * 0 + N - 1
    while low < high:
        middle = (low + high + 1) // 2
        begin, _, _, _ = memories_of(middle, cu_seqlens_k, S, key_size, packed)
        reached = begin <= memory
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    begin, segments, first, length = memories_of(low, cu_seqlens_k, S, key_size, packed)
    return low, memory - begin, segments, first, length


@triton.jit
def locate_keys(memory, tile, cu_seqlens_k, N, S, key_size, packed, BLOCK_T: tl.constexpr):
    """First row of a tile of the segment that is written on top of a memory, and how many of its rows exist."""
    _, s, _, first, length = locate_memory(memory, cu_seqlens_k, N, S, key_size, packed)
    offset = s * key_size + tile * BLOCK_T
    return first + offset, tl.minimum((s + 1) * key_size, length) - offset


@triton.jit
def locate_queries(
    slot, tile, cu_seqlens, cu_seqlens_k, N, T, S, size, key_size, packed, causal, has_start, BLOCK_T: tl.constexpr
):
    """A tile of queries: first row, how many rows exist, the memory they read, and whether it may hold anything."""
    n, first, length, part = locate(slot, cu_seqlens, N, T, size, packed)
    begin, segments, _, _ = memories_of(n, cu_seqlens_k, S, key_size, packed)
    s = tl.where(causal != 0, tl.minimum(part, segments), segments)
    offset = part * size + tile * BLOCK_T
    rows = tl.minimum((part + 1) * size, length) - offset
    return first + offset, rows, begin + s, (s > 0) | (has_start != 0)


@triton.jit
def rows_of_memory(
    memory, cu_seqlens, cu_seqlens_k, N, T, S, size, key_size, packed, causal, READS: tl.constexpr
):  # fmt: skip
    """First row and number of the keys that are written on top of a memory, with READS of the queries that read it.

    The third is 1 if there is such a segment, with READS such a memory, else 0.
    """
    n, s, segments, first, length = locate_memory(memory, cu_seqlens_k, N, S, key_size, packed)
    start = s * key_size
    end = start + key_size
    if READS:
        first, length = sequence_bounds(n, cu_seqlens, T, packed)
        start = tl.where(causal != 0, s * size, 0)
        end = tl.where(s < segments, tl.where(causal != 0, start + size, 0), length)
    there = tl.where(s < segments + READS, 1, 0)
    return first + start, (tl.minimum(end, length) - start) * there, there


@triton.jit(do_not_specialize=SIZES)
def outer_kernel(
    x, y, beta, factor, table, cu_seqlens, cu_seqlens_k, N, T, S, HQ, H, size, key_size, packed, causal,
    shift, has_beta, has_factor,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """table[memory + shift] = Σ x_tᵀ β_t r_t y_t over the keys of a segment, with READS the queries of a memory."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    column = (program % blocks).to(tl.int32) * BLOCK_V
    start = (program // blocks % row_blocks).to(tl.int32) * BLOCK_K
    head, memory = program // blocks // row_blocks % H, program // blocks // row_blocks // H
    first, rows, there = rows_of_memory(
        memory, cu_seqlens, cu_seqlens_k, N, T, S, size, key_size, packed, causal, READS
    )  # fmt: skip
    group = HQ // H if READS else 1
    heads = group * H
    i = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_K, BLOCK_V), ACC)
    for t in range(0, rows.to(tl.int32), BLOCK_T):
        left = rows - t
        for member in range(group):
            at = (first + t) * heads + head * group + member
            left_rows = load_tile(x + at * K, i, i < left, heads * K, start, K, BLOCK_K)
            right_rows = load_tile(y + at * V, i, i < left, heads * V, column, V, BLOCK_V)
            weight = load_factor(beta + at, i, left, heads, has_beta, ACC)
            weight *= load_factor(factor + at, i, left, heads, has_factor, ACC)
            right_rows = (right_rows.to(ACC) * weight[:, None]).to(right_rows.dtype)
            total = dot(tl.trans(left_rows), right_rows, total, PRECISION)
    d = start + tl.arange(0, BLOCK_K)
    base = table + ((memory + shift) * H + head) * K * COLUMNS
    store_tile(base, total, d, d < K * there, COLUMNS, column, V, BLOCK_V)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    x, weight, table, cu_seqlens, cu_seqlens_k, N, T, S, HQ, H, size, key_size, packed, causal, shift, add, has_weight,
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """Last column of table[memory + shift]: Σ w_t x_t over rows as in outer_kernel, and what is there if `add`."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    start = (program % blocks).to(tl.int32) * BLOCK_K
    head, memory = program // blocks % H, program // blocks // H
    first, rows, there = rows_of_memory(
        memory, cu_seqlens, cu_seqlens_k, N, T, S, size, key_size, packed, causal, READS
    )  # fmt: skip
    group = HQ // H if READS else 1
    heads = group * H
    i = tl.arange(0, BLOCK_T)
    d = start + tl.arange(0, BLOCK_K)
    place = table + (((memory + shift) * H + head) * K + d) * COLUMNS + COLUMNS - 1
    total = tl.load(place, mask=d < K * add * there, other=0.0).to(ACC)
    for t in range(0, rows.to(tl.int32), BLOCK_T):
        left = rows - t
        for member in range(group):
            at = (first + t) * heads + head * group + member
            tile = load_tile(x + at * K, i, i < left, heads * K, start, K, BLOCK_K).to(ACC)
            factor = load_factor(weight + at, i, left, heads, has_weight, ACC)
            total += tl.sum(tile * factor[:, None], 0)
    tl.store(place, total, mask=d < K * there)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    table, erase, k, beta, factor, start, end, cu_seqlens_k, N, S, H, key_size, packed, first_column,
    has_beta, has_factor, has_start, has_end,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ERASES: tl.constexpr, BY_ROWS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """V columns of a table from first_column on, along the memories of one sequence, in place.

    Forward X_0 = start, X_{s+1} = X_s + table_{s+1} − A_s X_s, the last one into `end`. In reverse, from the last
    memory on: X = start + table, X_s = X_{s+1} + table_s − A_s X_{s+1}; A is symmetric. A X is made of A (ERASES), of
    the segment's rows (BY_ROWS), or left out.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    x = (program % blocks).to(tl.int32) * BLOCK_V
    head, n = (program // blocks) % H, program // blocks // H
    begin, segments, first, length = memories_of(n, cu_seqlens_k, S, key_size, packed)
    size, outside = K * COLUMNS, (n * H + head) * K * COLUMNS + first_column
    i, d, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_J)
    at = begin + segments if REVERSE else begin
    here = table + (at * H + head) * size + first_column
    X = load_tile(start + outside, d, d < K * has_start, COLUMNS, x, V, BLOCK_V).to(ACC)
    if REVERSE:
        X += load_tile(here, d, d < K, COLUMNS, x, V, BLOCK_V)
    store_tile(here, X, d, d < K, COLUMNS, x, V, BLOCK_V)
    for _ in range(segments.to(tl.int32)):
        after = at - 1 if REVERSE else at + 1
        there = table + (after * H + head) * size + first_column
        segment = after if REVERSE else at
        X += load_tile(there, d, d < K, COLUMNS, x, V, BLOCK_V)
        if BY_ROWS or ERASES:
            tl.debug_barrier()  # what is loaded of X_s below, other threads of the block have stored
        if BY_ROWS:
            row = first + (segment - begin) * key_size
            rows = tl.minimum(first + length - row, key_size)
            for t in range(0, rows.to(tl.int32), BLOCK_T):
                left, base = rows - t, (row + t) * H + head
                read = tl.zeros((BLOCK_T, BLOCK_V), ACC)
                for c in range(0, K, BLOCK_J):
                    part = load_tile(k + base * K, i, i < left, H * K, c, K, BLOCK_J)
                    old = load_tile(here, c + j, c + j < K, COLUMNS, x, V, BLOCK_V)
                    read = dot(part, old.to(part.dtype), read, PRECISION)
                weight = load_factor(beta + base, i, left, H, has_beta, ACC)
                weight *= load_factor(factor + base, i, left, H, has_factor, ACC)
                keys = load_tile(k + base * K, i, i < left, H * K, 0, K, BLOCK_K)
                X = dot(tl.trans(keys), (read * -weight[:, None]).to(keys.dtype), X, PRECISION)
        if ERASES:
            for c in range(0, K, BLOCK_J):
                A = load_tile(erase + (segment * H + head) * K * K, d, d < K, K, c, K, BLOCK_J)
                old = load_tile(here, c + j, c + j < K, COLUMNS, x, V, BLOCK_V)
                X = dot(A, -old, X, PRECISION)
        store_tile(there, X, d, d < K, COLUMNS, x, V, BLOCK_V)
        at, here = after, there
    store_tile(end + outside, X, d, d < K * has_end, COLUMNS, x, V, BLOCK_V)


@triton.jit
def gain_of(along, squares, eps):
    """γ = clip(1 − k·z / (|k|² + ε), 0, 1); a NaN stays."""
    gain = 1.0 - along * reciprocal_or_zero(squares + eps, along.dtype)
    return tl.where(gain < 0.0, 0.0, tl.where(gain > 1.0, 1.0, gain))


@triton.jit(do_not_specialize=SIZES)
def normaliser_kernel(
    k, table, start, end, cu_seqlens_k, eps, N, S, H, key_size, packed, has_start,
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The last column of every memory of one sequence and head, and of its final state."""
    program = tl.program_id(0).to(tl.int64)
    head, n = program % H, program // H
    begin, segments, first, length = memories_of(n, cu_seqlens_k, S, key_size, packed)
    i, d, eps = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.full((), eps, ACC)
    outside = ((n * H + head) * K + d) * COLUMNS + COLUMNS - 1
    z = tl.load(start + outside, mask=d < K * has_start, other=0.0).to(ACC)
    row = first
    for s in range(segments.to(tl.int32)):
        tl.store(table + (((begin + s) * H + head) * K + d) * COLUMNS + COLUMNS - 1, z, mask=d < K)
        rows = tl.minimum(first + length - row, key_size)
        total = tl.zeros((BLOCK_K,), ACC)
        for t in range(0, rows.to(tl.int32), BLOCK_T):
            base = k + ((row + t) * H + head) * K
            keys = load_tile(base, i, i < rows - t, H * K, 0, K, BLOCK_K).to(ACC)
            gain = gain_of(tl.sum(keys * z[None, :], 1), tl.sum(keys * keys, 1), eps)
            total += tl.sum(keys * gain[:, None], 0)
        z += total
        row += key_size
    tl.store(table + (((begin + segments) * H + head) * K + d) * COLUMNS + COLUMNS - 1, z, mask=d < K)
    tl.store(end + outside, z, mask=d < K)


@triton.jit(do_not_specialize=SIZES)
def factors_kernel(
    k, table, factor, gain, cu_seqlens_k, eps, N, S, H, key_size, packed, tiles,
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    CORRECTS: tl.constexpr,
):  # fmt: skip
    """r, with CORRECTS also γ, of the keys of one tile."""
    program = tl.program_id(0).to(tl.int64)
    head, tile, memory = program % H, program // H % tiles, program // H // tiles
    row, rows = locate_keys(memory, tile, cu_seqlens_k, N, S, key_size, packed, BLOCK_T)
    i = tl.arange(0, BLOCK_T)
    eps = tl.full((), eps, ACC)
    along, squares = tl.zeros((BLOCK_T,), ACC), tl.zeros((BLOCK_T,), ACC)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        keys = load_tile(k + (row * H + head) * K, i, i < rows, H * K, start, K, BLOCK_K).to(ACC)
        z = tl.load(table + ((memory * H + head) * K + d) * COLUMNS + COLUMNS - 1, mask=d < K, other=0.0)
        along += tl.sum(keys * z[None, :], 1)
        squares += tl.sum(keys * keys, 1)
    at = row * H + head
    tl.store(factor + at + i * H, reciprocal_or_zero(along + eps, ACC), mask=i < rows)
    if CORRECTS:
        tl.store(gain + at + i * H, gain_of(along, squares, eps), mask=i < rows)


@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    q, table, o, cu_seqlens, cu_seqlens_k, eps, N, T, S, HQ, H, size, key_size, packed, causal, tiles, has_start,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, NORMALISES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column = (program % blocks).to(tl.int32) * BLOCK_V
    head, tile, slot = program // blocks % HQ, program // blocks // HQ % tiles, program // blocks // HQ // tiles
    row, rows, memory, _ = locate_queries(
        slot, tile, cu_seqlens, cu_seqlens_k, N, T, S, size, key_size, packed, causal, has_start, BLOCK_T
    )  # fmt: skip
    i = tl.arange(0, BLOCK_T)
    state = table + (memory * H + head // (HQ // H)) * K * COLUMNS
    O, weight = tl.zeros((BLOCK_T, BLOCK_V), ACC), tl.zeros((BLOCK_T,), ACC)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        live = d < tl.where(rows > 0, K, 0)  # a slot that nobody owns has no memory either
        queries = load_tile(q + (row * HQ + head) * K, i, i < rows, HQ * K, start, K, BLOCK_K)
        M = load_tile(state, d, live, COLUMNS, column, V, BLOCK_V).to(queries.dtype)
        O = dot(queries, M, O, PRECISION)
        if NORMALISES:
            z = tl.load(state + d * COLUMNS + COLUMNS - 1, mask=live, other=0.0)
            weight += tl.sum(queries.to(ACC) * z[None, :], 1)
    if NORMALISES:
        O *= reciprocal_or_zero(weight + tl.full((), eps, ACC), ACC)[:, None]
    store_tile(o + (row * HQ + head) * V, O, i, i < rows, HQ * V, column, V, BLOCK_V)


# --- launchers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What every launch needs to know of the inputs: sizes, segments, rule, types."""

    N: int
    T: int
    S: int
    HQ: int
    H: int
    K: int
    V: int
    size: int
    key_size: int
    packed: int
    causal: int
    bounds: Tensor
    key_bounds: Tensor
    delta: bool
    normalises: bool
    corrects: bool
    eps: float
    kind: torch.dtype
    acc: torch.dtype

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, beta, initial_state, cu_seqlens, cu_seqlens_k, segment_size: int,
        key_segment_size: int, delta: bool, normalize: bool, correction: bool, causal: bool, eps: float,
    ) -> Problem:  # fmt: skip
        """Checks what memory safety needs and collects the sizes."""
        (B, T, HQ, K), (S, H, V) = q.shape, v.shape[1:]
        if H == 0 or HQ == 0 or HQ % H or not 16 <= K <= 1024 or not 16 <= V <= 8192:
            raise ValueError(
                f"q {list(q.shape)}, v {list(v.shape)}: "
                "allowed: HQ a positive multiple of H, K 16 to 1024, V 16 to 8192"
            )
        if min(segment_size, key_segment_size) < 1:
            raise ValueError(f"segment sizes {segment_size}, {key_segment_size}: allowed: 1 or more")
        packed = cu_seqlens is not None
        if packed != (cu_seqlens_k is not None) or (
            packed and (B != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens))
        ):
            raise ValueError("cu_seqlens: allowed: both [N+1] with B = 1, or neither")
        N = len(cu_seqlens) - 1 if packed else B
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        require("q", q, q, tuple(OPERANDS), q.shape)
        require("k", k, q, (q.dtype,), (B, S, H, K))
        require("v", v, q, (q.dtype,), (B, S, H, V))
        require("beta", beta, q, (q.dtype, acc), (B, S, H))
        require("initial_state", initial_state, q, (acc,), (N, H, K, V + normalize))
        for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
            require(name, bounds, q, (torch.int32, torch.int64), (N + 1,))
        none = new(q, 1, dtype=torch.int32)
        both = (none if x is None else x.to(torch.int32) for x in (cu_seqlens, cu_seqlens_k))
        size = min(segment_size, T + 1) if causal else FREE_READS
        return cls(
            N, T, S, HQ, H, K, V, size, min(key_segment_size, S + 1), int(packed), int(causal), *both,
            delta, normalize, correction, eps, q.dtype, acc,
        )  # fmt: skip

    @property
    def columns(self) -> int:
        return self.V + self.normalises

    @property
    def memories(self) -> int:
        """Length of the table: every sequence has one memory more than segments."""
        segments = self.S // self.key_size + self.N if self.packed else self.N * -(-self.S // self.key_size)
        return segments + self.N

    @property
    def query_slots(self) -> int:
        return self.T // self.size + self.N if self.packed else self.N * -(-self.T // self.size)

    @property
    def layout(self) -> tuple:
        """Both bounds and all sizes."""
        sizes = self.N, self.T, self.S, self.HQ, self.H, self.size, self.key_size, self.packed, self.causal
        return self.bounds, self.key_bounds, *sizes

    @property
    def key_layout(self) -> tuple[int, ...]:
        return self.N, self.S, self.H, self.key_size, self.packed

    @property
    def divides_keys(self) -> bool:
        """Whether what keys read is divided: the delta rule with a normaliser."""
        return self.delta and self.normalises

    def launch(self, kernel: str, K: int, V: int) -> dict:
        """Constexpr arguments and launch options of a kernel on [K, V] blocks."""
        options = config.pinned(f"segment_{kernel}", OPERANDS[self.kind], K, V)
        return dict(options, K=self.K, COLUMNS=self.columns, ACC=config.TYPES[self.acc])

    def product(self, kernel: str, K: int, V: int) -> dict:
        """`launch` of a kernel that multiplies matrices of V columns."""
        return dict(self.launch(kernel, K, V), V=V, PRECISION=config.precision())


def blocks(options: dict, *names: str) -> int:
    """Number of blocks that cover the named dimensions."""
    count = 1
    for name in names:
        count *= triton.cdiv(options[name], options[f"BLOCK_{name}"])
    return count


def outer(p: Problem, x, y, beta, factor, table, shift: int = 0, reads: bool = False) -> None:
    """Xᵀ β r Y of every segment into memory s + shift of a table, with `reads` of the queries of every memory."""
    columns = table.shape[3]
    options = p.product("outer", p.K, y.shape[3]) | {"COLUMNS": columns}
    outer_kernel[(p.memories * p.H * blocks(options, "K", "V"),)](
        x, y, x if beta is None else beta, table if factor is None else factor, table, *p.layout,
        shift, int(beta is not None), int(factor is not None), READS=reads, **options,
    )  # fmt: skip


def sums(p: Problem, x, weight, table, shift: int = 0, add: bool = False, reads: bool = False) -> None:
    """Σ w x of every segment into, with `add` onto, the last column of memory s + shift."""
    options = p.launch("sums", p.K, p.K)
    sums_kernel[(p.memories * p.H * blocks(options, "K"),)](
        x, table if weight is None else weight, table, *p.layout, shift, int(add), int(weight is not None),
        READS=reads, **options,
    )  # fmt: skip


def scan(p: Problem, table, start, end, *, reverse: bool = False) -> None:
    """Runs the last column of a table, z, along every sequence; nothing is erased. start and end may be None."""
    _scan(p, table, None, (None, None, None), start, end, width=1, reverse=reverse)


def erasing_scan(p: Problem, table, k, beta, factor, start, end, *, reverse: bool = False) -> None:
    """Runs M along every sequence, with what the delta rule erases. start and end may be None."""
    erase, rows = None, (None, None, None)
    if p.delta and p.key_size > p.K:
        erase = new(k, p.memories, p.H, p.K, p.K, dtype=p.acc)
        outer(p, k, k, beta, factor, erase)
    elif p.delta:
        rows = k, beta, factor
    _scan(p, table, erase, rows, start, end, width=p.V, reverse=reverse)


def _scan(p: Problem, table, erase, rows, start, end, width: int, reverse: bool) -> None:
    options = p.product("scan", p.K, p.K) | {"V": width}
    options["BLOCK_V"] = min(options["BLOCK_V"], triton.next_power_of_2(width))
    if p.kind.itemsize == 2:
        options["PRECISION"] = "tf32"
    k, beta, factor = rows
    pointers = (table if x is None else x for x in (erase, k, k if beta is None else beta, factor, start, end))
    scan_kernel[(p.N * p.H * blocks(options, "V"),)](
        table, *pointers, p.key_bounds, *p.key_layout, 0 if width == p.V else p.V,
        *(int(x is not None) for x in (beta, factor, start, end)),
        ERASES=erase is not None, BY_ROWS=k is not None, REVERSE=reverse, **options,
    )  # fmt: skip


def factors(p: Problem, k, table) -> tuple[Tensor | None, Tensor | None]:
    """r of the keys where what they read is divided, γ where it is not 1."""
    if not (p.divides_keys or p.corrects):
        return None, None
    factor, gain = (new(k, *k.shape[:3], dtype=p.acc) for _ in range(2))
    options = p.launch("factors", p.K, p.K)
    tiles = triton.cdiv(p.key_size, options["BLOCK_T"])
    factors_kernel[(p.memories * tiles * p.H,)](
        k, table, factor, gain, p.key_bounds, p.eps, *p.key_layout, tiles, CORRECTS=p.corrects, **options
    )
    return factor if p.divides_keys else None, gain if p.corrects else None


def write_normaliser(p: Problem, k, table, initial_state, final_state) -> None:
    """z of every memory and of the final state."""
    if not p.corrects:
        sums(p, k, None, table, shift=1)
        scan(p, table, initial_state, final_state)
        return
    normaliser_kernel[(p.N * p.H,)](
        k, table, table if initial_state is None else initial_state, final_state, p.key_bounds, p.eps, *p.key_layout,
        int(initial_state is not None), **p.launch("normaliser", p.K, p.K),
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, *settings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, final_state, table) as the op's schema says."""
    with torch.cuda.device_of(q):
        p = Problem.of(q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k, *settings)
        o = new(q, *q.shape[:3], p.V)
        final_state = new(q, p.N, p.H, p.K, p.columns, dtype=p.acc)
        # Memories that no segment owns are results too: finite, not leftovers.
        make = torch.zeros if p.packed else torch.empty
        table = make((p.memories, p.H, p.K, p.columns), dtype=p.acc, device=q.device)
        if not p.N:
            return o, final_state, table
        if p.normalises:
            write_normaliser(p, k, table, initial_state, final_state)
        factor = factors(p, k, table)[0] if p.delta else None
        outer(p, k, v, beta, None, table, shift=1)
        erasing_scan(p, table, k, beta, factor, initial_state, final_state)
        if p.T:
            options = p.product("read", p.K, p.V)
            tiles = triton.cdiv(p.size, options["BLOCK_T"])
            read_kernel[(p.query_slots * tiles * p.HQ * blocks(options, "V"),)](
                q, table, o, p.bounds, p.key_bounds, p.eps, *p.layout[2:], tiles, int(initial_state is not None),
                NORMALISES=p.normalises, **options,
            )  # fmt: skip
        return o, final_state, table
