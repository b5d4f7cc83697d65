"""Speed and memory of the model against the same model with softmax attention, as the context grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memattn.demo.interrupt import StopRequest
from memattn.demo.memory import PeakMemory
from memattn.demo.mixers import FullAttention, GrowingCache
from memattn.demo.model import ByteModel

_LONG_ENOUGH = 0.25  # seconds: shorter prefills are repeated up to this


@dataclass
class Point:
    """One context length in bytes. `peak` is the most memory held while reading, beyond the model itself."""

    context: int
    prefill_seconds: float | None
    peak: int | None
    decode_seconds: float
    state: int


@dataclass
class Comparison:
    memory: list[Point] = field(default_factory=list)
    softmax: list[Point] = field(default_factory=list)
    stopped: str | None = None


@dataclass(frozen=True)
class ComparisonConfig:
    contexts: tuple[int, ...] = tuple(1024 << i for i in range(7))
    chunk: int = 4096
    decode_steps: int = 64
    softmax_seconds: float = 45.0


def state_bytes(state: list[Any]) -> int:
    """Memory of what has to be kept between two tokens."""
    leaves = [layer.filled() if isinstance(layer, GrowingCache) else layer for layer in state]
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(leaves) if isinstance(t, Tensor))


@torch.no_grad()
def prefill(model: ByteModel, tokens: Tensor, chunk: int | None) -> tuple[Tensor, list[Any]]:
    """Logits of the last position and the state after `tokens [1, T]`, read in chunks, or in one piece (None)."""
    state = model.init_state(len(tokens))
    for piece in tokens.split(chunk or tokens.shape[1], dim=1):
        hidden, state = model.hidden(piece, state)
    return model.logits(hidden[:, -1]), state


@torch.no_grad()
def decode_seconds(model: ByteModel, state: list[Any], steps: int, device: torch.device) -> float:
    """Median time of one step."""
    times, token = [], torch.zeros(1, dtype=torch.long, device=device)
    for _ in range(steps):
        start = time.perf_counter()
        logits, state = model.step(token, state)
        token = logits.argmax(-1)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(
    model: ByteModel,
    softmax: ByteModel,
    text: Tensor,
    config: ComparisonConfig,
    stop: StopRequest,
    on_point: Callable[[Comparison], None],
) -> Comparison:
    """Each context length for both models, shortest first. Softmax prefill ends when its seconds are used up."""
    result, device = Comparison(), next(model.parameters()).device
    spent, last, before = 0.0, 0.0, 0.0
    for context in config.contexts:
        tokens = text[None, :context].long().to(device)
        result.memory.append(_measure(model, tokens, config, config.chunk))
        on_point(result)
        stop.check()
        if result.stopped is None:
            expected = last * min(4.0, last / before) if before else 0.0  # the quadratic part at most quadruples
            if spent + expected > config.softmax_seconds:
                result.stopped = (
                    f"softmax prefill stopped before {context:,} bytes: about {expected:.0f} s, with "
                    f"{config.softmax_seconds - spent:.0f} s of its {config.softmax_seconds:.0f} s left"
                )
        point = _measure(softmax, tokens, config, None, reads=result.stopped is None)
        result.softmax.append(point)
        before, last = last, point.prefill_seconds or 0.0
        spent += last
        on_point(result)
        stop.check()
    return result


def _measure(
    model: ByteModel, tokens: Tensor, config: ComparisonConfig, chunk: int | None, reads: bool = True
) -> Point:
    seconds, peak = _prefill_cost(model, tokens, chunk) if reads else (None, None)
    state = _state_after(model, tokens, chunk, config.decode_steps)
    kept = state_bytes(state)
    return Point(tokens.shape[1], seconds, peak, decode_seconds(model, state, config.decode_steps, tokens.device), kept)


def _prefill_cost(model: ByteModel, tokens: Tensor, chunk: int | None) -> tuple[float, int]:
    """Best time, and the most memory held by one call. Short calls are repeated, as the first one also warms up."""
    times: list[float] = []

    def once() -> None:
        start = time.perf_counter()
        prefill(model, tokens, chunk)
        _wait(tokens.device)
        times.append(time.perf_counter() - start)

    with PeakMemory(tokens.device) as memory:
        once()
    if times[0] < _LONG_ENOUGH:
        while sum(times) < _LONG_ENOUGH:
            once()
        with PeakMemory(tokens.device) as memory:
            once()
    return min(times), memory.bytes


def _state_after(model: ByteModel, tokens: Tensor, chunk: int | None, room: int) -> list[Any]:
    """A real state where reading is cheap; random numbers in the caches of full attention."""
    mixers = [block.mixer for block in model.layers()]
    if not any(isinstance(mixer, FullAttention) for mixer in mixers):
        return prefill(model, tokens, chunk)[1]
    _, state = prefill(model, tokens[:, -model.config.window :], chunk)
    return [
        mixer.random_cache(len(tokens), tokens.shape[1], room) if isinstance(mixer, FullAttention) else old
        for mixer, old in zip(mixers, state, strict=True)
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
