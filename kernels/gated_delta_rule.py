"""Gated delta rule, Triton forward. Linear attention is the same engine without the erase term: linear_attention.py.

Recurrence, per value head (S is K×V, all vectors are rows):
    S_t = e^{g_t} S_{t−1} + β_t k_tᵀ (v_t − k_t e^{g_t} S_{t−1})            o_t = scale · q_t S_t

Chunk form, C rows at a time, S0 the state before them, G the inclusive cumulative sum of g inside the chunk:
    L = stril(β_i (k_i·k_j) e^{G_i−G_j})      T = (I + L)^-1
    U = T(βV)      W = T(β e^G K)      Vn = U − W S0                         (values left after erasing)
    O = e^G Q S0 + tril((q_i·k_j) e^{G_i−G_j}) Vn                            (times scale)
    S1 = e^{G_C} S0 + Kᵀ (e^{G_C−G} Vn)

Without the erase term (ERASES = False) T = I, Vn = V and W = 0: prepare makes G alone, scan reads V where it stores.
With a normaliser (WEIGHS) a column of ones stands after V. Its part of the state is z [K], of O the denominator d:
    z1 = e^{G_C} z0 + Σ_i e^{G_C−G_i} k_i        d_i = e^{G_i} q_i·z0 + Σ_j tril((q_i·k_j) e^{G_i−G_j})  (times scale)
The state has V+1 columns then; inside, h keeps V and z of every chunk lies beside it.

Kernels:
    l2norm    rows of q or k divided by sqrt(Σx² + 1e-6), stored in the input dtype, and what they were multiplied by
    prepare   per chunk and value head: G, T, U, W. The only stage that knows the kind of gate; the backward runs it
              again with T known, and then also gets AᵀdO from it
    scan      per sequence, value head and block of value columns, chunk after chunk: stores S0 and Vn = U − W S0,
              then S ← decay S + KᵀVn. The backward runs it again from saved states, one program per group of chunks
    output    per chunk, value head and block of value columns: O

Symbols and shapes: q, k [B,T,H,K]; v, u, vn, o [B,T,HV,V]; w [B,T,HV,K]; g, beta, total (= G) [B,T,HV];
    solve (= T) [slots,HV,C,C]; h (= S0 of every chunk) [slots,HV,K,V]; states (= S0 of every `every`-th chunk);
    hz (= z0 of every chunk) [slots,HV,K]; weight (= d) [B,T,HV].
    Slot of chunk c of sequence n: n·⌈T/C⌉ + c, packed cu_seqlens[n]//C + n + c; the grid covers the bound T//C + N, so
    nothing is read back from the device.

Numerics: sums, gates, T and the running state are float32 (float64 for float64 inputs); operands of a product are in
    the input dtype. T is IEEE float32 whatever the input. β and e^G are multiplied into the columns of T before the one
    rounding it gets, so that K and V enter U and W exactly. Only differences G_i − G_j with i ≥ j are exponentiated.
    U, W, Vn and h are stored in the input dtype, which is what the products that read them need.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels import config
from memattn.kernels.checks import require
from memattn.kernels.tiles import (
    dot,
    first_slot,
    load_column,
    load_tile,
    locate,
    locate_chunk,
    pair_decay,
    store_tile,
    unit_lower_inverse,
)

OPERANDS = {torch.float32: 32, torch.float64: 32, torch.bfloat16: 16, torch.float16: 16}  # -> configuration
L2NORM_EPS = tl.constexpr(1e-6)
SIZES = [  # run-time numbers: never compiled in, whatever their value
    "N", "T", "H", "HV", "tokens", "rows", "group", "every", "blocks",
    "packed", "has_g", "has_beta", "has_start", "save", "solved", "final", "normalised",
]  # fmt: skip


@triton.jit
def l2norm_rows(x):
    """1 / sqrt(Σx² + eps) of every row."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 1) + L2NORM_EPS)


