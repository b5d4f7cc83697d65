"""Runs jobs with the CPU backend in a process of its own: the instruction-set table is chosen once per process.

python cpu_worker.py JOBS RESULTS [LIBRARY]   JOBS and RESULTS are torch files; LIBRARY replaces the kernels of `_C`.
A job is (kind, arguments); its result is a dictionary of tensors.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from memattn import _native
from memattn.ops import attention, gated_delta_rule, gated_delta_rule_step, linear_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.attention import evaluate as evaluate_attention  # noqa: E402
from support.compare import evaluate  # noqa: E402


def gradient_op(chunk_size):
    """The op with several checkpoint groups in a short sequence."""
    return functools.partial(gated_delta_rule, backend="cpu", chunk_size=chunk_size, checkpoint_every=2)


def train(inputs, chunk_size):
    """Outputs and every gradient."""
    return evaluate(gradient_op(chunk_size), inputs)


def train_linear(inputs, chunk_size):
    """The same of linear attention."""
    return evaluate(functools.partial(linear_attention, backend="cpu", chunk_size=chunk_size), inputs)


def attend(inputs):
    """o, lse and every gradient of attention."""
    return evaluate_attention(functools.partial(attention, backend="cpu"), inputs)


def decode(inputs):
    """All tokens but the last three through one call, those one by one."""
    state = inputs["initial_state"].clone()
    length, outputs = inputs["q"].shape[1], []
    for start, stop in ((0, length - 3), *((t, t + 1) for t in range(length - 3, length))):
        part = {n: inputs[n][:, start:stop] for n in ("q", "k", "v", "g", "beta")}
        options = {n: inputs[n] for n in ("qk_l2norm", "scale")}
        outputs.append(gated_delta_rule_step(**part, state=state, backend="cpu", **options))
    return {"o": torch.cat(outputs, 1), "final_state": state}


def train_rows(inputs, cotangents, rows, threads):
    """Outputs and gradients of some rows of the batch, on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    picked = {n: x[rows].requires_grad_(True) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    outputs = gradient_op(32)(**picked, output_final_state=True)
    leaves = {n: x for n, x in picked.items() if isinstance(x, torch.Tensor)}
    gradients = torch.autograd.grad(outputs, leaves.values(), [c[rows] for c in cotangents])
    torch.set_num_threads(before)
    return dict(zip(("o", "final_state", *(f"d{n}" for n in leaves)), (*outputs, *gradients), strict=True))


def peak_scratch(shape, dtype, chunk_size):
    """Bytes that a forward without gradients had resident at its peak, beyond its inputs and outputs."""
    tokens, heads, value_heads, dim = shape
    q, k = (torch.randn(1, tokens, heads, dim, dtype=dtype) for _ in range(2))
    v = torch.randn(1, tokens, value_heads, dim, dtype=dtype)
    g, beta = (
        sign * torch.rand(1, tokens, value_heads, dtype=torch.promote_types(dtype, torch.float32)) for sign in (-1, 1)
    )

    def run(length):
        args = (x[:, :length].contiguous() for x in (q, k, v, g, beta))
        with torch.no_grad():
            return gated_delta_rule(*args, qk_l2norm=True, backend="cpu", chunk_size=chunk_size)[0]

    run(chunk_size)  # thread stacks, first-call code
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, o = resident("VmRSS"), run(tokens)
    return {"bytes": torch.tensor(resident("VmHWM") - before - o.numel() * o.element_size())}


def resident(field):
    """A memory field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


KINDS = {f.__name__: f for f in (train, train_linear, attend, decode, train_rows, peak_scratch)}


def main(jobs, results, library=None):
    """Run every job; the first result names the table."""
    if library:
        torch.ops.load_library(library)
    done = [KINDS[kind](*arguments) for kind, arguments in torch.load(jobs)]
    torch.save((_native.host().selected_isa(), done), results)


if __name__ == "__main__":
    main(*sys.argv[1:])
