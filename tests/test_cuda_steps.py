"""The CUDA steps against their float64 loops: on a GPU, or without one their sources compiled for the host.

What the host run can show is said in support/cuda_on_host/cuda_runtime.h. It is no GPU run.
"""

import pytest
import torch
from support import host_cuda
from torch.nn.functional import logsigmoid, normalize

from memattn import ops
from memattn.ops._library import resolve
from memattn.reference import causal_conv1d, gated_delta_rule, linear_attention

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CEILING = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # 16 bit: one rounding of the output
DELTA, LINEAR, CONV = "gated_delta_rule_step", "linear_attention_step", "causal_conv1d_step"


@pytest.fixture(autouse=True)
def kernels(monkeypatch, device):
    """The steps' kernels, handed memory that holds NaN."""
    host_cuda.ready(monkeypatch, device, DELTA, DELTA, LINEAR)
    host_cuda.ready(monkeypatch, device, CONV, CONV)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(before)


def double(*tensors):
    return (None if x is None else x.double() for x in tensors)


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


# --- gated delta rule and linear attention ---------------------------------------------------------------------------


def inputs(device, batch, tokens, heads, value_heads, key_dim, value_dim, pool=None, dtype=torch.float32, weight=False):
    """q, k, v, g, beta and a pool of states; with `weight` features are positive and states have z."""
    q, k = (torch.randn(batch, tokens, heads, key_dim) for _ in range(2))
    v, g, beta = (torch.randn(batch, tokens, value_heads, *rest) for rest in ((value_dim,), (), ()))
    state = torch.randn(pool or batch, value_heads, key_dim, value_dim)
    if weight:
        q, k = q.abs(), k.abs()
        state = torch.cat((state, state[..., :1].abs() + 1), -1)
    wide = (x.to(dtype).to(device) for x in (q, k, v))
    return *wide, logsigmoid(g).to(device), beta.sigmoid().to(dtype).to(device), state.to(device)


def delta_truth(q, k, v, g, beta, state, **options):
    """Output and new pool from the float64 loop."""
    pool = state.double()
    return gated_delta_rule.step(*double(q, k, v, g, beta), pool, **options), pool


SHAPES = [
    (1, 1, 1, 1, 16, 16),
    (2, 1, 2, 4, 128, 128),
    (1, 3, 1, 2, 64, 48),
    (2, 2, 1, 1, 100, 33),  # general access path, ragged rows
    (1, 2, 1, 1, 256, 20),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_rule(shape, dtype, device):
    *case, state = inputs(device, *shape, dtype=dtype)
    expected, pool = delta_truth(*case, state, qk_l2norm=True)
    o = ops.gated_delta_rule_step(*case, state, qk_l2norm=True, backend="cuda")
    assert error(o, expected) < CEILING[dtype] and error(state, pool) < CEILING[torch.float32]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["sum", "normalised", "pair"])
def test_linear_attention(form, shape, dtype, device):
    q, k, v, g, _, state = inputs(device, *shape, dtype=dtype, weight=form != "sum")
    pool = state.double()
    rows = linear_attention.step(*double(q, k, v, g), pool, normaliser=form != "sum", scale=0.7)
    options = {"normalize": form == "normalised", "return_unnormalized": form == "pair", "scale": 0.7}
    o = ops.linear_attention_step(q, k, v, g, state, **options, backend="cuda")
    assert error(state, pool) < CEILING[torch.float32]
    if form == "pair":
        assert error(o.numerator, rows[..., :-1]) < CEILING[torch.float32]
        assert error(o.denominator, rows[..., -1]) < CEILING[torch.float32]
    else:
        assert error(o, linear_attention.divide(rows) if form == "normalised" else rows) < CEILING[dtype]


def test_linear_attention_gate_per_head_and_none(device):
    q, k, v, g, _, state = inputs(device, 2, 2, 1, 2, 32, 32)
    for gate in (g[0, 0], None):
        pool, given = state.double(), state.clone()
        expected = linear_attention.step(*double(q, k, v, gate), pool)
        assert error(ops.linear_attention_step(q, k, v, gate, given, backend="cuda"), expected) < CEILING[torch.float32]
        assert error(given, pool) < CEILING[torch.float32]


def test_linear_attention_that_has_seen_nothing_gives_zero(device):
    q, k, v, g, _, state = inputs(device, 2, 1, 1, 1, 16, 16, weight=True)
    q[0] = 0
    k[1], state[1] = 0, 0
    o = ops.linear_attention_step(q, k, v, g, state, normalize=True, backend="cuda")
    assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("op", [DELTA, LINEAR])
