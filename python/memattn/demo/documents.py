"""Held-out files read with memories of several sizes: the question of `--memory`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memattn.demo import stream
from memattn.demo.data import FILE_END
from memattn.demo.interrupt import StopRequest
from memattn.demo.model import ByteModel
from memattn.nn.memorizing_attention import MemorizingAttention


@dataclass
class SizePoint:
    """Bits per byte of the last bytes of each document, read with a memory of `size` tokens."""

    size: int
    documents: list[float]
    read: int  # bytes
    seconds: float

    @property
    def bits(self) -> float:
        return sum(self.documents) / len(self.documents)

    def gain(self, other: SizePoint) -> tuple[float, float | None]:
        """Bits per byte less than `other` on the same documents, and the standard error of that."""
        less = torch.tensor([b - a for a, b in zip(self.documents, other.documents, strict=True)], dtype=torch.double)
        return float(less.mean()), float(less.std() / len(less) ** 0.5) if len(less) > 1 else None


def long_documents(text: Tensor, length: int, most: int) -> Tensor:
    """The first `length` bytes of up to `most` files of the text that have as many: [files, length]."""
    ends = (text == FILE_END[0]).nonzero().flatten()
    starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])[: len(ends)]
    chosen = starts[ends - starts >= length][:most]
    if not len(chosen):
        raise ValueError(f"no held-out file has {length:,} bytes; --memory needs one to fill its largest memory")
    return text[chosen[:, None] + torch.arange(length)]


def set_memory_size(model: ByteModel, size: int) -> None:
    """The size of memories that are made from now on."""
    for block in model.layers():
        if isinstance(block.mixer, MemorizingAttention):
            block.mixer.memory_size = size


def by_memory_size(
    model: ByteModel, texts: Tensor, sizes: Sequence[int], scored: int, chunk: int, stop: StopRequest,
    on_chunk: Callable[[int, int], None],
) -> Iterator[SizePoint]:  # fmt: skip
    """Reads `texts [files, T]` once per size; bits per byte are those of the last `scored` bytes."""
    for size in sizes:
        set_memory_size(model, size)
        start, bits = time.perf_counter(), torch.empty(len(texts), 0)
        for piece in stream.score(model, texts, chunk):
            bits = torch.cat([bits, piece], 1)[:, -scored:]
            on_chunk(size, piece.numel())
            stop.check()
        yield SizePoint(size, bits.double().mean(1).tolist(), texts.numel(), time.perf_counter() - start)
