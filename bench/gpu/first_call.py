"""What a user of a fresh process waits for: Triton compiles over many lengths, and what a small call costs the host.

Triton's cache is an empty folder here, so that every compile leaves a file. Run-time sizes must not be specialised: the
lengths below, packed and not, may need no kernel that the first of them did not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

_cache = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = _cache.name  # before Triton is imported

import torch  # noqa: E402
from support.cases import Case  # noqa: E402

from bench.gpu.recorder import record  # noqa: E402
from memattn import backends, ops  # noqa: E402

LENGTHS = (1, 63, 64, 2048, 2049)
ALLOWED = {"forward": 4, "forward and backward": 8}
HOST_MS = 0.15
CASE = Case("host", length=1024, heads=4, value_heads=4, key_dim=128, value_dim=128, state=False)


def compiles() -> int:
    """Kernels compiled so far."""
    return len(list(Path(_cache.name).rglob("*.cubin")))


def call(case: Case, grad: bool) -> None:
    """One forward, and a backward if wanted."""
    o, _ = ops.gated_delta_rule(**case.make(torch.bfloat16, "cuda", grad=grad))  # type: ignore[arg-type]
    if grad:
        o.sum().backward()


def count(grad: bool) -> dict[int, int]:
    """Compiles after each length."""
    after = {}
    for length in LENGTHS:
        call(replace(CASE, length=length), grad)
        call(replace(CASE, lengths=(length, 0, 5)), grad)
        after[length] = compiles()
    return after


def host_ms(calls: int = 200) -> dict[str, float]:
    """Time in which the host gets past a forward without grad, the GPU still working."""
    inputs = CASE.make(torch.bfloat16, "cuda")
    times = []
    with torch.no_grad():
        for i in range(calls + 20):
            if i % 10 == 0:
                torch.cuda.synchronize()  # so that the launch queue never fills
            start = time.perf_counter()
            ops.gated_delta_rule(**inputs)  # type: ignore[arg-type]
            times.append(1e3 * (time.perf_counter() - start))
    return {"min": min(times[20:]), "median": statistics.median(times[20:]), "allowed": HOST_MS}


def main() -> int:
    """Status 1 if there were none, or more compiles than allowed; the host's time is reported, not judged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    with backends.use_backend("triton"):
        counts = {"forward": count(grad=False), "forward and backward": count(grad=True)}
        found = {"compiles": counts, "allowed": ALLOWED, "host_ms": host_ms()}
    if path is not None:
        record(path, "first_call", found)
    print(found)
    return int(not all(0 < max(counts[name].values()) <= most for name, most in ALLOWED.items()))


if __name__ == "__main__":
    sys.exit(main())
