"""The CUDA backend on CPU tensors: csrc/cuda compiled with g++ against cuda_on_host/, which says what that can show."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memattn import backends

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cuda_on_host"
FLAGS = (
    "-std=c++20 -O1 -shared -fPIC -fvisibility=hidden -Wno-unknown-pragmas -DUSE_CUDA "
    "-DTORCH_TARGET_VERSION=0x020b000000000000 "
    # A misaligned vector access, and an index outside an array of the kernel's own, ends the process.
    "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error"
).split()


def _read(*folders: Path) -> bytes:
    files = sorted(p for f in folders for p in f.rglob("*.*") if p.suffix in (".h", ".cuh"))
    return b"".join(p.read_bytes() for p in files)


def build(source: Path, folder: Path) -> Path:
    """The shared library of one .cu file, kept under a name that its contents, headers and flags decide."""
    root = Path(torch.__file__).parent
    libraries = ["-Wl,--no-as-needed", f"-L{root}/lib", "-ltorch_cpu"]
    command = [
        os.environ.get("CXX", "g++"),
        *FLAGS,
        f"-I{HERE}",
        "-isystem",
        f"{root}/include",
        "-xc++",
        str(source),
        "-xnone",
        *libraries,
    ]
    headers = _read(ROOT / "csrc/cuda", ROOT / "csrc/common", HERE)
    key = hashlib.sha256(repr((command, torch.__version__)).encode() + headers + source.read_bytes()).hexdigest()[:16]
    target = folder / f"{source.stem}-{key}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


@functools.cache
def load(name: str) -> None:
    """Register the CUDA kernels of csrc/cuda/`name`.cu for CPU tensors, in this process for good."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no g++ to compile the CUDA sources for the host")
    torch.ops.load_library(str(build(ROOT / f"csrc/cuda/{name}.cu", ROOT / "build/cuda_on_host")))


def enable(monkeypatch: pytest.MonkeyPatch, source: str, *ops: str) -> None:
    """Within a test, backend "cuda" of `ops`, whose kernels are in csrc/cuda/`source`.cu, takes CPU tensors."""
    load(source)
    for op in ops:
        table = backends.registry()[op]
        limits = replace(table["cuda"], devices=("cuda", "cpu"), available=backends.always)
        monkeypatch.setitem(table, "cuda", limits)


def ready(monkeypatch: pytest.MonkeyPatch, device: str, source: str, *ops: str) -> None:
    """Backend "cuda" of `ops` takes tensors of `device`: compiled kernels on a GPU, the same sources on the host."""
    if device == "cpu":
        return enable(monkeypatch, source, *ops)
    for op in ops:
        if reasons := backends.why_not(op, "cuda", backends.Request(device, torch.float32)):
            pytest.skip(f"cuda: {'; '.join(reasons)}")
