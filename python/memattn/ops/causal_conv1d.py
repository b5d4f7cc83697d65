"""Short causal depthwise convolution: every channel sees its own last W inputs.

    z_t = bias + Σ_{w<W} weight[:, w] ⊙ x_{t−W+1+w}          y_t = z_t or silu(z_t) = z_t σ(z_t)

weight[:, W−1] multiplies the current token. Inputs before the first token come from the initial state, or are zero. The
state is the tail of the last W−1 raw inputs, oldest first, so splitting a sequence anywhere and handing the state on
gives the whole. It stands before q, k and v in most recurrent layers (H3, Mamba, Gated DeltaNet); the form with a fused
silu and a state is that of causal-conv1d (Dao 2023).

Backward, dz_t = dy_t silu'(z_t) with z recomputed and dz_t = 0 outside the sequence:

    dx_t = Σ_j weight[:, W−1−j] ⊙ dz_{t+j}  (+ the gradient of the final state's slot that holds x_t)
    dweight[:, w] = Σ_t dz_t ⊙ x_{t−W+1+w}      dbias = Σ_t dz_t      dinitial_state likewise, at negative positions
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define, define_differentiable, implement, resolve
from memattn.reference import causal_conv1d as reference

OP, STEP = "causal_conv1d", "causal_conv1d_step"
ACTIVATIONS = (None, "silu")
WIDTHS = (2, 3, 4)

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens"


# --- the ops: schemas, shapes, gradients -----------------------------------------------------------------------------


def _fake(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state):
    state = x.new_empty(0, dtype=reference.accumulate_dtype(x.dtype))
    if not output_final_state:
        return torch.empty_like(x), state
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), state.new_empty(n, x.shape[2], weight.shape[1] - 1)


def _backward_fake(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu):
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    state = x.new_empty(0, dtype=reference.accumulate_dtype(x.dtype))
    dstate = state if initial_state is None else torch.empty_like(initial_state)
    return torch.empty_like(x), torch.empty_like(weight), dbias, dstate


def _save(args, outputs):
    return args[:5]


def _backward(op, saved, args, grads):
    (x, weight, bias, initial_state, cu_seqlens), (dy, dfinal), (silu, final) = saved, grads, args[5:]
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dfinal = dfinal.contiguous() if final and dfinal is not None else None
    dx, dweight, dbias, dstate = op(dy, dfinal, x, weight, bias, initial_state, cu_seqlens, silu)
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dstate, None, None, None


FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, bool silu, bool output_final_state) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor dy, Tensor? dfinal_state, {_ARGUMENTS}, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=2,
    save=_save,
    backward=_backward,
)
STEP_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor? state_indices, bool silu) -> Tensor"


def _triton_forward():
    from memattn.kernels import causal_conv1d

    return causal_conv1d.forward


def _triton_backward():
    from memattn.kernels import causal_conv1d

    return causal_conv1d.backward


define_differentiable(f"{OP}_cpu", FAMILY)
define_differentiable(f"{OP}_triton", FAMILY)
implement(f"{OP}_triton", _triton_forward)
implement(f"{OP}_triton_backward", _triton_backward)
define(f"{STEP}_cpu", STEP_SCHEMA, lambda x, *rest: torch.empty_like(x))
define(f"{STEP}_cuda", STEP_SCHEMA, lambda x, *rest: torch.empty_like(x))

_TRAINING = frozenset({"backward", "packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
_DIMS = (min(WIDTHS), max(WIDTHS))
_DEVICES = ("cpu", "cuda", "mps", "xpu")
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, _DIMS, _TRAINING))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), _DIMS, _TRAINING))
backends.register(OP, "chunked", Limits(_DEVICES, check.FLOATS, backends.always, _DIMS, _TRAINING))
backends.register(STEP, "cuda", Limits(("cuda",), _16_32, backends.needs_native("_C_cuda"), _DIMS))
backends.register(STEP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), _DIMS))
backends.register(STEP, "chunked", Limits(_DEVICES, check.FLOATS, backends.always, _DIMS))

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "triton")}
_STEPS = {name: resolve(f"{STEP}_{name}") for name in ("cpu", "cuda")}


# --- the public functions --------------------------------------------------------------------------------------------


def _check_inputs(op, x, weight, bias, activation):
    check.rank(op, "x", x, "[B, T, D]")
    check.dtype(op, "x", x, check.FLOATS)
    check.rank(op, "weight", weight, "[D, W]")
    channels, width = x.shape[2], weight.shape[1]
    if weight.shape[0] != channels:
        check.shape(op, "weight", weight, "[D, W]", (channels, width))
    if width not in WIDTHS:
        raise ValueError(f"{op}: weight has width W = {width}; allowed: 2, 3, 4")
    if bias is not None:
        check.shape(op, "bias", bias, "[D]", (channels,))
    allowed = (x.dtype, reference.accumulate_dtype(x.dtype))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check.dtype(op, name, parameter, allowed, f" with {check.dtype_name(x.dtype)} x")
            check.device(op, name, parameter, x, "x")
    check.choice(op, "activation", activation, ACTIVATIONS)


def _check_state(op, name, state, n, x, weight):
    layout = "[N, D, W-1]" if op == OP else "[P, D, W-1]"
    check.shape(op, name, state, layout, (n, x.shape[2], weight.shape[1] - 1))
    check.dtype(op, name, state, (reference.accumulate_dtype(x.dtype),), f" with {check.dtype_name(x.dtype)} x")
    check.device(op, name, state, x, "x")


def _check_like_x(op, name, index, x):
    check.tensor(op, name, index)
    check.device(op, name, index, x, "x")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over whole sequences; the module docstring has the equations.

    ===============  ==================  =====================================================================
    argument         shape               dtype and meaning
    ===============  ==================  =====================================================================
    x                [B, T, D]           float32, bfloat16, float16 or float64
    weight           [D, W]              x's dtype or float32 (float64 with float64 x); W is 2, 3 or 4
    bias             [D] or None         x's dtype or float32, whatever weight has
    activation                           None or "silu", after the bias
    initial_state    [N, D, W-1]         float32 (float64 with float64 x): the inputs before x, oldest first; None is 0
    cu_seqlens       [N+1]               int32/int64 bounds of sequences packed along T, then B = 1; else N = B
    ===============  ==================  =====================================================================

    T ≥ 0, B ≥ 0 and zero-length sequences are legal; any D, any strides. Sums are float32 (float64), y is rounded once.

    Returns (y [B, T, D] in x's dtype, final_state [N, D, W-1] or None). The final state is the last W-1 inputs; a
    sequence shorter than that puts the end of its initial state before them. Differentiable once in x, weight, bias and
    initial_state, through y and final_state. NaN and inf in data propagate to the W outputs that see them.

    Raises ValueError (shapes, values), TypeError (dtypes), BackendError (a named backend that cannot serve).
    """
    signature = _PASSED.signature(x, weight, bias, initial_state, cu_seqlens, activation)
    if signature not in _PASSED:
        _check_inputs(OP, x, weight, bias, activation)
        if cu_seqlens is not None:
            _check_like_x(OP, "cu_seqlens", cu_seqlens, x)
            check.cu_seqlens_layout(OP, cu_seqlens, x)
        if initial_state is not None:
            n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            _check_state(OP, "initial_state", initial_state, n, x, weight)
        _PASSED.add(signature)
    if cu_seqlens is not None:
        check.cu_seqlens_values(OP, cu_seqlens, x)
    train = check.needs_grad(x, weight, bias, initial_state)
    features = (("backward",) if train else ()) + (("packed",) if cu_seqlens is not None else ())
    request = Request(x.device.type, x.dtype, (("W", weight.shape[1]),), frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(x=x, weight=weight, bias=bias))
    if name == "chunked":
        return reference.chunked(
            x, weight, bias, activation=activation, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    tensors = check.contiguous(x, weight, bias, initial_state, cu_seqlens)
    y, final_state = _OPS[name](*tensors, activation == "silu", output_final_state)
    return y, final_state if output_final_state else None


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One or a few tokens of the convolution, the pool of tails updated in place. Inference only.

    x [B, t, D], t ≥ 1, weight [D, W], bias [D] or None, as in `causal_conv1d`.
    state [P, D, W-1] float32 (float64 with float64 x), contiguous, is mutated. Batch row b owns state row
    state_indices[b] (int32/int64 [B], distinct), or row b when None (then P = B). Index −1 is padding: its output is 0
    and nothing is written. Returns y [B, t, D]. No host synchronisation; can be captured in a CUDA graph.

    Raises ValueError, TypeError, BackendError as `causal_conv1d`; RuntimeError when an input requires grad.
    """
    signature = _PASSED.signature(x, weight, bias, state, state_indices, activation)
    if signature not in _PASSED:
        _check_inputs(STEP, x, weight, bias, activation)
        if x.shape[1] < 1:
            raise ValueError(f"{STEP}: x has {x.shape[1]} tokens; expected at least 1")
        check.rank(STEP, "state", state, "[P, D, W-1]")
        _check_state(STEP, "state", state, x.shape[0] if state_indices is None else state.shape[0], x, weight)
        if state_indices is not None:
            _check_like_x(STEP, "state_indices", state_indices, x)
            check.state_indices_layout(STEP, state_indices, x.shape[0], x)
        _PASSED.add(signature)
    check.in_place(STEP, state)
    if state_indices is not None:
        check.state_indices_values(STEP, state_indices, state.shape[0])
    check.inference_only(STEP, OP, x, weight, bias, state)
    request = Request(x.device.type, x.dtype, (("W", weight.shape[1]),))
    name = backends.choose(STEP, request, backend, lambda: check.describe(x=x, weight=weight, bias=bias, state=state))
    if name == "chunked":
        return reference.step(x, weight, bias, state, activation=activation, state_indices=state_indices)
    indices = None if state_indices is None else state_indices.contiguous()
    return _STEPS[name](*check.contiguous(x, weight, bias), state, indices, activation == "silu")
