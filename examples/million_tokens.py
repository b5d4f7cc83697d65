"""Facts planted in a stream of a million tokens, found again by retrieval from a memory that may not hold the stream.

    python examples/million_tokens.py                2^20 tokens: 4 GiB of keys and values within 512 MiB
    python examples/million_tokens.py --smoke        2^14 tokens

One layer of 8 key heads of 128 in bfloat16. Keys and values go to a `KVPool` over host memory and a mapped file as they
come; beside it stay the means of the blocks (`block_summary`). A question scores the means (`block_scores`), selects
blocks (`topk`), has their pages brought in (`KVPool.gather`) and attends to them (`sparse_attention`), as many steps as
an answer has tokens. What is read must be the fact, bit for bit of its code. The exit status is 1 if a fact is missed
or the memory goes over the budget.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from memattn import KVPool  # noqa: E402
from memattn.ops import block_scores, block_summary, sparse_attention, topk  # noqa: E402

HEADS, KEY_HEADS, DIM, PAGE = 32, 8, 128, 64
SELECTED = 32  # pages of a step, the first and the two last among them
FACT = 16  # tokens that say one fact; they may lie across two pages
QUERY_NOISE = 0.5  # deviation of a query from the fact's key, in units of the key's own


@dataclass(frozen=True)
class Size:
    """What is asked of the memory. device, host: bytes of the pool's tiers."""

    tokens: int
    facts: int
    steps: int  # of an answer
    chunk: int  # tokens that arrive at once
    budget: int
    device: int
    host: int


FULL = Size(1 << 20, facts=100, steps=4, chunk=4096, budget=512 << 20, device=64 << 20, host=128 << 20)
SMOKE = Size(1 << 14, facts=10, steps=2, chunk=512, budget=60 << 20, device=9 << 20, host=8 << 20)


@dataclass(frozen=True)
class Facts:
    """begins [n] first tokens; keys [n, HKV, D] what a fact is asked by; codes [n, HKV, D] of ±1 what it says."""

    begins: Tensor
    keys: Tensor
    codes: Tensor

    @classmethod
    def spread(cls, size: Size, noise: torch.Generator) -> Facts:
        """One at a random place of each of equal stretches of the stream."""
        stretch = size.tokens // size.facts
        begins = torch.arange(size.facts) * stretch + torch.randint(stretch - FACT, (size.facts,), generator=noise)
        keys, codes = torch.randn(2, size.facts, KEY_HEADS, DIM, generator=noise)
        return cls(begins, keys, codes.sign())

    def write(self, k: Tensor, v: Tensor, first: int) -> None:
        """Puts those of tokens first .. first + T − 1 into k, v [T, HKV, D]."""
        places = self.begins[:, None] + torch.arange(FACT) - first
        fact, at = ((places >= 0) & (places < len(k))).nonzero(as_tuple=True)
        rows = places[fact, at]
        k[rows], v[rows] = self.keys[fact].to(k.dtype), self.codes[fact].to(v.dtype)


class Memory:
    """Resident memory of this process beyond what there was at the start."""

    def __init__(self) -> None:
        self.start = self._now()
        self.most = {"anonymous": 0, "mapped": 0, "together": 0}

    @staticmethod
    def _now() -> dict[str, int]:
        """Bytes by the kernel's names."""
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}

    def look(self) -> None:
        """The most so far: anonymous pages (the pool's upper tiers too) and pages of mapped files when looked at, both
        together at any time (from the high-water mark)."""
        now, start = self._now(), self.start
        found = {
            "anonymous": now["RssAnon"] - start["RssAnon"],
            "mapped": now["RssFile"] + now["RssShmem"] - start["RssFile"] - start["RssShmem"],
            "together": now["VmHWM"] - start["VmRSS"],
        }
        self.most = {name: max(self.most[name], count) for name, count in found.items()}


