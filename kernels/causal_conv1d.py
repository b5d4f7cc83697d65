"""Short causal depthwise convolution, Triton forward and backward.

Per channel, with x at negative positions taken from the initial state:
    z_t = bias + Σ_w weight[w] x_{t-W+1+w}        y_t = silu(z_t) or z_t
    dz_t = dy_t silu'(z_t)                        dx_t = Σ_j weight[W-1-j] dz_{t+j}
    dweight[w] = Σ_t dz_t x_{t-W+1+w}             dbias = Σ_t dz_t
The batch is one row of B·T tokens cut into tiles without regard to sequences; each token finds its own sequence (one
division, or a binary search in cu_seqlens), so the grid needs no length from the device. A tile is [tokens, channels].
The backward recomputes z. Sums over tokens go through one partial row per program and are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels.checks import require

# Tiles [tokens, channels], one configuration for every architecture. With 4 warps a forward thread holds 8 adjacent
# channels, one 16-byte access of 16-bit values; a backward thread 4, for it keeps 2W-1 rows of inputs.
BLOCK_D = 64
FORWARD_T, FORWARD_TILES = 16, 4
BACKWARD_T, BACKWARD_TILES = 8, 8  # tiles of one program share its weights, and one row of partial sums
BLOCK_PARTIAL = 32  # partial rows per step of the last sum
LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
BACKWARD_LAUNCH = {**LAUNCH, "maxnreg": 168}  # three blocks a multiprocessor; left alone, ptxas may spill to fit four
RUN_TIME = ["tokens", "length", "sequences", "steps", "partials"]


@triton.jit
def _place(D, BLOCK_D: tl.constexpr):
    """This program's row of tiles, and its channels. Neighbouring programs lie side by side, in the same DRAM pages."""
    columns = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    channel = (program % columns).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    return (program // columns).to(tl.int64), channel


@triton.jit
def _tiles(program, tokens, TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many of this program's tiles hold a token."""
    return tl.minimum(tl.cdiv(tokens - program * (TILES * BLOCK_T), BLOCK_T), TILES).to(tl.int32)


@triton.jit
def _bounds(sequence, cu_seqlens, tokens, length, sequences, PACKED: tl.constexpr):
    """First token and one past the last of each sequence, kept inside the buffer whatever cu_seqlens holds."""
    if PACKED:
        inside = sequence < sequences
        begin = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int64)
    else:
        begin = sequence * length
        end = begin + length
    return tl.maximum(begin, 0), tl.minimum(end, tokens)


@triton.jit
def _sequence_of(token, cu_seqlens, length, sequences, steps, PACKED: tl.constexpr):
    """The sequence each token lies in: the last one that begins at or before it, so empty ones are passed over."""
    if PACKED:
        low = token * 0
        high = low + sequences
        for _ in range(steps):
            middle = (low + high) // 2
            right = tl.load(cu_seqlens + middle).to(tl.int64) <= token
            low = tl.where(right, middle, low)
            high = tl.where(right, high, middle)
    else:
        low = token // length
    return low


@triton.jit
def _own_rows(x, at, begin, end, channel, D, ACC: tl.constexpr):
    """Rows of x at tokens `at` [R], 0 outside their sequence."""
    inside = ((at >= begin) & (at < end))[:, None] & (channel < D)[None, :]
    return tl.load(x + at[:, None] * D + channel[None, :], mask=inside, other=0).to(ACC)


@triton.jit
def _state_slots(state, slot, sequence, sequences, channel, D, W: tl.constexpr, ACC: tl.constexpr):
    """Slots `slot` [R] of the given sequences' states [N,D,W-1], 0 where there is none."""
    inside = ((slot >= 0) & (slot < W - 1) & (sequence < sequences))[:, None] & (channel < D)[None, :]
    pointer = state + (sequence[:, None] * D + channel[None, :]) * (W - 1) + slot[:, None]
    return tl.load(pointer, mask=inside, other=0).to(ACC)


@triton.jit
def _input_rows(
    x, state, at, begin, end, sequence, sequences, channel, edge, D,
    W: tl.constexpr, STATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Inputs at tokens `at` [R]: rows of x, before the sequence its initial state, elsewhere 0.

    edge: whether any of them can lie before its sequence; most tiles skip the state and its scattered addresses.
    """
    rows = _own_rows(x, at, begin, end, channel, D, ACC)
    if STATE:
        if edge:  # at most one of the two is not 0, and a sum keeps it exactly
            rows += _state_slots(state, at - begin + (W - 1), sequence, sequences, channel, D, W, ACC)
    return rows


@triton.jit
def _parameter(pointer, index, channel, D, ACC: tl.constexpr):
    return tl.load(pointer + index, mask=channel < D, other=0).to(ACC)[None, :]


@triton.jit
def _weights(weight, channel, D, W: tl.constexpr, ACC: tl.constexpr):
    """The taps' weights, each [1, BLOCK_D]."""
    weights = ()
    for w in tl.static_range(W):
        weights = weights + (_parameter(weight, channel * W + w, channel, D, ACC),)
    return weights


@triton.jit
def _silu_slope(z):
    sigma = 1 / (1 + tl.exp(-z))
    return sigma * (1 + z * (1 - sigma))


@triton.jit
def _output_gradient(
    dy, inputs, weights, bias, at, begin, end, channel, D,
    J: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz at tokens `at`, whose first tap is inputs[J]; 0 outside the sequence, whatever the inputs hold there."""
    dz = _own_rows(dy, at, begin, end, channel, D, ACC)
    if SILU:
        z = tl.zeros_like(dz)
        if BIAS:
            z += _parameter(bias, channel, channel, D, ACC)
        for w in tl.static_range(W):
            z += weights[w] * inputs[J + w]
        dz = tl.where(((at >= begin) & (at < end))[:, None], dz * _silu_slope(z), 0.0)
    return dz


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    x, weight, bias, state, cu_seqlens, y, tokens, length, sequences, steps, D,
    W: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, channel = _place(D, BLOCK_D)
    weights = _weights(weight, channel, D, W, ACC)
    for tile in range(_tiles(program, tokens, TILES, BLOCK_T)):
        token = (program * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        sequence = _sequence_of(token, cu_seqlens, length, sequences, steps, PACKED)
        begin, end = _bounds(sequence, cu_seqlens, tokens, length, sequences, PACKED)
        edge = tl.min(token - begin, 0) < W - 1
        z = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if BIAS:
            z += _parameter(bias, channel, channel, D, ACC)
        for w in tl.static_range(W):
            at = token + (w - W + 1)
            z += weights[w] * _input_rows(
                x, state, at, begin, end, sequence, sequences, channel, edge, D, W, STATE, ACC
            )  # fmt: skip
        if SILU:
            z = z / (1 + tl.exp(-z))
        inside = (token < tokens)[:, None] & (channel < D)[None, :]
        tl.store(y + token[:, None] * D + channel[None, :], z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def final_state_kernel(
    x, state, cu_seqlens, final_state, tokens, length, sequences, D,
    W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of BLOCK_T sequences."""
    program, channel = _place(D, BLOCK_D)
    sequence = program * BLOCK_T + tl.arange(0, BLOCK_T)
    begin, end = _bounds(sequence, cu_seqlens, tokens, length, sequences, PACKED)
    inside = (sequence < sequences)[:, None] & (channel < D)[None, :]
    tail = final_state + (sequence[:, None] * D + channel[None, :]) * (W - 1)
    for s in tl.static_range(W - 1):
        at = end + (s - W + 1)
        rows = _input_rows(x, state, at, begin, end, sequence, sequences, channel, True, D, W, STATE, ACC)
        tl.store(tail + s, rows, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    dy, dfinal, x, weight, bias, state, cu_seqlens, dx, partial, tokens, length, sequences, steps, D,
    W: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, DFINAL: tl.constexpr, PACKED: tl.constexpr,
    SILU: tl.constexpr, ACC: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of TILES tiles, and their sums for dweight and dbias as row `program` of partial [programs, W+1, D]."""
    program, channel = _place(D, BLOCK_D)
    weights = _weights(weight, channel, D, W, ACC)
    sums = ()
    for _ in tl.static_range(W + 1):
        sums = sums + (tl.zeros((BLOCK_D,), ACC),)
    for tile in range(_tiles(program, tokens, TILES, BLOCK_T)):
        token = (program * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        sequence = _sequence_of(token, cu_seqlens, length, sequences, steps, PACKED)
        begin, end = _bounds(sequence, cu_seqlens, tokens, length, sequences, PACKED)
        edge = tl.min(token - begin, 0) < W - 1
        inputs = ()  # inputs[i]: the rows i - W + 1 tokens away, so that z_{t+j} is made of inputs[j : j + W]
        for i in tl.static_range(2 * W - 1):
            at = token + (i - W + 1)
            rows = _input_rows(x, state, at, begin, end, sequence, sequences, channel, edge, D, W, STATE, ACC)
            inputs = inputs + (rows,)
        row = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if DFINAL:
            if tl.min(end - token, 0) < W:
                row += _state_slots(dfinal, token - end + (W - 1), sequence, sequences, channel, D, W, ACC)
        added = ()
        for j in tl.static_range(W):
            dz = _output_gradient(
                dy, inputs, weights, bias, token + j, begin, end, channel, D, j, W, BIAS, SILU, ACC
            )  # fmt: skip
            row += weights[W - 1 - j] * dz
            if j == 0:
                for w in tl.static_range(W):
                    added = added + (sums[w] + tl.sum(dz * inputs[w], 0),)
                added = added + (sums[W] + tl.sum(dz, 0),)
        sums = added
        inside = (token < tokens)[:, None] & (channel < D)[None, :]
        tl.store(dx + token[:, None] * D + channel[None, :], row.to(dx.dtype.element_ty), mask=inside)
    for w in tl.static_range(W + 1):
        tl.store(partial + (program * (W + 1) + w) * D + channel, sums[w], mask=channel < D)


@triton.jit(do_not_specialize=RUN_TIME)
def initial_state_gradient_kernel(
    dy, dfinal, x, weight, bias, state, cu_seqlens, dstate, tokens, length, sequences, D,
    W: tl.constexpr, BIAS: tl.constexpr, DFINAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dstate[s] = Σ_{t≤s} weight[s-t] dz_t over the first W-1 tokens of BLOCK_T sequences, and what a sequence shorter
    than W-1 hands on from the final state."""
    program, channel = _place(D, BLOCK_D)
    sequence = program * BLOCK_T + tl.arange(0, BLOCK_T)
    begin, end = _bounds(sequence, cu_seqlens, tokens, length, sequences, PACKED)
    inside = (sequence < sequences)[:, None] & (channel < D)[None, :]
    weights = _weights(weight, channel, D, W, ACC)
    inputs = ()
    for i in tl.static_range(2 * W - 2):
        at = begin + (i - W + 1)
        rows = _input_rows(x, state, at, begin, end, sequence, sequences, channel, True, D, W, True, ACC)
        inputs = inputs + (rows,)
    tail = dstate + (sequence[:, None] * D + channel[None, :]) * (W - 1)
    for s in tl.static_range(W - 1):
        row = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if DFINAL:
            row += _state_slots(dfinal, s + begin - end, sequence, sequences, channel, D, W, ACC)
        for t in tl.static_range(s + 1):
            dz = _output_gradient(
                dy, inputs, weights, bias, begin + t, begin, end, channel, D, t, W, BIAS, SILU, ACC
            )  # fmt: skip
            row += weights[s - t] * dz
        tl.store(tail + s, row, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def sum_kernel(
    partial, dweight, dbias, partials, D,
    W: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_PARTIAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tap (the last program: the bias) of partial [partials, W+1, D] summed over its rows, in order."""
    w, channel = _place(D, BLOCK_D)
    total = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, partials, BLOCK_PARTIAL):
        row = start + tl.arange(0, BLOCK_PARTIAL).to(tl.int64)
        inside = (row < partials)[:, None] & (channel < D)[None, :]
        total += tl.sum(tl.load(partial + (row * (W + 1) + w)[:, None] * D + channel[None, :], mask=inside, other=0), 0)
    if w < W:
        tl.store(dweight + channel * W + w, total.to(dweight.dtype.element_ty), mask=channel < D)
    elif BIAS:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), mask=channel < D)


def _layout(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, **states: Tensor | None):
    """Checks what will be addressed, and returns the launch arguments every kernel shares: sizes and flags."""
    if x.dim() != 3 or weight.dim() != 2 or not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"x, weight: received {list(x.shape)}, {list(weight.shape)}; allowed: [B, T, D], [D, 2..4]")
    batch, length, channels = x.shape
    if cu_seqlens is not None and (batch != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2):
        raise ValueError(f"cu_seqlens: received {list(cu_seqlens.shape)} with B = {batch}; allowed: [N+1] with B = 1")
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    require("x", x, x, (torch.float32, torch.bfloat16, torch.float16, torch.float64), x.shape)
    require("weight", weight, x, (x.dtype, wide), (channels, weight.shape[1]))
    require("bias", bias, x, (x.dtype, wide), (channels,))
    require("cu_seqlens", cu_seqlens, x, (torch.int32, torch.int64), (sequences + 1,))
    for name, state in states.items():
        require(name, state, x, (wide,), (sequences, channels, weight.shape[1] - 1))
    sizes = {"tokens": batch * length, "length": length, "sequences": sequences, "D": channels}
    flags = {
        "W": weight.shape[1],
        "PACKED": cu_seqlens is not None,
        "ACC": tl.float64 if wide == torch.float64 else tl.float32,
        "BLOCK_D": BLOCK_D,
    }
    return sizes, flags, wide


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and the final state [N,D,W-1], or [0] when it is not asked for."""
    sizes, flags, wide = _layout(x, weight, bias, cu_seqlens, initial_state=initial_state)
    flags |= {"STATE": initial_state is not None, "BLOCK_T": FORWARD_T}
    tokens, sequences, columns = sizes["tokens"], sizes["sequences"], triton.cdiv(sizes["D"], BLOCK_D)
    y = torch.empty_like(x)
    if y.numel():
        forward_kernel[(triton.cdiv(tokens, FORWARD_TILES * FORWARD_T) * columns,)](
            x, weight, bias, initial_state, cu_seqlens, y, **sizes, steps=sequences.bit_length(),
            BIAS=bias is not None, SILU=silu, TILES=FORWARD_TILES, **flags, **LAUNCH,
        )  # fmt: skip
    if not output_final_state:
        return y, x.new_empty(0, dtype=wide)
    final_state = x.new_empty(sequences, sizes["D"], flags["W"] - 1, dtype=wide)
    if final_state.numel():
        final_state_kernel[(triton.cdiv(sequences, FORWARD_T) * columns,)](
            x, initial_state, cu_seqlens, final_state, **sizes, **flags, **LAUNCH
        )
    return y, final_state


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dinitial_state, each in its input's dtype; [0] where the input is None."""
    sizes, flags, wide = _layout(
        x, weight, bias, cu_seqlens, initial_state=initial_state, dfinal_state=dfinal_state
    )  # fmt: skip
    require("dy", dy, x, (x.dtype,), x.shape)
    flags |= {"BIAS": bias is not None, "DFINAL": dfinal_state is not None, "SILU": silu, "BLOCK_T": BACKWARD_T}
    tokens, sequences, channels = sizes["tokens"], sizes["sequences"], sizes["D"]
    columns, width = triton.cdiv(channels, BLOCK_D), flags["W"]
    programs = triton.cdiv(tokens, BACKWARD_TILES * BACKWARD_T) if channels else 0
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    dbias = torch.empty_like(weight[:0, 0] if bias is None else bias)
    partial = x.new_empty(programs, width + 1, channels, dtype=wide)
    if programs:
        backward_kernel[(programs * columns,)](
            dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, dx, partial, **sizes,
            steps=sequences.bit_length(), STATE=initial_state is not None, TILES=BACKWARD_TILES,
            **flags, **BACKWARD_LAUNCH,
        )  # fmt: skip
    if channels:
        sum_kernel[((width + 1) * columns,)](
            partial, dweight, dbias, partials=programs, D=channels, W=width, BIAS=bias is not None, ACC=flags["ACC"],
            BLOCK_PARTIAL=BLOCK_PARTIAL, BLOCK_D=BLOCK_D, **LAUNCH,
        )  # fmt: skip
    if initial_state is None:
        return dx, dweight, dbias, x.new_empty(0, dtype=wide)
    dstate = torch.empty_like(initial_state)
    if dstate.numel():
        initial_state_gradient_kernel[(triton.cdiv(sequences, BACKWARD_T) * columns,)](
            dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, dstate, **sizes, **flags, **LAUNCH,
        )  # fmt: skip
    return dx, dweight, dbias, dstate