@triton.jit(do_not_specialize=SIZES)
def l2norm_kernel(
    x, y, inverse, rows, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    live = i < rows - row
    tile = load_tile(x + row * K, i, live, K, 0, K, BLOCK_K).to(ACC)
    factor = l2norm_rows(tile)
    tl.store(inverse + row + i, factor, mask=live)
    store_tile(y + row * K, tile * factor[:, None], i, live, K, 0, K, BLOCK_K)


@triton.jit
def load_factor(base, i, rows, stride, given, ACC: tl.constexpr):
    """One factor per row of a chunk (β, 1/norm); 1 where there are none (given is 0 or 1)."""
    return load_column(base, i, i < rows * given, stride, ACC) + (1 - given)


@triton.jit
def store_product(
    out, X, x, i, live, out_stride, stride,
    D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = X x for the rows of one chunk, by blocks of columns. X [C, C] is rounded to x's dtype."""
    X = X.to(x.dtype.element_ty)
    for start in range(0, D, BLOCK):
        tile = load_tile(x, i, live, stride, start, D, BLOCK)
        store_tile(out, dot(X, tile, tl.zeros((C, BLOCK), ACC), PRECISION), i, live, out_stride, start, D, BLOCK)


@triton.jit
def pair_products(
    x, y, i, live, stride, K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i · y_j of the rows of one chunk [C, C]."""
    products = tl.zeros((C, C), ACC)
    for start in range(0, K, BLOCK_K):
        rows = load_tile(x, i, live, stride, start, K, BLOCK_K)
        columns = load_tile(y, i, live, stride, start, K, BLOCK_K)
        products = dot(rows, tl.trans(columns), products, PRECISION)
    return products


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    q, k, v, g, beta, do, cu_seqlens, solve, total, u, w, dvn, scale,
    N, T, H, HV, packed, has_g, has_beta, save, solved,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr,
):  # fmt: skip
    """G, U, W. Forward: solves for T, stores it if `save`. Backward (solved): takes T as it is, and adds dvn = AᵀdO."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // HV, program % HV
    row, rows = locate_chunk(slot, cu_seqlens, N, T, C, packed)
    i = tl.arange(0, C)
    live = i < rows
    row_v = row * HV + head  # the chunk's first row among [B*T*HV]
    row_k = (row * H + head // (HV // H)) * K
    keys, stride_v, stride_k = k + row_k, HV * V, H * K
    chunk_solve = solve + program * C * C

    total_here = tl.cumsum(load_column(g + row_v, i, i < rows * has_g, HV, ACC), 0)
    tl.store(total + row_v + i * HV, total_here, mask=live)
    if solved != 0:
        # Transposed from the start, row j and column i: a transposed product result is no safe operand, see backward.
        after = (i[None, :] >= i[:, None]) & live[None, :]
        A = pair_products(keys, q + row_k, i, live, stride_k, K, C, BLOCK_K, ACC, PRECISION)
        A *= tl.full((), scale, ACC) * pair_decay(total_here[None, :], total_here[:, None], after)
        store_product(dvn + row_v * V, A, do + row_v * V, i, live, stride_v, stride_v, V, BLOCK_V, C, ACC, PRECISION)
    if ERASES:
        strength = load_factor(beta + row_v, i, rows, HV, has_beta, ACC)
        if solved == 0:
            below = (i[:, None] > i[None, :]) & live[:, None]
            L = pair_products(keys, keys, i, live, stride_k, K, C, BLOCK_K, ACC, PRECISION) * strength[:, None]
            X = unit_lower_inverse(L * pair_decay(total_here[:, None], total_here[None, :], below), C)
            store_tile(chunk_solve, X, i, i < C * save, C, 0, C, C)
        else:
            X = load_tile(chunk_solve, i, i < C, C, 0, C, C)
        X *= strength[None, :]
        store_product(u + row_v * V, X, v + row_v * V, i, live, stride_v, stride_v, V, BLOCK_V, C, ACC, PRECISION)
        X *= tl.exp(total_here)[None, :]
        store_product(w + row_v * K, X, keys, i, live, HV * K, stride_k, K, BLOCK_K, C, ACC, PRECISION)


@triton.jit
def state_place(head, d, x, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of rows d and columns x in the state [HV, K, COLUMNS] of one sequence."""
    return (head * K + d[:, None]) * COLUMNS + x[None, :]


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    k, u, w, total, start, cu_seqlens, vn, h, hz, states, final_state,
    N, T, H, HV, group, every, packed, has_start, save, final,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """Chunks part·group … part·group + group − 1 of one sequence, from the state `start` [parts of all, HV, K, V].

    Forward: one part per sequence, starting from initial_state. Backward: one part per saved state. vn may be u.
    States have V + WEIGHS columns; z is carried by every block of value columns and stored by the first.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column = (program % blocks).to(tl.int32) * BLOCK_V
    head, slot = (program // blocks) % HV, program // blocks // HV
    n, first, length, part = locate(slot, cu_seqlens, N, T, C * group, packed)
    begin = part * group
    end = tl.minimum(begin + group, (length + C - 1) // C)
    here = first_slot(n, first, T, C, packed)
    saved = first_slot(n, first, T, C * every, packed)

    i, d, x = tl.arange(0, C), tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    inside = (d < K)[:, None] & (x < V)[None, :]
    columns: tl.constexpr = V + WEIGHS
    size = HV * K * columns
    place = state_place(head, d, x, K, columns)
    S = tl.load(start + slot * size + place, mask=inside & (d < K * has_start)[:, None], other=0.0).to(ACC)
    if WEIGHS:
        place_z = (head * K + d) * columns + V
        z = tl.load(start + slot * size + place_z, mask=d < K * has_start, other=0.0).to(ACC)
        first_block = tl.where(column == 0, K, 0)
    for c in range(begin.to(tl.int32), end.to(tl.int32)):
        row = first + c * C
        rows = length - c * C
        live = i < rows
        row_v = row * HV + head
        before = h + ((here + c) * HV + head) * K * V
        tl.store(before + d[:, None] * V + x[None, :], S.to(h.dtype.element_ty), mask=inside)
        keep = tl.where(c % every == 0, save, 0)
        checkpoint = states + (saved + c // every) * size
        tl.store(checkpoint + place, S, mask=inside & (d < K * keep)[:, None])
        if WEIGHS:
            tl.store(hz + ((here + c) * HV + head) * K + d, z, mask=d < first_block)
            tl.store(checkpoint + place_z, z, mask=d < first_block * keep)

        G = load_column(total + row_v, i, live, HV, ACC)
        G_last = tl.load(total + row_v + (tl.minimum(rows, C) - 1) * HV).to(ACC)
        values = load_tile(u + row_v * V, i, live, HV * V, column, V, BLOCK_V).to(ACC)
        if ERASES:
            W = load_tile(w + row_v * K, i, live, HV * K, 0, K, BLOCK_K)
            values -= dot(W, S.to(W.dtype), tl.zeros((C, BLOCK_V), ACC), PRECISION)
            store_tile(vn + row_v * V, values, i, live, HV * V, column, V, BLOCK_V)

        keys = load_tile(k + (row * H + head // (HV // H)) * K, i, live, H * K, 0, K, BLOCK_K)
        to_end = tl.exp(G_last - G)
        values *= to_end[:, None]
        S = dot(tl.trans(keys), values.to(keys.dtype), S * tl.exp(G_last), PRECISION)
        if WEIGHS:
            z = z * tl.exp(G_last) + tl.sum(keys.to(ACC) * to_end[:, None], 0)
    tl.store(final_state + n * size + place, S, mask=inside & (d < K * final)[:, None])
    if WEIGHS:
        tl.store(final_state + n * size + place_z, z, mask=d < first_block * final)


@triton.jit
def reciprocal_or_zero(D, ACC: tl.constexpr):
    """1 / D; 0 where |D| is below the smallest normal number: nothing was seen."""
    unseen = tl.abs(D) < (2.2250738585072014e-308 if ACC == tl.float64 else 1.1754943508222875e-38)
    return tl.where(unseen, 0.0, 1.0 / tl.where(unseen, 1.0, D))


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q, k, vn, h, hz, total, cu_seqlens, o, weight, scale, N, T, H, HV, packed,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WEIGHS: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """O, with WEIGHS its denominator too, with DIVIDES the quotient of the two."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column = (program % blocks).to(tl.int32) * BLOCK_V
    head, slot = (program // blocks) % HV, program // blocks // HV
    row, rows = locate_chunk(slot, cu_seqlens, N, T, C, packed)
    i = tl.arange(0, C)
    live = i < rows
    row_v = row * HV + head
    key_row = (row * H + head // (HV // H)) * K

    inter = tl.zeros((C, BLOCK_V), ACC)
    A = tl.zeros((C, C), ACC)
    seen = tl.zeros((C,), ACC)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        queries = load_tile(q + key_row, i, live, H * K, start, K, BLOCK_K)
        keys = load_tile(k + key_row, i, live, H * K, start, K, BLOCK_K)
        state = load_tile(h + (slot * HV + head) * K * V, d, d < K, V, column, V, BLOCK_V)
        inter = dot(queries, state, inter, PRECISION)
        A = dot(queries, tl.trans(keys), A, PRECISION)
        if WEIGHS:
            z = tl.load(hz + (slot * HV + head) * K + d, mask=d < K, other=0.0)
            seen += tl.sum(queries.to(ACC) * z[None, :], 1)

    scale = tl.full((), scale, ACC)
    G = load_column(total + row_v, i, live, HV, ACC)
    A *= scale * pair_decay(G[:, None], G[None, :], (i[:, None] >= i[None, :]) & live[:, None])
    values = load_tile(vn + row_v * V, i, live, HV * V, column, V, BLOCK_V)
    O = dot(A.to(values.dtype), values, inter * (scale * tl.exp(G))[:, None], PRECISION)
    if WEIGHS:
        D = scale * tl.exp(G) * seen + tl.sum(A.to(values.dtype).to(ACC), 1)
        tl.store(weight + row_v + i * HV, D, mask=i < tl.where(column == 0, rows, 0))
        if DIVIDES:
            O *= reciprocal_or_zero(D, ACC)[:, None]
    store_tile(o + row_v * V, O, i, live, HV * V, column, V, BLOCK_V)


# --- launchers --------------------------------------------------------------------------------------------------------


class Memory(Enum):
    """What a token does to the state."""

    DELTA = 0  # erases, then writes
    SUM = 1  # only writes: linear attention
    SUM_AND_WEIGHT = 2  # the same with z, and beside o its denominator
    NORMALISED_SUM = 3  # the same, o divided by it

    @property
    def erases(self) -> bool:
        return self is Memory.DELTA

    @property
    def weighs(self) -> bool:
        return self in (Memory.SUM_AND_WEIGHT, Memory.NORMALISED_SUM)

    @property
    def divides(self) -> bool:
        return self is Memory.NORMALISED_SUM


@dataclass(frozen=True)
class Problem:
    """What every launch needs to know of the inputs: sizes, chunk slots, types."""

    N: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    C: int
    tokens: int
    packed: int
    cu_seqlens: Tensor
    acc: torch.dtype
    precision: str
    memory: Memory

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, g, beta, initial_state, cu_seqlens, chunk_size: int,
        memory: Memory = Memory.DELTA,
    ) -> Problem:  # fmt: skip
        """Checks what memory safety needs and collects the sizes."""
        B, T, H, K = q.shape
        HV, V = v.shape[2:]
        packed = cu_seqlens is not None
        if H == 0 or HV == 0 or HV % H or not 1 <= K <= 256 or not 1 <= V <= 256 or chunk_size not in (16, 32, 64):
            raise ValueError(
                f"q {list(q.shape)}, v {list(v.shape)}, chunk_size {chunk_size}: "
                "allowed: HV a positive multiple of H, K and V up to 256, chunk_size 16, 32 or 64"
            )
        if packed and (B != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens)):
            raise ValueError(f"cu_seqlens {list(cu_seqlens.shape)} with B = {B}; allowed: [N+1] with B = 1")
        N = len(cu_seqlens) - 1 if packed else B
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        require("q", q, q, tuple(OPERANDS), q.shape)
        require("k", k, q, (q.dtype,), q.shape)
        require("v", v, q, (q.dtype,), (B, T, HV, V))
        require("g", g, q, (acc,), (B, T, HV))
        require("beta", beta, q, (q.dtype, acc), (B, T, HV))
        require("initial_state", initial_state, q, (acc,), (N, HV, K, V + memory.weighs))
        require("cu_seqlens", cu_seqlens, q, (torch.int32, torch.int64), (N + 1,))
        bounds = cu_seqlens.to(torch.int32) if packed else new(q, 1, dtype=torch.int32)
        return cls(N, T, H, HV, K, V, chunk_size, B * T, int(packed), bounds, acc, config.precision(), memory)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.N, self.T, self.H, self.HV

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.HV, self.K, self.V + self.memory.weighs

    def every(self, chunks: int) -> int:
        """Group length in chunks, cut to what already puts a whole sequence into one group."""
        return min(chunks, self.T // self.C + 1)

    def slots(self, chunks: int = 1) -> int:
        """Number of slots of `chunks` chunks each."""
        span = self.C * chunks
        return self.T // span + self.N if self.packed else self.N * -(-self.T // span)

    def launch(self, kernel: str, bits: int, *terms: str) -> dict:
        """Constexpr arguments and launch options of a kernel; `terms` are the properties of the memory it asks for."""
        options = config.pinned(kernel, bits, self.K, self.V)
        dims = {"K": self.K, "V": self.V} if "BLOCK_K" in options else {"V": self.V}
        asked = {term.upper(): getattr(self.memory, term) for term in terms}
        return dict(options, **dims, **asked, C=self.C, ACC=config.TYPES[self.acc], PRECISION=self.precision)


def new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def l2norm(x: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Rows of x [B,T,H,K] divided by their norm; 1 / norm [B·T,H]."""
    y, inverse, rows = torch.empty_like(x), new(x, p.tokens, p.H, dtype=p.acc), p.tokens * p.H
    options = config.pinned("l2norm", OPERANDS[x.dtype], p.K, p.K)
    l2norm_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        x, y, inverse, rows, K=p.K, ACC=config.TYPES[p.acc], **options
    )  # fmt: skip
    return y, inverse


def prepare(p: Problem, k, v, g, beta, solve, q=None, do=None, scale=1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, U, W; T into `solve` unless that is None. With q and do, T is read from `solve` and the fourth is AᵀdO.

    Where nothing is erased U is v, and W and T are not there.
    """
    solved, erases = do is not None, p.memory.erases
    total = new(v, p.tokens, p.HV, dtype=p.acc)
    u, w = (torch.empty_like(v), new(v, p.tokens, p.HV, p.K)) if erases else (v, total)
    dvn = torch.empty_like(v) if solved else v
    prepare_kernel[(p.slots() * p.HV,)](
        q if solved else k, k, v, total if g is None else g, total if beta is None else beta, do if solved else v,
        p.cu_seqlens, total if solve is None else solve, total, u, w, dvn, scale,
        *p.sizes, p.packed, int(g is not None), int(beta is not None), int(solve is not None), int(solved),
        **p.launch("prepare", OPERANDS[v.dtype], "erases"),
    )  # fmt: skip
    return total, u, w, dvn


def scan(p: Problem, k, u, w, total, start, states, final_state, group: int, every: int) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over groups of chunks: overwrites u with Vn, returns h and hz, the state before each chunk.

    start, states, final_state may be None: from zeros, nothing saved, no final state.
    """
    h = new(k, p.slots(), p.HV, p.K, p.V)
    hz = new(k, p.slots(), p.HV, p.K, dtype=p.acc) if p.memory.weighs else total
    options = p.launch("weighed_scan" if p.memory.weighs else "scan", OPERANDS[k.dtype], "erases", "weighs")
    scan_kernel[(p.slots(group) * p.HV * triton.cdiv(p.V, options["BLOCK_V"]),)](
        k, u, w, total, total if start is None else start, p.cu_seqlens, u, h, hz,
        total if states is None else states, total if final_state is None else final_state,
        *p.sizes, group, every, p.packed, int(start is not None), int(states is not None), int(final_state is not None),
        **options,
    )  # fmt: skip
    return h, hz


def output(p: Problem, q, k, vn, h, hz, total, o, weight, scale: float) -> None:
    """O into o, which may be vn: a program reads no values but those it replaces. The denominator into weight."""
    options = p.launch("output", OPERANDS[q.dtype], "weighs", "divides")
    output_kernel[(p.slots() * p.HV * triton.cdiv(p.V, options["BLOCK_V"]),)](
        q, k, vn, h, hz, total, p.cu_seqlens, o, weight, scale, *p.sizes, p.packed, **options
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, chunk_size: int, checkpoint_every: int,
    output_final_state: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, final_state, solve, states) as the op's schema says; the last three have shape [0] where not asked for."""
    with torch.cuda.device_of(q):
        p = Problem.of(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)
        every = p.every(checkpoint_every)
        solve = new(q, p.slots(), p.HV, p.C, p.C, dtype=p.acc) if save else None
        states = new(q, p.slots(every), *p.state_shape, dtype=p.acc) if save else None
        final_state = new(q, p.N, *p.state_shape, dtype=p.acc) if output_final_state else None
        if save and (p.packed or not p.tokens):  # slots that no chunk owns are results too: finite, not leftovers
            states.zero_()
        if p.tokens:
            keys = l2norm(k, p)[0] if qk_l2norm else k
            total, u, w, _ = prepare(p, keys, v, g, beta, solve)
            h, hz = scan(p, keys, u, w, total, initial_state, states, final_state, p.every(p.T), every)
            del w  # before the normalised q is allocated
            o = u
            output(p, l2norm(q, p)[0] if qk_l2norm else q, keys, u, h, hz, total, o, total, scale)
        else:
            o = torch.empty_like(v)
            if solve is not None:
                solve.zero_()
            if final_state is not None:
                final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return (o, *(new(q, 0, dtype=p.acc) if x is None else x for x in (final_state, solve, states)))
