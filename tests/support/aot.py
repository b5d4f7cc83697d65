"""Compiles every kernel of an op for a GPU that is not there, and reads what the compiler made of it.

What is compiled stands in support/launches.py.

A fake driver tells Triton which architecture it serves; a launch then compiles and does not run. The real launchers run
on meta tensors, so what is compiled is exactly what a GPU would be given: pinned configurations, pointer alignment,
scalar specialisation. Must run in a process without TRITON_INTERPRET; `report` starts one.

    python tests/support/aot.py --op gated_delta_rule --arch 90 --dtype bfloat16 --case 128x128    one line per kernel
    python tests/support/aot.py --op gated_delta_rule --count     distinct kernels over lengths and layouts
    python tests/support/aot.py --op gated_delta_rule --update    rewrite its part of budgets.json for this Triton
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
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.launches import OPS  # noqa: E402

TESTS = Path(__file__).resolve().parents[1]
BUDGETS = TESTS / "budgets.json"
ARCHS = (80, 90, 100)
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


def kernels(op: str, arch: int, dtype: str, case: str) -> dict[str, dict]:
    """Resources of every kernel of a training step; one compiled in several forms is numbered from its second on."""
    with compile_only(arch) as compiled:
        OPS[op].step(dtype, case)
    found: dict[str, dict] = {}
    hashes: dict[str, list] = {}
    for name, kernel, seconds in compiled:
        forms = hashes.setdefault(name, [])
        if kernel.hash not in forms:
            forms.append(kernel.hash)
            form = name if len(forms) == 1 else f"{name} {len(forms)}"
            found[form] = resources(kernel) | {"seconds": round(seconds, 2)}
    return found


def count_compiles(op: str, arch: int) -> dict[str, int]:
    """Distinct kernels of one training step, and of steps with every option that only changes sizes and flags."""
    launches, counts = OPS[op], {}
    dtype, case = launches.quick[0]
    for name, options in (("one", ({},)), ("all", ({}, *launches.same_kernels))):
        with compile_only(arch) as compiled:
            for option in options:
                launches.step(dtype, case, **option)
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


def key(op: str, arch: int, dtype: str, case: str) -> str:
    return f"{op} sm{arch} {dtype} {case}"


def load_budgets() -> dict[str, dict]:
    """Case -> kernel -> budget, for this Triton; empty where none is recorded."""
    return json.loads(BUDGETS.read_text()).get(version(), {})


def worse(found: dict, budget: dict) -> list[str]:
    """What a kernel uses beyond its budget."""
    more = [f"{n} {found[n]} > {budget[n]}" for n in LESS_IS_BETTER if found[n] > budget[n]]
    return more + [f"{n} {found.get(n, 0)} < {budget[n]}" for n in MORE_IS_BETTER if found.get(n, 0) < budget.get(n, 0)]


def update_budgets(op: str, archs: Iterable[int], dtypes: Iterable[str], cases: Iterable[str]) -> None:
    """Record what this Triton makes of an op's cases, one kernel a line."""
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    kept = (*LESS_IS_BETTER, *MORE_IS_BETTER)
    for arch, dtype, case in product(archs, dtypes, cases):
        found = kernels(op, arch, dtype, case)
        recorded = {name: {n: x[n] for n in kept if n in x} for name, x in found.items()}
        budgets.setdefault(version(), {})[key(op, arch, dtype, case)] = recorded
    text = json.dumps(budgets, indent=1)
    BUDGETS.write_text(re.sub(r"\{\s+(\"registers\"[^{}]*?)\s+\}", _one_line, text) + "\n")


def _one_line(match: re.Match) -> str:
    return "{" + " ".join(match[1].split()) + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHS)
    parser.add_argument("--dtype", nargs="*")
    parser.add_argument("--case", nargs="*")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    launches = OPS[args.op]
    if args.update:
        update_budgets(args.op, args.arch or ARCHS, args.dtype or launches.dtypes, args.case or launches.cases)
        return
    for arch in args.arch or [90]:
        if args.count:
            print(json.dumps({"arch": arch, **count_compiles(args.op, arch)}), flush=True)
            continue
        pairs = product(args.dtype, args.case) if args.dtype and args.case else launches.quick
        for dtype, case in pairs:
            for name, found in kernels(args.op, arch, dtype, case).items():
                print(json.dumps({"case": key(args.op, arch, dtype, case), "kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main()