def test_both_access_paths_give_the_same_bits(op, device):
    """A pool that begins 4 bytes beside a 16-byte boundary takes the general one."""
    *case, state = inputs(device, 1, 2, 1, 1, 48, 64)
    beside = torch.empty(state.numel() + 1, device=device)[1:].view(state.shape).copy_(state)
    case = case if op == DELTA else case[:-1]
    outputs = [getattr(ops, op)(*case, s, backend="cuda") for s in (state, beside)]
    assert torch.equal(*outputs) and torch.equal(state, beside)


@pytest.mark.parametrize("without", ["g", "beta", "both"])
def test_delta_rule_gates_are_optional_and_scale_is_used(without, device):
    q, k, v, g, beta, state = inputs(device, 1, 2, 1, 2, 32, 32)
    k = normalize(k, dim=-1)
    g, beta = (None if without in ("g", "both") else g), (None if without in ("beta", "both") else beta)
    expected, pool = delta_truth(q, k, v, g, beta, state, scale=0.7)
    o = ops.gated_delta_rule_step(q, k, v, g, beta, state, scale=0.7, backend="cuda")
    assert error(o, expected) < CEILING[torch.float32] and error(state, pool) < CEILING[torch.float32]


def test_delta_rule_float_beta_beside_16_bit_inputs(device):
    q, k, v, g, beta, state = inputs(device, 1, 1, 1, 1, 32, 32, dtype=torch.bfloat16)
    beta = beta.float() * 0.999
    expected, pool = delta_truth(q, k, v, g, beta, state, qk_l2norm=True)
    o = ops.gated_delta_rule_step(q, k, v, g, beta, state, qk_l2norm=True, backend="cuda")
    assert error(o, expected) < CEILING[torch.bfloat16] and error(state, pool) < CEILING[torch.float32]


INVALID = (-1, -7, 5, 2**31 - 1, 2**40)
INDICES = [(i, dtype) for i in INVALID for dtype in (torch.int32, torch.int64) if i <= torch.iinfo(dtype).max]


@pytest.mark.parametrize("invalid,dtype", INDICES, ids=str)
def test_delta_rule_index_that_is_invalid_touches_nothing(invalid, dtype, device):
    """The op below the public function, which refuses all but −1."""
    *case, state = inputs(device, 3, 2, 1, 2, 32, 40, pool=5)
    before, indices = state.clone(), torch.tensor([4, invalid, 0], dtype=dtype, device=device)
    expected, pool = delta_truth(*case, before, state_indices=indices, qk_l2norm=True)
    o = resolve(f"{DELTA}_cuda")(*case, state, indices, 32**-0.5, True)
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert error(o, expected) < CEILING[torch.float32] and error(state, pool) < CEILING[torch.float32]
    assert torch.equal(state[1:4], before[1:4])


def test_linear_attention_padding_gives_zero_in_every_form(device):
    q, k, v, g, _, state = inputs(device, 2, 2, 1, 2, 32, 40, pool=3, weight=True)
    rows, before = torch.tensor([2, -1], device=device), state.clone()
    for form in ({"normalize": True}, {"return_unnormalized": True}):
        o = ops.linear_attention_step(q, k, v, g, state, **form, state_indices=rows, backend="cuda")
        for part in (o,) if isinstance(o, torch.Tensor) else o:
            assert not part[1].any() and part[0].any()
    assert torch.equal(state[:2], before[:2]) and not torch.equal(state[2], before[2])


@pytest.mark.parametrize("op", [DELTA, LINEAR])
def test_several_tokens_equal_single_steps_bitwise(op, device):
    *case, state = inputs(device, 1, 4, 1, 1, 64, 32)
    together, apart = state.clone(), state.clone()
    case = case if op == DELTA else case[:-1]
    o = getattr(ops, op)(*case, together, backend="cuda")
    single = [getattr(ops, op)(*(x[:, i : i + 1] for x in case), apart, backend="cuda") for i in range(4)]
    assert torch.equal(o, torch.cat(single, 1)) and torch.equal(together, apart)


@pytest.mark.parametrize("op", [DELTA, LINEAR])
def test_nan_and_inf_propagate_within_their_column(op, device):
    *case, state = inputs(device, 1, 1, 1, 1, 16, 32)
    case[2][..., 5] = torch.nan
    state[..., 9] = torch.inf
    o = getattr(ops, op)(*(case if op == DELTA else case[:-1]), state, backend="cuda")
    assert not o[..., 5].isfinite().any() and not o[..., 9].isfinite().any()
    untouched = [c for c in range(32) if c not in (5, 9)]
    assert o[..., untouched].isfinite().all() and state[..., untouched].isfinite().all()


