"""The CUDA convolution step's source, compiled with g++ and run thread by thread on the host against the float64 loop.

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

from memattn.reference import causal_conv1d as reference

SUPPORT = Path(__file__).parent / "support"
NAMES = {torch.float32: "step_float", torch.bfloat16: "step_bfloat16", torch.float16: "step_float16"}
CEILING = {torch.float32: 5e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # 16 bit: one rounding of the output


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} to compile the kernel for the host")
    target = tmp_path_factory.mktemp("step") / "conv_step_on_host.so"
    include = Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{include}"]
    subprocess.run([*command, str(SUPPORT / "conv_step_on_host.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def step_on_host(library, x, weight, bias, state, indices=None, silu=False):
    """The launcher's work: sizes and one call. Output poisoned with NaN."""
    y = torch.full_like(x, torch.nan)
    sizes = (ctypes.c_int64 * 5)(*x.shape, weight.shape[1], state.shape[0])
    getattr(library, NAMES[x.dtype])(
        *map(pointer, (x, weight, bias)),
        ctypes.c_bool(weight.dtype == torch.float32 and x.dtype != torch.float32),
        *map(pointer, (state, indices)),
        ctypes.c_bool(indices is not None and indices.dtype == torch.int32),
        pointer(y),
        sizes,
        ctypes.c_bool(silu),
    )
    return y


def inputs(batch, tokens, dim, width, pool=None, dtype=torch.float32, parameters=None):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, dim, generator=draw).to(dtype)
    weight = torch.randn(dim, width, generator=draw).to(parameters or dtype)
    bias = torch.randn(dim, generator=draw).to(parameters or dtype)
    return x, weight, bias, torch.randn(pool or batch, dim, width - 1, generator=draw)


def truth(x, weight, bias, state, **options):
    """Output and new pool from the float64 definition."""
    state = state.double()
    bias = None if bias is None else bias.double()
    return reference.step(x.double(), weight.double(), bias, state, **options), state


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128, 4), (2, 3, 130, 3), (1, 2, 5, 2), (2, 5, 260, 4)], ids=str)
def test_agrees_with_the_definition(library, shape, dtype):
    case = inputs(*shape, dtype=dtype)
    expected, pool = truth(*case, activation="silu")
    y = step_on_host(library, *case, silu=True)
    assert error(y, expected) < CEILING[dtype]
    assert torch.equal(case[-1].double(), pool), "the state is a copy of the inputs, exactly"


def test_no_bias_no_activation_and_float_parameters(library):
    x, weight, bias, state = inputs(2, 2, 40, 4, dtype=torch.bfloat16, parameters=torch.float32)
    for given in (bias, None):
        before = state.clone()
        expected, _ = truth(x, weight, given, before)
        assert error(step_on_host(library, x, weight, given, state.clone()), expected) < CEILING[torch.bfloat16]


@pytest.mark.parametrize("invalid", [-1, -7, 5, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_pick_pool_rows_and_an_invalid_one_touches_nothing(library, invalid, dtype):
    x, weight, bias, state = inputs(3, 2, 140, 4, pool=5)
    before, indices = state.clone(), torch.tensor([4, invalid, 0], dtype=dtype)
    expected, pool = truth(x, weight, bias, before, state_indices=indices)
    y = step_on_host(library, x, weight, bias, state, indices)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert error(y, expected) < CEILING[torch.float32] and torch.equal(state.double(), pool)
    assert torch.equal(state[1:4], before[1:4])


def test_several_tokens_equal_single_steps_bitwise(library):
    x, weight, bias, state = inputs(2, 4, 129, 3)
    together, apart = state.clone(), state.clone()
    y = step_on_host(library, x, weight, bias, together, silu=True)
    single = [step_on_host(library, x[:, i : i + 1].contiguous(), weight, bias, apart, silu=True) for i in range(4)]
    assert torch.equal(y, torch.cat(single, 1)) and torch.equal(together, apart)


def test_nothing_beyond_the_channels_is_written(library):
    """The state of the last, partial block lies before other memory."""
    x, weight, bias, _ = inputs(1, 1, 130, 4)
    pool = torch.full((2, 130, 3), 7.0)
    step_on_host(library, x, weight, bias, pool[:1])
    assert (pool[1] == 7).all() and (pool[0, :, 2] == x[0, 0]).all()
