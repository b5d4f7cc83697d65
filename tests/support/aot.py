"""Compiles every kernel of an op for a GPU that is not there, and reads what the compiler made of it.

A fake driver tells Triton which architecture it serves; a launch then compiles and does not run. The real launchers run
on meta tensors, so what is compiled is exactly what a GPU would be given: pinned configurations, pointer alignment,
scalar specialisation. Must run in a process without TRITON_INTERPRET; `report` starts one.

    python tests/support/aot.py --arch 90 --dtype bfloat16 --dims 128x128     one JSON object per compiled kernel
    python tests/support/aot.py --arch 90 --count                             distinct compiles over lengths and options
    python tests/support/aot.py --update                                      rewrite budgets.json for this Triton
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
BUDGETS = TESTS / "budgets.json"
ARCHS = (80, 90, 100)
DTYPES = ("bfloat16", "float16", "float32", "tf32")  # tf32: float32 where torch's own matmul may use TF32
DIMS = ("64x64", "128x128", "256x256")
SHARED_LIMIT = {
    80: 101376,
    90: 232448,
    100: 232448,
}  # bytes a block may have; sm80's file also serves 8.6, 8.9 and 12.x
COUNTED = ("HGMMA", "UTCHMMA", "HMMA")  # wgmma (9.x), tcgen05 (10.x), mma.sync
LESS_IS_BETTER = ("registers", "stack", "spills", "shared")
MORE_IS_BETTER = ("HGMMA", "UTCHMMA")


class FakeDriver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches per device; another architecture must not find these kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list]:
    """Inside, launching a kernel compiles it; yields the growing list of (name, compiled kernel, seconds)."""
    import triton

    compiled: list = []

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            start = time.perf_counter()
            compiled.append((kernel.__name__, kernel.warmup(*args, grid=(1,), **kwargs), time.perf_counter() - start))

        return launch

    interface = triton.runtime.jit.KernelInterface
    original = interface.__getitem__
    triton.runtime.driver.set_active(FakeDriver(capability))
    interface.__getitem__ = getitem
    try:
        yield compiled
    finally:
        interface.__getitem__ = original
        triton.runtime.driver._active = None  # reset_active would look for a real one


def resources(kernel) -> dict[str, int]:
    """Registers, stack, local loads and stores, shared memory and tensor-core instructions of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    found = {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "double": len(re.findall(r"\.f64", kernel.asm["ptx"])),
    }
    return found | {name: count for name in COUNTED if (count := len(re.findall(rf"\b{name}\b", sass)))}


def gated_delta_rule(
    dtype: str, K: int, V: int, *, T: int = 256, H: int = 2, HV: int = 4, chunk_size: int = 64, packed: bool = False,
    state: bool = True, train: bool = True, l2norm: bool = True,
) -> None:  # fmt: skip
    """One forward call on meta tensors, and with `train` the backward call that follows it."""
    import torch

    from memattn.kernels.gated_delta_rule import forward
    from memattn.kernels.gated_delta_rule_backward import backward

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    kind, N = torch.float32 if dtype == "tf32" else getattr(torch, dtype), 3 if packed else 1
    q, k, v = (empty(1, T, heads, dim, dtype=kind) for heads, dim in ((H, K), (H, K), (HV, V)))
    g, beta = empty(1, T, HV), empty(1, T, HV, dtype=kind)
    initial = empty(N, HV, K, V) if state else None
    bounds = empty(N + 1, dtype=torch.int32) if packed else None
    inputs, settings = (q, k, v, g, beta, initial, bounds), (K**-0.5, l2norm, chunk_size, 8)
    o, final, solve, states = forward(*inputs, *settings, state, train)
    if train:
        backward(torch.empty_like(o), final if state else None, *inputs, solve, states, *settings)


def kernels(arch: int, dtype: str, K: int, V: int, chunk_size: int = 64) -> dict[str, dict]:
    """Resources of every kernel of a training step."""
    with compile_only(arch) as compiled:
        gated_delta_rule(dtype, K, V, chunk_size=chunk_size)
    found: dict[str, dict] = {}
    for name, kernel, seconds in compiled:
        if name not in found:  # the forward's launch is the one that compiled it
            found[name] = resources(kernel) | {"seconds": round(seconds, 2)}
    return found


def count_compiles(arch: int, dtype: str = "bfloat16", K: int = 128, V: int = 128) -> dict[str, int]:
    """Distinct kernels compiled by forward calls, and by forward and backward, over lengths and options."""
    counts = {}
    for name, train in (("forward", False), ("training", True)):
        with compile_only(arch) as compiled:
            for T in (1, 63, 64, 2048, 2049):
                for packed in (False, True):
                    for state in (False, True):
                        gated_delta_rule(dtype, K, V, T=T, packed=packed, state=state, train=train)
        counts[name] = len({kernel.hash for _, kernel, _ in compiled})
    return counts


def report(*arguments: str) -> list[dict]:
    """Run this file in a process of its own and return the objects it prints."""
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "python"), str(TESTS), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=env)
    if run.returncode:
        raise RuntimeError(f"compile-only run {' '.join(arguments)} failed:\n{run.stderr[-4000:]}")
    return [json.loads(line) for line in run.stdout.splitlines()]


# --- budgets ----------------------------------------------------------------------------------------------------------


def version() -> str:
    """Triton's minor version: budgets differ between them."""
    from importlib.metadata import version

    return ".".join(version("triton").split(".")[:2])


def key(arch: int, dtype: str, K: int, V: int) -> str:
    return f"sm{arch} {dtype} {K}x{V}"


def load_budgets() -> dict[str, dict]:
    """Case -> kernel -> budget, for this Triton; empty where none is recorded."""
    return json.loads(BUDGETS.read_text()).get(version(), {})


def worse(found: dict, budget: dict) -> list[str]:
    """What a kernel uses beyond its budget."""
    more = [f"{n} {found[n]} > {budget[n]}" for n in LESS_IS_BETTER if found[n] > budget[n]]
    return more + [f"{n} {found.get(n, 0)} < {budget[n]}" for n in MORE_IS_BETTER if found.get(n, 0) < budget.get(n, 0)]


def update_budgets() -> None:
    """Record what this Triton makes of every case, one kernel a line."""
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    kept = (*LESS_IS_BETTER, *MORE_IS_BETTER)
    budgets[version()] = {
        key(arch, dtype, K, V): {
            name: {n: found[n] for n in kept if n in found} for name, found in kernels(arch, dtype, K, V).items()
        }
        for arch in ARCHS
        for dtype in DTYPES
        for K, V in (tuple(map(int, dims.split("x"))) for dims in DIMS)
    }
    text = json.dumps(budgets, indent=1)
    BUDGETS.write_text(re.sub(r"\{\s+(\"registers\"[^{}]*?)\s+\}", _one_line, text) + "\n")


def _one_line(match: re.Match) -> str:
    return "{" + " ".join(match[1].split()) + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=[90])
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--dims", nargs="*", default=["128x128"], help="KxV")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    if args.update:
        update_budgets()
        return
    for arch in args.arch:
        if args.count:
            print(json.dumps({"arch": arch, **count_compiles(arch)}), flush=True)
            continue
        for dtype in args.dtype:
            for dims in args.dims:
                K, V = map(int, dims.split("x"))
                for name, found in kernels(arch, dtype, K, V, args.chunk).items():
                    print(json.dumps({"case": key(arch, dtype, K, V), "kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main()