def test_launchers_check_what_memory_safety_needs(device):
    """torch.ops.memattn.* can be called with anything."""
    q, k, v, g, beta, state = inputs(device, 2, 1, 1, 2, 32, 32)
    step, linear = resolve(f"{DELTA}_cuda"), resolve(f"{LINEAR}_cuda")
    for message, call in {
        r"k must be float32 \[2, 1, 1, 32\]": lambda: step(q, k[:1], v, g, beta, state, None, 1.0, False),
        r"state must be float32 \[2, 2, 32, 32\]": lambda: step(q, k, v, g, beta, state[:1], None, 1.0, False),
        r"state must be float32 \[2, 2, 32, 33\]": lambda: linear(q, k, v, g, state, None, 1.0, True, True),
        "heads of v must be a positive multiple": lambda: step(
            q[:, :, :0], k[:, :, :0], v, g, beta, state, None, 1.0, False
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# --- convolution -----------------------------------------------------------------------------------------------------

CONV_CEILING = {torch.float32: 5e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def conv_inputs(device, batch, tokens, dim, width, pool=None, dtype=torch.float32, parameters=None):
    x, weight, bias = torch.randn(batch, tokens, dim), torch.randn(dim, width), torch.randn(dim)
    weight, bias = (p.to(parameters or dtype).to(device) for p in (weight, bias))
    return x.to(dtype).to(device), weight, bias, torch.randn(pool or batch, dim, width - 1).to(device)


def conv_truth(x, weight, bias, state, **options):
    """Output and new pool from the float64 definition."""
    pool = state.double()
    return causal_conv1d.step(*double(x, weight, bias), pool, **options), pool


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128, 4), (2, 3, 130, 3), (1, 2, 5, 2), (2, 5, 260, 4)], ids=str)
def test_convolution(shape, dtype, device):
    case = conv_inputs(device, *shape, dtype=dtype)
    expected, pool = conv_truth(*case, activation="silu")
    y = ops.causal_conv1d_step(*case, activation="silu", backend="cuda")
    assert error(y, expected) < CONV_CEILING[dtype]
    assert torch.equal(case[-1].double(), pool), "the state is a copy of the inputs, exactly"


def test_convolution_no_bias_no_activation_and_float_parameters(device):
    x, weight, bias, state = conv_inputs(device, 2, 2, 40, 4, dtype=torch.bfloat16, parameters=torch.float32)
    for given in (bias, None):
        expected, _ = conv_truth(x, weight, given, state)
        y = ops.causal_conv1d_step(x, weight, given, state.clone(), backend="cuda")
        assert error(y, expected) < CONV_CEILING[torch.bfloat16]


@pytest.mark.parametrize("invalid,dtype", INDICES, ids=str)
def test_convolution_index_that_is_invalid_touches_nothing(invalid, dtype, device):
    x, weight, bias, state = conv_inputs(device, 3, 2, 140, 4, pool=5)
    before, indices = state.clone(), torch.tensor([4, invalid, 0], dtype=dtype, device=device)
    expected, pool = conv_truth(x, weight, bias, before, state_indices=indices)
    y = resolve(f"{CONV}_cuda")(x, weight, bias, state, indices, False)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert error(y, expected) < CONV_CEILING[torch.float32] and torch.equal(state.double(), pool)
    assert torch.equal(state[1:4], before[1:4])


def test_convolution_several_tokens_equal_single_steps_bitwise(device):
    x, weight, bias, state = conv_inputs(device, 2, 4, 129, 3)
    together, apart = state.clone(), state.clone()
    y = ops.causal_conv1d_step(x, weight, bias, together, activation="silu", backend="cuda")
    steps = (x[:, i : i + 1] for i in range(4))
    single = [ops.causal_conv1d_step(s, weight, bias, apart, activation="silu", backend="cuda") for s in steps]
    assert torch.equal(y, torch.cat(single, 1)) and torch.equal(together, apart)


def test_convolution_writes_nothing_beyond_the_channels(device):
    """The state of the last, partial block lies before other memory."""
    x, weight, bias, _ = conv_inputs(device, 1, 1, 130, 4)
    pool = torch.full((2, 130, 3), 7.0, device=device)
    ops.causal_conv1d_step(x, weight, bias, pool[:1], backend="cuda")
    assert (pool[1] == 7).all() and (pool[0, :, 2] == x[0, 0]).all()
