"""Reading long text with a constant amount of memory, scoring it byte by byte, and writing on from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.demo.interrupt import StopRequest
from memattn.demo.memory import resident_bytes
from memattn.demo.model import ByteModel

_START = 0  # the byte between files: what the model is given before the first byte of a text


@torch.no_grad()
def score(model: ByteModel, text: Tensor, chunk: int, state: list | None = None) -> Iterator[Tensor]:
    """Bits `[rows, <= chunk]` that each byte of `text [rows, T]` costs given all before it, the state carried along."""
    device = next(model.parameters()).device
    state = model.init_state(len(text)) if state is None else state
    previous = torch.full((len(text), 1), _START, device=device)
    for piece in text.split(chunk, dim=1):
        target = piece.to(device).long()
        logits, state = model(torch.cat((previous, target[:, :-1]), 1), state)
        previous = target[:, -1:]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        yield loss.view_as(target).cpu() / math.log(2)


@dataclass
class Bucket:
    """Bytes that had `first` to `last` bytes of context; `error` is the standard error over the rows."""

    first: int
    last: int
    bits: float
    error: float | None
    count: int


def by_position(bits: Tensor, smallest: int = 16) -> list[Bucket]:
    """Mean of bits `[rows, T]` over positions 0…15, 16…31, 32…63 and so on."""
    rows, length = bits.shape
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(smallest, 2 * edges[-1])))
    buckets = []
    for first, end in zip(edges, edges[1:], strict=False):
        means = bits[:, first:end].double().mean(1)
        error = float(means.std() / math.sqrt(rows)) if rows > 1 else None
        buckets.append(Bucket(first, end - 1, float(means.mean()), error, rows * (end - first)))
    return buckets


@dataclass
class Reading:
    """What reading `rows` texts of `length` bytes gave. `resident` are (bytes read per row, resident bytes) pairs."""

    rows: int
    length: int
    seconds: float = 0.0
    bits_per_byte: float = math.nan
    buckets: list[Bucket] = field(default_factory=list)
    resident: list[tuple[int, int]] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Resident bytes gained between the first tenth of the text and its end."""
        early = [size for place, size in self.resident if place * 10 <= self.length]
        return self.resident[-1][1] - (early or [self.resident[0][1]])[-1]


def read(
    model: ByteModel, text: Tensor, chunk: int, stop: StopRequest, on_chunk: Callable[[int, float], None]
) -> Reading:
    """Score `text [rows, T]` in chunks; `on_chunk(bytes read, bits per byte so far)` after each."""
    reading = Reading(*text.shape)
    bits = torch.empty(text.shape)
    done, total, start = 0, 0.0, time.perf_counter()
    for piece in score(model, text, chunk):
        bits[:, done : done + piece.shape[1]] = piece
        done += piece.shape[1]
        reading.resident.append((done, resident_bytes()))
        total += float(piece.sum())
        on_chunk(piece.numel(), total / (len(text) * done))
        stop.check()
    reading.seconds = time.perf_counter() - start
    reading.bits_per_byte = float(bits.double().mean())
    reading.buckets = by_position(bits)
    return reading


def mean_bits(model: ByteModel, texts: Tensor, rows: int, stop: StopRequest) -> float:
    """Mean bits per byte of `texts [n, T]`, each from an empty state, `rows` of them at a time."""
    total = 0.0
    for some in texts.split(rows):
        total += sum(float(bits.sum()) for bits in score(model, some, some.shape[1]))
        stop.check()
    return total / texts.numel()


@torch.no_grad()
def generate(model: ByteModel, prompt: bytes, count: int, *, temperature: float, seed: int) -> Iterator[int]:
    """`count` further bytes, one `step` each."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[_START, *prompt]], device=device)
    logits, state = model(tokens)
    logits = logits[:, -1]
    for _ in range(count):
        probabilities = torch.softmax(logits.float().cpu() / temperature, -1)
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        yield int(token)
        logits, state = model.step(token.to(device), state)
