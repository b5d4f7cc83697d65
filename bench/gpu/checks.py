"""Checks that need the device: pinned configurations, repeatability, graph capture, small cases for the sanitizer.

    python -m bench.gpu.checks configs --json out.json        (also: repeat, graph, small, loaded)

Each prints a line per case and exits with status 1 if one failed; on a GPU only compiled kernels serve, nothing falls
back. `--device cpu` runs what can run without a GPU, which is how these checks are themselves tested.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.cases import BASE, Case
from support.compare import CEILING, assert_close_to_truth, evaluate, to_float64
from torch import Tensor

from bench.gpu.calls import CALLS, CAPTURED
from bench.gpu.recorder import record
from memattn import _native, backends, ops
from memattn.reference import gated_delta_rule as reference

COMPILED = ("cuda", "triton")
CHUNK_SIZES = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Report = Iterator[tuple[str, str]]  # (case, "" or what is wrong)


def outcome(run: Callable[[], Any]) -> str:
    """ "" if `run` returns, else its error's first line."""
    try:
        run()
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


# --- configs ---------------------------------------------------------------------------------------------------------


def tuned_dims() -> list[int]:
    """Every head-dim bound that some pinned configuration of the delta rule ends at, and the smallest head dim."""
    from memattn import kernels

    (folder,) = kernels.__path__
    files = (json.loads(path.read_text()) for path in Path(folder, "_tuned").glob("*.json"))
    entries = itertools.chain.from_iterable(e for f in files for kernel in f.values() for e in kernel.values())
    return sorted({16, *(entry["dim"] for entry in entries if entry["dim"] <= 256)})


def configuration(dims: tuple[int, int], dtype: torch.dtype, chunk_size: int, device: str) -> None:
    """Forward and backward against float64, by the tests' own rule."""
    case = replace(BASE, batch=1, heads=1, value_heads=2, lengths=(100, 0, 67), key_dim=dims[0], value_dim=dims[1])
    inputs = case.make(dtype, device)
    exact = to_float64(inputs)
    truth = evaluate(reference.chunked, exact)
    operand = None if dtype == torch.float32 else dtype
    comparator = evaluate(functools.partial(reference.chunked, chunk_size=chunk_size, operand_dtype=operand), inputs)
    actual = evaluate(functools.partial(ops.gated_delta_rule, chunk_size=chunk_size), inputs)
    assert_close_to_truth(actual, comparator, truth, CEILING[dtype])


def configs(device: str) -> Report:
    """Every bound of the pinned tables, K = V and K != V, in every dtype and chunk size."""
    dims = tuned_dims()
    pairs = [(d, d) for d in dims] + list(itertools.pairwise(dims)) + [(b, a) for a, b in itertools.pairwise(dims)]
    for pair, dtype, chunk_size in itertools.product(pairs, DTYPES, CHUNK_SIZES):
        name = f"K{pair[0]} V{pair[1]} {str(dtype).removeprefix('torch.')} chunk {chunk_size}"
        yield name, outcome(functools.partial(configuration, pair, dtype, chunk_size, device))


# --- repeat ----------------------------------------------------------------------------------------------------------


def noise(device: str) -> Callable[[], None]:
    """Work for a second stream, so that blocks are scheduled differently from call to call."""
    if device != "cuda":
        return lambda: None
    stream, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)

    def enqueue() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, a)

    return enqueue


def first_difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
    """ "" if all tensors have the same bits, else the first place where not."""
    for name, x in before.items():
        if not torch.equal(x, after[name]):
            place = (x != after[name]).nonzero()[0].tolist()
            return f"{name} differs at {place}: {x[tuple(place)].item()} then {after[name][tuple(place)].item()}"
    return ""


def same_bits(run: Callable[[], dict[str, Tensor]], device: str, times: int) -> str:
    """Call `run` again and again, the second half beside other work."""
    first, busy = run(), noise(device)
    for i in range(times):
        if i >= times // 2:
            busy()
        if difference := first_difference(first, run()):
            return f"call {i + 2}: {difference}"
    return ""


