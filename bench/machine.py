"""Where and with what a figure was measured; stored with every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from memattn import __version__, _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("triton", "transformers", "flash-linear-attention", "numpy")
BUILD = ("built", "torch", "cxx", "nvcc", "cuda_archs", "commit")
FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
SWITCHES = ("FLA_", "MEMATTN_", "TRITON_", "OMP_", "MKL_", "THP_", "CUDA_VISIBLE_DEVICES")


def output_of(*command: str) -> str:
    """Standard output of a command in the repository, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu() -> dict[str, Any]:
    """Processor, cores and the instruction sets that matter here."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "model": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in FLAGS if flag in flags],
        "load": os.getloadavg()[0],
    }


def gpu() -> dict[str, Any] | None:
    """The GPU, its driver and its clocks now; None without one."""
    if not torch.cuda.is_available():
        return None
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return {
        "name": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        query: output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
    }


def versions() -> dict[str, str]:
    """Of Python, torch, ourselves and whatever of PACKAGES is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "memattn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """Variables that may change a time."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(SWITCHES)}


def describe() -> dict[str, Any]:
    """Everything, as stored in the JSON results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "rev-parse", "--short=12", "HEAD"),
        "changed": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu(),
        "gpu": gpu(),
        "versions": versions(),
        "build": {k: v for k, v in _native.build_info().items() if k in BUILD},
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "environment": environment(),
    }


def one_line(info: dict[str, Any]) -> str:
    """For people: the machine and the versions."""
    chip = info["gpu"]["name"] if info["gpu"] else f"{info['cpu']['model']}, {info['cpu']['threads']} threads"
    isa = "" if info["gpu"] else f" ({', '.join(info['cpu']['isa'])})"
    software = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    commit = info["commit"] + (" with changes" if info["changed"] else "")
    return f"{chip}{isa}; {software}; commit {commit}; {info['date']}"
