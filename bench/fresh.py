"""Facts that need a process of their own: import time, peak memory of one call on the CPU.

    python bench/fresh.py peak --op gated_delta_rule --mode fwd --case 0 --name "memattn cpu"

`peak` prints JSON: the most memory the process held during one call, above what it held before, less the results.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.contest import Choice

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {"torch": "import torch", "torch and memattn": "import torch, memattn"}
TIMED_IMPORT = """
import sys, time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start, int("triton" in sys.modules), int("torch._dynamo" in sys.modules))
"""


def environment() -> dict[str, str]:
    """This process's, with the source tree importable."""
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def import_times(repeats: int = 7) -> dict[str, Any]:
    """Seconds of `import torch` with and without memattn, taking turns; the first turn only warms the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    loaded = {}
    for turn in range(repeats + 1):
        for name, statement in IMPORTS.items():
            command = [sys.executable, "-c", TIMED_IMPORT.format(statement=statement)]
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout.split()
            loaded[name] = {"triton": bool(int(out[1])), "torch._dynamo": bool(int(out[2]))}
            if turn:
                seconds[name].append(float(out[0]))
    rows = {name: {"min_s": min(s), "median_s": statistics.median(s), **loaded[name]} for name, s in seconds.items()}
    extra = rows["torch and memattn"]["min_s"] - rows["torch"]["min_s"]
    return {"imports": rows, "extra_s": extra, "allowed_s": 0.3, "repeats": repeats}


def status_kib(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def give_back_free_memory() -> None:
    """To the system: scratch taken from what drawing the inputs left in the heap would not be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def tensors(x: Any) -> Iterator[Any]:
    """All tensors of a result."""
    import torch

    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        for y in x.values():
            yield from tensors(y)


def peak(op: str, mode: str, case: int, name: str, dtype: str, wheel: Path | None) -> dict[str, Any]:
    """Peak memory of one call of one candidate, in MiB. A tiny call first loads code and starts threads."""
    import torch

    from bench import candidates, registry

    entry = registry.load(op)
    kind = registry.DTYPES[dtype]
    found = candidates.all_of(entry, mode, "cpu", kind, "all", wheel)
    call = next(c.call for c in found if isinstance(c, candidates.Candidate) and c.name == name)
    _, shape = entry.shapes("cpu", mode)[case]
    tiny = entry.inputs(entry.tiny(shape), mode, kind, "cpu", 1)
    given = entry.inputs(shape, mode, kind, "cpu", 0)
    call(tiny)
    give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status_kib("VmRSS")
    results = call(given)
    above = (status_kib("VmHWM") - before) * 1024
    kept = sum(x.nbytes for x in tensors(results) if all(x is not y for y in given.values()))
    return {
        "op": op, "name": name, "mode": mode, "shape": shape.name, "dtype": dtype, "threads": torch.get_num_threads(),
        "above_mib": above / 2**20, "results_mib": kept / 2**20, "extra_mib": (above - kept) / 2**20,
    }  # fmt: skip


def peak_in_fresh_process(**arguments: Any) -> dict[str, Any]:
    """`peak` in a new process; a failure becomes a row with its reason."""
    options = [x for k, v in arguments.items() if v is not None for x in (f"--{k}", str(v))]
    command = [sys.executable, str(Path(__file__)), "peak", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"op": arguments["op"], "name": arguments["name"], "mode": arguments["mode"], "error": error}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def facts(choice: Choice) -> dict[str, Any]:
    """Import times, and on a CPU peak memory of the first shape and two long ones for everybody who takes part."""
    from bench import candidates, registry

    memory = []
    for op in choice.ops if choice.device == "cpu" else ():  # a GPU's rows have their own figure
        entry = registry.load(op)
        for mode in (m for m in choice.modes if m in entry.modes and m != "step"):
            everyone = candidates.all_of(
                entry, mode, choice.device, registry.DTYPES["float32"], choice.backend, choice.wheel
            )
            names = [c.name for c in everyone if isinstance(c, candidates.Candidate)]
            long = [i for i, (group, _) in enumerate(entry.shapes(choice.device, mode)) if group == "long"]
            for case, name in itertools.product([0, *long[2:5:2]], names):
                arguments = {"op": op, "mode": mode, "case": case, "name": name}
                memory.append(peak_in_fresh_process(**arguments, wheel=choice.wheel))
    return {"import": import_times(), "memory": memory}


def main() -> None:
    """Print one fact as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fact", choices=["peak", "import"])
    parser.add_argument("--op", default="gated_delta_rule")
    parser.add_argument("--mode", default="fwd")
    parser.add_argument("--case", type=int, default=0, help="index into the op's shapes for this device and mode")
    parser.add_argument("--name", default="memattn cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--wheel", type=Path)
    options = vars(parser.parse_args())
    if options.pop("fact") == "import":
        print(json.dumps(import_times()))
    else:
        print(json.dumps(peak(**options)))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    main()
