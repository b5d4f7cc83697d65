"""Small pieces shared by the chunk kernels: which sequence a chunk belongs to, masked tiles, decays, the inverse.

Addresses: a tile's base pointer is computed in int64 from the program id; offsets inside the tile are int32.
A chunk is C rows of one sequence; i = 0…C−1 counts its rows, `live` marks those that exist.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(n, cu_seqlens, T, packed):
    """First row and number of rows of sequence n, kept inside the buffer whatever cu_seqlens holds."""
    first = tl.load(cu_seqlens + n, mask=packed != 0, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + n + 1, mask=packed != 0, other=0).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), T)
    end = tl.minimum(tl.maximum(end, first), T)
    rows = tl.where(packed != 0, end - first, T)
    return tl.where(packed != 0, first, n * T), rows


@triton.jit
def first_slot(n, first, T, span, packed):
    """Slot of sequence n's first `span` rows. Packed sequences share one numbering: first // span + n."""
    return tl.where(packed != 0, first // span + n, n * ((T + span - 1) // span))


@triton.jit
def locate(slot, cu_seqlens, N, T, span, packed):
    """Sequence n, its first row, its length, and which `span` rows of it (counted from 0) own this slot.

    Binary search for the last sequence whose first slot is at or before `slot`. Slots that nobody owns report a part
    past the end of the sequence, so every row of theirs is masked.
    """
    low = slot * 0
    high = tl.where(packed != 0, N - 1, 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) // 2
        first, _ = sequence_bounds(middle, cu_seqlens, T, packed)
        reached = first_slot(middle, first, T, span, packed) <= slot
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    n = tl.where(packed != 0, low, slot // ((T + span - 1) // span))
    first, rows = sequence_bounds(n, cu_seqlens, T, packed)
    part = slot - first_slot(n, first, T, span, packed)
    return n, first, tl.where(part < 0, 0, rows), tl.maximum(part, 0)


@triton.jit
def locate_chunk(slot, cu_seqlens, N, T, C: tl.constexpr, packed):
    """First row of the chunk in this slot and how many of its rows exist (≤ 0 for a slot nobody owns)."""
    _, first, rows, c = locate(slot, cu_seqlens, N, T, C, packed)
    return first + c * C, rows - c * C


@triton.jit
def tile_mask(live, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that exist, columns below D. Without the second half where blocks divide D: it costs registers."""
    if D % BLOCK == 0:
        return live[:, None]
    else:
        return live[:, None] & (d < D)[None, :]


@triton.jit
def load_tile(base, i, live, stride, start, D: tl.constexpr, BLOCK: tl.constexpr):
    """[rows i, columns start…start+BLOCK) of a matrix with D columns and the given row stride; 0 outside."""
    d = start + tl.arange(0, BLOCK)
    mask = tile_mask(live, d, D, BLOCK)
    return tl.load(base + i[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, tile, i, live, stride, start, D: tl.constexpr, BLOCK: tl.constexpr):
    """The same rows and columns written, in the matrix's dtype."""
    d = start + tl.arange(0, BLOCK)
    mask = tile_mask(live, d, D, BLOCK)
    tl.store(base + i[:, None] * stride + d[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_column(base, i, live, stride, ACC: tl.constexpr):
    """One number per row, 0 where the row does not exist."""
    return tl.load(base + i * stride, mask=live, other=0.0).to(ACC)


@triton.jit
def _halves(x, AXIS: tl.constexpr):
    """A matrix cut in two along one axis."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if AXIS == 0:
        return tl.split(tl.permute(tl.reshape(x, [2, M // 2, N]), [1, 2, 0]))
    else:
        return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. IEEE float32 runs on FMA units, whose code holds whole rows of a in registers: at most 32 long."""
    if PRECISION == "ieee" and a.dtype == tl.float32 and a.shape[1] > 32:
        a0, a1 = _halves(a, 1)
        b0, b1 = _halves(b, 0)
        acc = dot(a0, b0, acc, PRECISION)
        return dot(a1, b1, acc, PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def rows_or_address(base, i, live, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """One operand of row_products: the rows of a matrix with D columns, or where they lie if BLOCK is narrower."""
    if BLOCK >= D:
        return load_tile(base, i, live, stride, 0, D, BLOCK)
    else:
        return base


@triton.jit
def whole_rows(rows, i, live, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of the rows that rows_or_address gave."""
    if BLOCK >= D:
        return rows
    else:
        return load_tile(rows, i, live, stride, 0, D, triton.next_power_of_2(D))


@triton.jit
def row_products(
    a, i, live_i, stride_a, b, j, live_j, stride_b,
    D: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_i · b_j over D columns: of rows held whole, or of rows in memory, BLOCK columns at a time in few registers."""
    products = tl.zeros((i.shape[0], j.shape[0]), ACC)
    if BLOCK >= D:
        products = dot(a, tl.trans(b), products, PRECISION)
    else:
        for start in tl.range(0, D, BLOCK, loop_unroll_factor=1):
            part = load_tile(a, i, live_i, stride_a, start, D, BLOCK)
            other = load_tile(b, j, live_j, stride_b, start, D, BLOCK)
            products = dot(part, tl.trans(other), products, PRECISION)
    return products


@triton.jit
def pair_decay(total_i, total_j, mask):
    """e^{G_i−G_j} where mask, else 0. Masked before exp: outside, the difference is positive and may overflow."""
    return tl.where(mask, tl.exp(tl.where(mask, total_i - total_j, 0.0)), 0.0)


# --- T = (I + L)^-1, unit lower triangular, always in the accumulation type, IEEE -------------------------------------
#
# Block substitution, recursively: [A 0; M B]^-1 = [A^-1 0; −B^-1 M A^-1, B^-1]. A [2S, 2S] matrix is split into its
# diagonal blocks, stacked along a batch axis, down to 16×16; the same identity under masks inverts those from 1×1 up.
# As accurate as forward substitution row by row (no powers of L), without the row by row dependency.


@triton.jit
def _diagonal_blocks(X, B: tl.constexpr, S: tl.constexpr):
    """[B, 2S, 2S] -> its diagonal blocks [2B, S, S] and what lies below them [B, S, S]."""
    X = tl.permute(tl.reshape(X, [B, 2, S, 2, S]), [0, 2, 4, 1, 3])
    left, right = tl.split(X)
    a, m = tl.split(left)
    _, b = tl.split(right)
    return tl.reshape(tl.permute(tl.join(a, b), [0, 3, 1, 2]), [2 * B, S, S]), m


@triton.jit
def _product(a, b, B: tl.constexpr, S: tl.constexpr):
    """Batched product; a batch of one is a plain matrix product."""
    if B == 1:
        a, b = tl.reshape(a, [S, S]), tl.reshape(b, [S, S])
    c = tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    return tl.reshape(c, [B, S, S])


@triton.jit
def _join_inverses(X, M, B: tl.constexpr, S: tl.constexpr):
    """Inverses of diagonal blocks [2B, S, S] and the blocks M below them -> inverses [B, 2S, 2S]."""
    a, b = tl.split(tl.permute(tl.reshape(X, [B, 2, S, S]), [0, 2, 3, 1]))
    c = -_product(b, _product(M, a, B, S), B, S)
    rows = tl.join(tl.join(a, tl.zeros_like(a)), tl.join(c, b))  # [B, S, S, column block, row block]
    return tl.reshape(tl.permute(rows, [0, 4, 1, 3, 2]), [B, 2 * S, 2 * S])


@triton.jit
def _invert_16(L, B: tl.constexpr):
    i = tl.arange(0, 16)
    row, column = i[None, :, None], i[None, None, :]
    X = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -L, 0.0)).to(L.dtype)
    for level in tl.static_range(1, 4):
        S = 2**level  # 2, 4, 8: inverted blocks of this size are joined two by two
        below = (row // (2 * S) == column // (2 * S)) & (row // S != column // S)
        X -= _product(X, _product(tl.where(below, L, 0.0), X, B, 16), B, 16)
    return X


@triton.jit
def unit_lower_inverse(L, C: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular [C, C], C in {16, 32, 64}."""
    if C == 16:
        X = _invert_16(tl.reshape(L, [1, 16, 16]), 1)
    elif C == 32:
        D, M = _diagonal_blocks(tl.reshape(L, [1, 32, 32]), 1, 16)
        X = _join_inverses(_invert_16(D, 2), M, 1, 16)
    else:
        D, M32 = _diagonal_blocks(tl.reshape(L, [1, 64, 64]), 1, 32)
        D, M16 = _diagonal_blocks(D, 2, 16)
        X = _join_inverses(_join_inverses(_invert_16(D, 4), M16, 2, 16), M32, 1, 32)
    return tl.reshape(X, [C, C])
