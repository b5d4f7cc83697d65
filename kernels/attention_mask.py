"""Which keys a query sees, for the attention kernels: the rules of reference/attention_mask.py and of
csrc/cpu/attention_mask.h as arithmetic on positions and tile indices. Nothing T×T is stored.

A mask is the tuple (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix) of the
op's schema; a size of 0 stands for "no such term". i is a query's position (row + q_offset), j a key's; `length` counts
keys.

    M(i) = {j < prefix_len} ∪ {begin(i) ≤ j < end(i), of which dilation keeps (j+1) mod D = 0, i − j < W, j < P}

begin and end never fall as i grows. So of the key tiles of a tile of queries those that every row sees are neighbours,
and so are those that any row sees; the same holds for the rows of a tile of keys.
"""

import triton
import triton.language as tl


@triton.jit
def seen_range(i, length, mask):
    """begin(i), end(i)."""
    causal, window, block_size, summary = mask[0], mask[1], mask[3], mask[4]
    end = tl.where(causal == 1, i + 1, length)
    end = tl.where(summary > 0, i // tl.maximum(summary, 1), end)
    block = i // tl.maximum(block_size, 1) * block_size
    begin = tl.where(causal == 2, 0, block)  # block is 0 without block_size
    end = tl.where(block_size > 0, tl.minimum(end, block + block_size), end)
    begin = tl.where(window > 0, tl.maximum(begin, i - window + 1), begin)
    end = tl.minimum(end, length)
    return tl.minimum(begin, end), end


@triton.jit
def seen_pairs(i, begin, end, j, length, mask, DILATED: tl.constexpr):
    """Whether i sees j, for i, begin(i), end(i) and j that broadcast."""
    seen = (j >= begin) & (j < end)
    if DILATED:
        seen = seen & (((j + 1) % mask[5] == 0) | (i - j < mask[6]) | (j < mask[7]))
    return seen | (j < tl.minimum(mask[2], length))


@triton.jit
def key_tiles(first, last, length, mask, BLOCK: tl.constexpr, DILATED: tl.constexpr):
    """(a, b, c, d, e): positions first…last see keys only in tiles [0, a) ∪ [b, e), and all keys of tiles [c, d).

    Dilated: of the keys in tiles [c, d) they see none but those with (j + 1) mod D = 0.
    """
    least_begin, most_end = seen_range(first, length, mask)[0], seen_range(last, length, mask)[1]
    a = (tl.minimum(mask[2], length) + BLOCK - 1) // BLOCK
    if DILATED:
        a = tl.maximum(a, (tl.minimum(mask[7], most_end) + BLOCK - 1) // BLOCK)
    b = tl.maximum(a, least_begin // BLOCK)
    e = tl.maximum(b, (most_end + BLOCK - 1) // BLOCK)
    if DILATED:
        c = b
        d = tl.maximum(first - mask[6] + 1, 0) // BLOCK
    else:
        c = (seen_range(last, length, mask)[0] + BLOCK - 1) // BLOCK
        d = seen_range(first, length, mask)[1] // BLOCK
    c = tl.minimum(tl.maximum(c, b), e)
    return a, b, c, tl.minimum(tl.maximum(d, c), e), e


@triton.jit
def visited(t, a, b, c, d):
    """The t-th tile of [0, a) ∪ [b, c) ∪ [d, …)."""
    tile = tl.where(t < a, t, t - a + b)
    return tl.where(t < a + c - b, tile, t - (a + c - b) + d)


@triton.jit
def row_tiles(begin, rows, length, q_offset, steps, mask, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
              DILATED: tl.constexpr):  # fmt: skip
    """(b, c, d, e): rows of a sequence see any of keys begin…begin+BLOCK_N only in tiles [b, e), in [c, d) all see all.

    One binary search for four borders; 2^steps exceeds the number of rows.
    """
    end = begin + BLOCK_N
    prefix = tl.minimum(mask[2], length)
    border = tl.arange(0, 4)
    low = border * 0
    high = low + rows
    for _ in range(steps):
        middle = (low + high) // 2
        first, stop = seen_range(middle + q_offset, length, mask)
        reached = tl.where(border == 0, stop > begin, stop >= end)  # borders 0 and 2: sees any, sees to the end
        reached = tl.where(border == 1, first >= tl.minimum(end, length), reached)  # sees none any more
        reached = tl.where(border == 3, first > tl.maximum(begin, prefix), reached)  # no longer from the start
        is_open = low < high
        high = tl.where(is_open & reached, middle, high)
        low = tl.where(is_open & (reached == 0), middle + 1, low)
    first_any = tl.sum(tl.where(border == 0, low, 0), 0)
    last_any = tl.sum(tl.where(border == 1, low, 0), 0)
    first_all = tl.sum(tl.where(border == 2, low, 0), 0)
    last_all = tl.sum(tl.where(border == 3, low, 0), 0)
    if DILATED:
        last_all = first_all
        alone = (end // mask[5] == begin // mask[5]) & (begin >= mask[7])  # no key of the dilated ones, nor prefix
        near = tl.maximum(end - 1 + mask[6] - q_offset, first_any)
        last_any = tl.where(alone, tl.minimum(last_any, near), last_any)
    first_any = tl.where(begin < prefix, 0, first_any)
    last_any = tl.where(begin < prefix, rows, last_any)
    first_all = tl.where(end <= prefix, 0, first_all)
    last_all = tl.where(end <= prefix, rows, last_all)
    b = first_any // BLOCK_M
    e = tl.maximum(b, (last_any + BLOCK_M - 1) // BLOCK_M)
    c = tl.minimum(tl.maximum((first_all + BLOCK_M - 1) // BLOCK_M, b), e)
    return b, c, tl.minimum(tl.maximum(last_all // BLOCK_M, c), e), e
