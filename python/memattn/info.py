"""`python -m memattn info`: versions, devices, what was built; per op which backend runs here and why others do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memattn import __version__, _native, backends
from memattn.ops import gated_delta_rule
from memattn.reference.gated_delta_rule import loop

EXTENSIONS = ("_C", "_C_cuda", "_host")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Relative Frobenius error allowed against the float64 definition, as in the test suite.
CEILINGS = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def collect() -> dict[str, Any]:
    """Everything `info` shows, ready for JSON."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "extensions": {name: _native.native_reason(name) or "loaded" for name in EXTENSIONS},
        "triton": _native.triton_reason() or "usable",
        "build": _native.build_info(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MEMATTN_")},
        "ops": {op: {device: _choices(op, device) for device in _devices()} for op in backends.registry()},
    }


def _versions() -> dict[str, str | None]:
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return {
        "memattn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton,
    }


def _cpu() -> dict[str, Any]:
    cpu: dict[str, Any] = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    if (host := _native.host()) is None:
        return cpu
    cpu["isa_available"] = host.available_isas()
    try:
        cpu["isa_selected"] = host.selected_isa()
    except RuntimeError as error:
        cpu["isa_error"] = str(error)
    return cpu


def _gpus() -> list[dict[str, Any]]:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "gib": round(p.total_memory / 2**30, 1)} for p in found
    ]


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _choices(op: str, device: str) -> dict[str, Any]:
    """Per dtype the backend that would run, training where the op can, and for each backend what stands against it."""
    table = backends.registry()[op]
    names = [name for name in backends.ORDER if name in table]
    features = frozenset({"backward"} if any("backward" in limits.features for limits in table.values()) else ())
    requests = {dtype: backends.Request(device, dtype, features=features) for dtype in DTYPES}
    refusals = {name: {d: backends.why_not(op, name, r) for d, r in requests.items()} for name in names}
    return {
        "runs": {_name(d): next((n for n in names if not refusals[n][d]), None) for d in DTYPES},
        "reasons": {n: list(dict.fromkeys(r for found in refusals[n].values() for r in found)) for n in names},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def render(info: dict[str, Any]) -> str:
    """The report as text."""
    return "\n".join(_lines(info))


def _lines(info: dict[str, Any]) -> Iterator[str]:
    versions, cpu, build = info["versions"], info["cpu"], info["build"]
    yield f"memattn {versions['memattn']}, Python {versions['python']}, {versions['platform']}"
    yield f"torch {versions['torch']} (CUDA {versions['torch_cuda'] or 'none'}), triton {versions['triton'] or 'none'}"
    yield f"CPU   {cpu['machine']}, {cpu['threads']} threads{_isa(cpu)}"
    yield "GPU   " + (", ".join(f"{g['name']} (sm_{g['capability']}, {g['gib']} GiB)" for g in info["gpus"]) or "none")
    if info["environment"]:
        yield "set   " + " ".join(f"{name}={value}" for name, value in info["environment"].items())
    yield ""
    if build:
        archs = f", nvcc {build['nvcc']} for {';'.join(build['cuda_archs'])}" if "_C_cuda" in build["built"] else ""
        yield f"built from {build['commit']} against torch {build['torch']} (runs on {build['torch_target']} and later)"
        yield f"      by {build['cxx']}{archs}"
    yield from (f"{name:9} {state}" for name, state in info["extensions"].items())
    yield f"{'triton':9} {info['triton']}"
    for op, devices in info["ops"].items():
        yield ""
        yield op
        for device, choice in devices.items():
            yield f"  {device}: " + _runs(choice["runs"])
            yield from (f"    not {name}: {reason}" for name, found in choice["reasons"].items() for reason in found)


def _isa(cpu: dict[str, Any]) -> str:
    if "isa_available" not in cpu:
        return ""
    chosen = f"using {cpu['isa_selected']}" if "isa_selected" in cpu else cpu["isa_error"]
    return f"; kernels for {', '.join(cpu['isa_available'])}; {chosen}"


def _runs(runs: dict[str, str | None]) -> str:
    """'cpu (float32, float64), chunked (float16)'."""
    able = dict.fromkeys(runs.values())
    return ", ".join(f"{name or 'nothing'} ({', '.join(d for d in runs if runs[d] == name)})" for name in able)


def check() -> Iterator[dict[str, Any]]:
    """Forward and backward of a small gated_delta_rule on every usable backend, against the float64 definition."""
    for device in _devices():
        for backend in backends.registry()["gated_delta_rule"]:
            for dtype, allowed in CEILINGS.items():
                request = backends.Request(device, dtype, features=frozenset({"backward"}))
                if not backends.why_not("gated_delta_rule", backend, request):
                    case = {"case": f"{device} {backend} {_name(dtype)}", "allowed": allowed}
                    try:
                        error = _error(device, backend, dtype)
                    except Exception as failure:  # whatever a broken installation raises is what is to be shown
                        text = str(failure).partition("\n")[0]
                        yield case | {"passed": False, "error": f"{type(failure).__name__}: {text}"}
                    else:
                        yield case | {"passed": error <= allowed, "error": f"{error:.1e}"}


def _error(device: str, backend: str, dtype: torch.dtype) -> float:
    """Largest relative Frobenius error of outputs and gradients against the float64 definition."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 70, 2, 32, generator=generator) for _ in range(2))
    v, do = (torch.randn(1, 70, 4, 16, generator=generator) for _ in range(2))
    g, beta = -torch.rand(1, 70, 4, generator=generator), torch.rand(1, 70, 4, generator=generator)
    # Rounded once here: the error measured is the kernel's, not that of its inputs.
    q, k, v, beta, do = (x.to(dtype) for x in (q, k, v, beta, do))
    truth = _results(loop, [x.double() for x in (q, k, v, g, beta)], do.double())
    run = [x.to(device) for x in (q, k, v, g, beta)]
    actual = _results(gated_delta_rule, run, do.to(device), backend=backend)
    return max(float((a.cpu().double() - t).norm() / t.norm()) for a, t in zip(actual, truth, strict=True))


def _results(op, inputs: list[torch.Tensor], do: torch.Tensor, **options) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, state = op(*leaves, output_final_state=True, qk_l2norm=True, **options)
    return [o.detach(), state.detach(), *torch.autograd.grad([o], leaves, [do])]


def main(argv: Sequence[str] | None = None) -> int:
    """`memattn info [--json] [--check]`; 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="memattn info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="run a small op on every usable backend as well")
    options = parser.parse_args(argv)
    info = collect()
    if options.check:
        info["check"] = list(check())
    if options.json:
        print(json.dumps(info, indent=2))
    else:
        print(render(info))
        for row in info.get("check", ()):
            verdict = "ok" if row["passed"] else "FAILED"
            print(f"check {row['case']:24} {verdict}: error {row['error']}, allowed {row['allowed']:.0e}")
    return int(not all(row["passed"] for row in info.get("check", ())))
