"""The CUDA step kernel's source, compiled with g++ and run thread by thread on the host against the float64 loop.

This checks the kernel's indexing, predication, barriers and arithmetic without a GPU. It is no GPU run.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from memattn.reference import gated_delta_rule as reference

SUPPORT = Path(__file__).parent / "support"
NAMES = {torch.float32: "step_float", torch.bfloat16: "step_bfloat16", torch.float16: "step_float16"}
CEILING = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # 16 bit: one rounding of the output


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} to compile the kernel for the host")
    target = tmp_path_factory.mktemp("step") / "step_on_host.so"
    include = Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{include}"]
    subprocess.run([*command, str(SUPPORT / "step_on_host.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def step_on_host(library, q, k, v, g, beta, state, indices=None, scale=None, l2norm=False, aligned=None):
    """The launcher's work: sizes, the aligned or general variant, one call. Output poisoned with NaN."""
    (batch, tokens, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    o = torch.full_like(v, torch.nan)
    sizes = (ctypes.c_int64 * 7)(batch, tokens, heads, value_heads, key_dim, value_dim, state.shape[0])
    beta_is_float = beta is not None and beta.dtype == torch.float32
    aligned = value_dim % 4 == 0 if aligned is None else aligned
    getattr(library, NAMES[q.dtype])(
        *map(pointer, (q, k, v, g, beta)),
        ctypes.c_bool(beta_is_float),
        *map(pointer, (state, indices, o)),
        sizes,
        ctypes.c_float(key_dim**-0.5 if scale is None else scale),
        ctypes.c_bool(l2norm),
        ctypes.c_bool(aligned),
    )
    return o


def inputs(batch, tokens, heads, value_heads, key_dim, value_dim, pool=None, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    q, k = (normal(batch, tokens, heads, key_dim).to(dtype) for _ in range(2))
    v = normal(batch, tokens, value_heads, value_dim).to(dtype)
    g = torch.nn.functional.logsigmoid(normal(batch, tokens, value_heads))
    beta = torch.rand(batch, tokens, value_heads, generator=draw).to(dtype)
    return q, k, v, g, beta, normal(pool or batch, value_heads, key_dim, value_dim)


def truth(q, k, v, g, beta, state, **options):
    """Output and new pool from the float64 loop."""
    state = state.double()
    q, k, v, g, beta = (None if x is None else x.double() for x in (q, k, v, g, beta))
    return reference.step(q, k, v, g, beta, state, **options), state


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


SHAPES = [
    (1, 1, 1, 1, 16, 16),
    (2, 1, 2, 4, 128, 128),
    (1, 3, 1, 2, 64, 48),
    (2, 2, 1, 1, 100, 33),  # general access path, ragged rows
    (1, 2, 1, 1, 256, 20),
]


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_loop(library, shape, dtype):
    case = inputs(*shape, dtype=dtype)
    expected, pool = truth(*case, qk_l2norm=True)
    state = case[-1].clone()
    o = step_on_host(library, *case[:-1], state, l2norm=True)
    assert error(o, expected) < CEILING[dtype]
    assert error(state, pool) < CEILING[torch.float32]


def test_both_access_paths_give_the_same_bits(library):
    case = inputs(1, 2, 1, 1, 48, 64, seed=1)
    states = [case[-1].clone(), case[-1].clone()]
    outputs = [step_on_host(library, *case[:-1], s, aligned=a) for s, a in zip(states, (True, False), strict=True)]
    assert torch.equal(*outputs) and torch.equal(*states)


@pytest.mark.parametrize("without", ["g", "beta", "both"])
def test_gates_are_optional_and_scale_is_used(library, without):
    q, k, v, g, beta, state = inputs(1, 2, 1, 2, 32, 32, seed=2)
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = (None if without in ("g", "both") else g), (None if without in ("beta", "both") else beta)
    expected, pool = truth(q, k, v, g, beta, state, scale=0.7)
    o = step_on_host(library, q, k, v, g, beta, state, scale=0.7)
    assert error(o, expected) < CEILING[torch.float32] and error(state, pool) < CEILING[torch.float32]


def test_float_beta_beside_16_bit_inputs(library):
    q, k, v, g, beta, state = inputs(1, 1, 1, 1, 32, 32, dtype=torch.bfloat16, seed=3)
    beta = beta.float() * 0.999
    expected, pool = truth(q, k, v, g, beta, state, qk_l2norm=True)
    o = step_on_host(library, q, k, v, g, beta, state, l2norm=True)
    assert error(o, expected) < CEILING[torch.bfloat16] and error(state, pool) < CEILING[torch.float32]


@pytest.mark.parametrize("invalid", [-1, -7, 5, 2**40])
def test_indices_pick_pool_rows_and_an_invalid_one_touches_nothing(library, invalid):
    *case, state = inputs(3, 2, 1, 2, 32, 40, pool=5, seed=4)
    before, indices = state.clone(), torch.tensor([4, invalid, 0])
    expected, pool = truth(*case, before, state_indices=indices, qk_l2norm=True)
    o = step_on_host(library, *case, state, indices, l2norm=True)
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert error(o, expected) < CEILING[torch.float32] and error(state, pool) < CEILING[torch.float32]
    assert torch.equal(state[1:4], before[1:4])


def test_several_tokens_equal_single_steps_bitwise(library):
    *case, state = inputs(1, 4, 1, 1, 64, 32, seed=5)
    together, apart = state.clone(), state.clone()
    o = step_on_host(library, *case, together)
    single = [step_on_host(library, *(x[:, i : i + 1].contiguous() for x in case), apart) for i in range(4)]
    assert torch.equal(o, torch.cat(single, 1)) and torch.equal(together, apart)


def test_nan_and_inf_propagate_within_their_column(library):
    q, k, v, g, beta, state = inputs(1, 1, 1, 1, 16, 32, seed=6)
    v[..., 5] = torch.nan
    state[..., 9] = torch.inf
    o = step_on_host(library, q, k, v, g, beta, state)
    assert not o[..., 5].isfinite().any() and not o[..., 9].isfinite().any()
    untouched = [c for c in range(32) if c not in (5, 9)]
    assert o[..., untouched].isfinite().all() and state[..., untouched].isfinite().all()
