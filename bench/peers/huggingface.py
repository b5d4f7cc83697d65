"""Hugging Face transformers' torch functions for Qwen3-Next, the code a user without CUDA kernels runs today.

The functions are taken out of the installed package's source, and out of a wheel of another version when one is
given, without importing transformers: nothing but torch is timed, and two versions can stand in one table. The version
matters: 5.20 and later solve the chunk's triangular system with torch.linalg.solve_triangular, 5.10 and before with a
loop over its rows.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compare import Candidate
from bench.registry import Call, Inputs, Results

SOURCE = "transformers/models/qwen3_next/modeling_qwen3_next.py"
FUNCTIONS = ("l2norm", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def functions(source: str) -> dict[str, Callable]:
    """The named top-level functions of a modeling file, without their decorators."""
    tree = ast.parse(source)
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS]
    for node in wanted:
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    namespace: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "is_torchdynamo_exporting": lambda: False}
    exec(compile(ast.Module([*future, *wanted], []), SOURCE, "exec"), namespace)
    return {name: namespace[name] for name in FUNCTIONS if name in namespace}


@cache
def installed() -> tuple[str, dict[str, Callable]] | str:
    """(version, functions) of the installed package, or why there is none."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return "transformers is not installed"
    path = Path(spec.origin).parents[1] / SOURCE
    version = importlib.metadata.version("transformers")
    if not path.is_file():
        return f"transformers {version} has no Qwen3-Next"
    return version, functions(path.read_text())


@cache
def from_wheel(path: Path) -> tuple[str, dict[str, Callable]]:
    """(version, functions) of a wheel file."""
    with zipfile.ZipFile(path) as wheel:
        return path.name.split("-")[1], functions(wheel.read(SOURCE).decode())


def expand_heads(x: Tensor, v: Tensor) -> Tensor:
    """q or k at value heads, as the model hands them over; part of the time."""
    group = v.shape[2] // x.shape[2]
    return x.repeat_interleave(group, dim=2) if group > 1 else x


def forward_of(chunk: Callable) -> Callable:
    """The chunk function behind the signature of our op."""

    def forward(*, q, k, v, g, beta, initial_state, cu_seqlens, qk_l2norm, scale):
        if cu_seqlens is not None:
            raise NotImplementedError("takes no packed sequences")
        q, k = expand_heads(q, v), expand_heads(k, v)
        return chunk(q, k, v, g=g, beta=beta, initial_state=initial_state, use_qk_l2norm_in_kernel=qk_l2norm)

    return forward


def step_of(recurrent: Callable) -> Call:
    """The recurrent function on one token; it returns the new state instead of updating it in place."""

    def step(given: Inputs) -> Results:
        v = given["v"]
        options = {n: given[n] for n in ("g", "beta")} | {"initial_state": given["state"], "output_final_state": True}
        q, k = expand_heads(given["q"], v), expand_heads(given["k"], v)
        o, state = recurrent(q, k, v, **options, use_qk_l2norm_in_kernel=given["qk_l2norm"])
        return {"o": o, "state": state}

    return step


def calls(op: str, mode: str, found: dict[str, Callable]) -> Call | None:
    """The timed call for an op and mode, or None where the package has no such function."""
    from bench.ops.gated_delta_rule import differentiated, forward_only

    if op != "gated_delta_rule":
        return None
    if mode == "step":
        return step_of(found["torch_recurrent_gated_delta_rule"])
    forward = forward_of(found["torch_chunk_gated_delta_rule"])
    run = differentiated if mode == "fwdbwd" else forward_only
    return lambda given: run(forward, given)


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """The installed version and the wheel's."""
    result: list[Candidate | tuple[str, str]] = []
    for found in (installed(), *([from_wheel(wheel)] if wheel else [])):
        if isinstance(found, str):
            result.append(("transformers", found))
        elif (call := calls(op, mode, found[1])) is not None:
            result.append(Candidate(f"transformers {found[0]}", found[0], call))
    return result