def read_stream(pool: KVPool, facts: Facts, size: Size, noise: torch.Generator, memory: Memory) -> Tensor:
    """Appends all tokens. Returns the means of the pages' keys, [1, pages, HKV, D]."""
    means = torch.empty(1, size.tokens // PAGE, KEY_HEADS, DIM, dtype=torch.bfloat16)
    for first in range(0, size.tokens, size.chunk):
        k, v = torch.randn(2, size.chunk, KEY_HEADS, DIM, generator=noise, dtype=torch.bfloat16)
        facts.write(k, v, first)
        pool.append(0, k[None], v[None])
        means[:, first // PAGE : (first + size.chunk) // PAGE] = block_summary(k[None], PAGE, mode="mean").values
        memory.look()
    return means


def retrieve(pool: KVPool, means: Tensor, q: Tensor) -> Tensor:
    """One step: q [1, 1, HQ, D] -> o [1, 1, HQ, D]. All heads read the same pages."""
    scores = block_scores(q, means, over="heads", reduce="mean", force_first=1, force_last=2)
    pages = topk(scores, SELECTED).indices
    found = pool.gather(0, pages)
    return sparse_attention(q, found.k, found.v, pages, unit=PAGE, page_table=found.page_table).o


def answers(pool: KVPool, means: Tensor, facts: Facts, size: Size, noise: torch.Generator, memory: Memory) -> Tensor:
    """[n] bool: facts that every step of their answer read without a wrong bit, asked in random order."""
    right = torch.ones(size.facts, dtype=torch.bool)
    for fact in torch.randperm(size.facts, generator=noise).tolist():
        key, code = (x[fact].repeat_interleave(HEADS // KEY_HEADS, 0) for x in (facts.keys, facts.codes))
        for _ in range(size.steps):
            q = key + QUERY_NOISE * torch.randn(HEADS, DIM, generator=noise)
            o = retrieve(pool, means, q[None, None].bfloat16())[0, 0]
            right[fact] &= bool((o.float().sign() == code).all())
            memory.look()
    return right


def by_depth(right: Tensor, facts: Facts, tokens: int) -> str:
    """Facts found in each tenth of the stream."""
    tenth = (facts.begins * 10 // tokens).clamp_max(9)
    lines = []
    for depth in range(10):
        here = right[tenth == depth]
        lines.append(f"  {10 * depth:3}..{10 * depth + 10:3} %   {int(here.sum()):3} of {len(here)}")
    return "\n".join(lines)


def mib(count: float) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.1f} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a fact is missed or the budget broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="2^14 tokens")
    parser.add_argument("--folder", type=Path, help="where the mapped file is made; default: the temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    size = SMOKE if options.smoke else FULL
    noise = torch.Generator().manual_seed(options.seed)
    facts = Facts.spread(size, noise)
    memory = Memory()
    pool = KVPool(
        1, KEY_HEADS, DIM, page_size=PAGE, dtype=torch.bfloat16, device_bytes=size.device, host_bytes=size.host,
        folder=options.folder or tempfile.gettempdir(),
    )  # fmt: skip
    stored = size.tokens * KEY_HEADS * DIM * 2 * torch.bfloat16.itemsize
    print(f"{size.tokens:,} tokens, {mib(stored)} of keys and values, {size.facts} facts; budget {mib(size.budget)}")
    start = time.perf_counter()
    means = read_stream(pool, facts, size, noise, memory)
    written, start = time.perf_counter() - start, time.perf_counter()
    right = answers(pool, means, facts, size, noise, memory)
    asked, questions = time.perf_counter() - start, size.facts * size.steps
    print(
        f"appended in {written:.1f} s, {questions} retrievals in {asked:.1f} s ({1e3 * asked / questions:.1f} ms each)"
    )
    traffic = pool.traffic()
    print(f"pages asked for that were on the device: {100 * traffic['hit_rate']:.1f} %")
    for way in sorted(name for name in traffic if " to " in name):
        print(f"moved, {way}: {mib(traffic[way])}")
    print("held by the pool: " + ", ".join(f"{name} {mib(count)}" for name, count in pool.memory().items()))
    print("most memory beyond the start: " + ", ".join(f"{name} {mib(x)}" for name, x in memory.most.items()))
    print(f"facts found, by depth:\n{by_depth(right, facts, size.tokens)}")
    within = memory.most["together"] <= size.budget
    print(f"{int(right.sum())} of {size.facts} facts found; {'within' if within else 'OVER'} the budget")
    return int(not (within and bool(right.all())))


if __name__ == "__main__":
    sys.exit(main())