def step_once(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """One decode call on a fresh copy of its state."""
    inputs: dict[str, Any] = dict(case.make(dtype, device))
    state = inputs["initial_state"]
    tensors: dict[str, Any] = {n: inputs[n] for n in ("q", "k", "v", "g", "beta")}
    return {"o": ops.gated_delta_rule_step(**tensors, state=state, qk_l2norm=True), "state": state}


def repeat(device: str, times: int = 100) -> Report:
    """Forward, backward and step; then a row alone against the same row in its batch."""
    wide = replace(BASE, batch=8 if device == "cuda" else 2, length=300, key_dim=128, value_dim=128)
    step = replace(wide, length=1, batch=4 * wide.batch)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        inputs = wide.make(dtype, device)
        whole = functools.partial(evaluate, ops.gated_delta_rule, inputs)
        yield f"forward and backward {name}", same_bits(whole, device, times)
        yield f"step {name}", same_bits(functools.partial(step_once, step, dtype, device), device, times)
        alone = {n: x[:1] if isinstance(x, Tensor) else x for n, x in inputs.items()}
        one = evaluate(ops.gated_delta_rule, alone, grad=False)
        batch = {n: x[:1] for n, x in evaluate(ops.gated_delta_rule, inputs, grad=False).items()}
        yield f"a row alone and in its batch {name}", first_difference(one, batch)
        for words, call in CALLS.items():
            given = call.make(dtype, device, size=16 if device == "cuda" else 2)
            yield f"{words} {name}", same_bits(functools.partial(call.run, given), device, times)


# --- graph -----------------------------------------------------------------------------------------------------------


def replayed(call: Callable[..., Any], given: dict[str, Any], other: dict[str, Any]) -> str:
    """Capture `call(**given)`, put the values of `other` in place, replay, and compare with an eager call on them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            call(**given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = call(**given)
    for name, x in other.items():
        if isinstance(x, Tensor):
            given[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        eager = call(**other)
    as_tuple = [x if isinstance(x, tuple) else (x,) for x in (captured, eager)]
    pairs = {str(i): x for i, x in enumerate(as_tuple[0]) if x is not None}
    after = {str(i): x for i, x in enumerate(as_tuple[1]) if x is not None}
    states = [{n: x for n, x in inputs.items() if n == "state"} for inputs in (given, other)]
    return first_difference(pairs, after) or first_difference(*states)


def graph(device: str) -> Report:
    """All steps and the forward, with padding rows and with packed sequences."""
    case = replace(BASE, batch=4, length=1, key_dim=128, value_dim=128)

    def step_inputs(seed: int, rows: list[int]) -> dict[str, Any]:
        drawn = case.make(torch.bfloat16, device, seed)
        picked = {n: drawn[n] for n in ("q", "k", "v", "g", "beta")}
        pool = replace(case, batch=6).make(torch.bfloat16, device, seed)["initial_state"]
        return {**picked, "state": pool, "state_indices": torch.tensor(rows, device=device), "qk_l2norm": True}

    yield "step", replayed(ops.gated_delta_rule_step, step_inputs(0, [0, 1, 2, 3]), step_inputs(1, [5, -1, 0, 2]))
    forward = functools.partial(ops.gated_delta_rule, output_final_state=True)
    for name, shape in (
        ("forward", replace(case, length=200)),
        ("packed", replace(case, batch=1, lengths=(60, 0, 140))),
    ):
        first, second = (dict(shape.make(torch.bfloat16, device, seed)) for seed in (0, 1))
        yield name, replayed(forward, first, second)

    def conv_inputs(seed: int) -> dict[str, Any]:
        drawn = torch.Generator(device).manual_seed(seed)
        x, weight, state = (
            torch.randn(shape, generator=drawn, device=device) for shape in ((4, 1, 256), (256, 4), (4, 256, 3))
        )
        return {"x": x.bfloat16(), "weight": weight, "bias": None, "state": state, "activation": "silu"}

    yield "convolution step", replayed(ops.causal_conv1d_step, conv_inputs(0), conv_inputs(1))
    for words, call in CAPTURED.items():
        drawn = (call.make(torch.bfloat16, device, seed, size=4) for seed in (0, 1))
        yield words, replayed(call.op, *drawn)


# --- small cases, and what is loaded ---------------------------------------------------------------------------------


def small(device: str) -> Report:
    """Each kernel once or twice, ragged and packed: what compute-sanitizer watches."""
    case = replace(BASE, batch=1, heads=1, value_heads=2, length=70)
    for shape in (case, replace(case, lengths=(1, 0, 69)), replace(case, key_dim=100, value_dim=36)):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = shape.make(dtype, device)
            yield f"{shape.key_dim} {dtype}", outcome(functools.partial(evaluate, ops.gated_delta_rule, inputs))
    for dims in ((128, 128), (100, 33), (16, 16)):
        shape = replace(case, length=2, key_dim=dims[0], value_dim=dims[1])
        yield f"step {dims}", outcome(functools.partial(step_once, shape, torch.bfloat16, device))
    x, weight = torch.randn(2, 70, 33, device=device), torch.randn(33, 4, device=device)
    x.requires_grad_()
    yield "convolution", outcome(lambda: ops.causal_conv1d(x, weight, activation="silu")[0].sum().backward())
    for words, call in CALLS.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{words} {dtype}", outcome(functools.partial(call.run, call.make(dtype, device)))
    state = torch.randn(2, 33, 3, device=device)
    yield "convolution step", outcome(lambda: ops.causal_conv1d_step(x.detach()[:, :2], weight, None, state))


def loaded(device: str) -> Report:
    """The extension and Triton, which the other stages are about."""
    yield "_C_cuda" if device == "cuda" else "_C", _native.native_reason("_C_cuda" if device == "cuda" else "_C") or ""
    yield "triton", _native.triton_reason() or ""


CHECKS = {f.__name__: f for f in (configs, repeat, graph, small, loaded)}


def main(arguments: list[str] | None = None) -> int:
    """Run one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    rows = []
    with backends.use_backend(COMPILED) if options.device == "cuda" else contextlib.nullcontext():
        for name, wrong in CHECKS[options.check](options.device):
            rows.append({"case": name, "ok": not wrong, "reason": wrong})
            print(f"{'FAILED' if wrong else 'ok    '} {options.check} {name} {wrong}", flush=True)
            if options.json is not None:
                record(options.json, options.check, rows)
    return int(not rows or any(not row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
