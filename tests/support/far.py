"""Runs the Triton kernels on one short sequence that lies past element 2^31 of every tensor, in the interpreter.

Memory that nobody touches costs nothing, and of each grid only the last programs run, which own the sequence. Results
must be bitwise those of the sequence alone. A process of its own, because 32-bit offsets end it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle  # noqa: E402

from memattn.kernels.gated_delta_rule import forward  # noqa: E402
from memattn.kernels.gated_delta_rule_backward import backward  # noqa: E402
from support.cases import TENSORS, Case  # noqa: E402

SIZE = 64  # K, V and chunk: every tensor, states and C×C matrices too, then has 64 elements a token
FIRST = 2**31 // SIZE
LAST_PROGRAMS = 4
CASE = Case("far", length=70, heads=1, value_heads=1, key_dim=SIZE, value_dim=SIZE, lengths=(70,))
SETTINGS = SIZE**-0.5, True, SIZE, 2**30  # scale, l2norm, chunk size, one checkpoint


def run_last_programs(backwards: tuple[str, ...] = ()) -> None:
    """Make the interpreter run only the last programs of every launch, and the first of kernels counting backwards."""
    skipped, shift, run = [0], [0], InterpretedFunction.run
    program_id, programs = InterpreterBuilder.create_get_program_id, InterpreterBuilder.create_get_num_programs

    def run_last(kernel, *args, grid, **options):
        skipped[0] = max(grid[0] - LAST_PROGRAMS, 0)
        shift[0] = 0 if kernel.fn.__name__ in backwards else skipped[0]
        return run(kernel, *args, grid=(grid[0] - skipped[0], *grid[1:]), **options)

    def moved_by(handle, axis, count):
        return TensorHandle(handle.data + handle.data.dtype.type(count if axis == 0 else 0), handle.dtype)

    InterpretedFunction.run = run_last
    InterpreterBuilder.create_get_program_id = lambda builder, axis: moved_by(program_id(builder, axis), axis, shift[0])
    InterpreterBuilder.create_get_num_programs = lambda builder, axis: moved_by(
        programs(builder, axis), axis, skipped[0]
    )


def train(inputs: dict, do, dfinal_state) -> dict:
    """o, final state and all gradients."""
    given = [inputs[name] for name in (*TENSORS, "cu_seqlens")]
    o, final_state, solve, states = forward(*given, *SETTINGS, True, True)
    gradients = backward(do, dfinal_state, *given, solve, states, *SETTINGS)
    return {"o": o, "final_state": final_state, **{f"d{n}": x for n, x in zip(TENSORS, gradients, strict=True)}}


def moved(x):
    """A token-major tensor placed FIRST rows further on, in memory that is not touched before it."""
    far = torch.empty((1, FIRST + x.shape[1], *x.shape[2:]), dtype=x.dtype)
    far[:, FIRST:] = x
    return far


def main() -> None:
    inputs = CASE.make(torch.float16)
    do = CASE.make(torch.float16, seed=1)["v"]
    dfinal_state = torch.ones_like(inputs["initial_state"])
    near = train(inputs, do, dfinal_state)
    run_last_programs()
    tokens = {n: moved(inputs[n]) for n in TENSORS if n != "initial_state"}
    far = train({**inputs, **tokens, "cu_seqlens": inputs["cu_seqlens"] + FIRST}, moved(do), dfinal_state)
    for name, x in near.items():
        there = far[name] if name.endswith("state") else far[name][:, FIRST:]
        assert torch.equal(there, x), f"{name} differs past element 2^31"


if __name__ == "__main__":
    main()
