"""Memory-replay back-propagation: training through many segments with the activations of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Segment = Callable[[Any, Any], tuple[Tensor, Any]]


def memory_replay(segment: Segment, inputs: Sequence[Any], memory: Any) -> tuple[list[Tensor], Any]:
    """Σ_t loss_t differentiated through all segments, as if loss.backward() had been called on one long graph.

    `segment(inputs[t], memory) -> (loss, memory)` computes one segment; loss is a scalar tensor, memory a tensor, a
    MemoryState or any pytree of them (weight losses inside). Gradients are added to the `.grad` of every parameter
    that `segment` uses and of every leaf that the given memory depends on.

    Memformer's Algorithm 1 (Wu et al. 2020, arXiv 2010.06891): all segments run forward without a graph and only their
    memories are kept; then from the last to the first each is run again with a graph, and its loss and the memory it
    leaves are differentiated together, with the gradient that the next segment returned for that memory. Kept are the
    memories and one segment's activations; the cost is one more forward. Random states of the CPU and of the
    memory's CUDA devices are put back before each second run, so dropout draws the same again, and are left as after
    the first. What `segment` changes besides (running statistics) changes twice.

    Returns (losses, the memory after the last segment), both without gradient history.

    >>> losses, state = memory_replay(lambda x, state: loss_and_state(x, state), x.split(64, dim=1), state)
    >>> optimizer.step()
    """
    memories, losses, random = [_detached(memory)], [], []
    with torch.no_grad():
        for x in inputs:
            random.append(_random_states(memory))
            loss, after = segment(x, memories[-1])
            losses.append(_scalar(loss).detach())
            memories.append(_detached(after))
    last, incoming = memories.pop(), None
    with _restored(memory):
        for x, before, states in zip(reversed(inputs), reversed(memories), reversed(random), strict=True):
            leaves, spec = pytree.tree_flatten(before)
            leaves = [leaf.requires_grad_() if _differentiable(leaf) else leaf for leaf in leaves]
            _set_random_states(states)
            with torch.enable_grad():
                loss, after = segment(x, pytree.tree_unflatten(leaves, spec))
            _backward([loss], after, incoming)
            incoming = [leaf.grad if _differentiable(leaf) else None for leaf in leaves]
    if inputs:
        _backward([], memory, incoming)
    return losses, last


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _detached(memory: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, memory)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        received = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"memory_replay: segment returned a loss of {received}; expected a scalar tensor")
    return loss


def _backward(losses: list[Tensor], memory: Any, incoming: list[Tensor | None] | None) -> None:
    """Differentiates the losses and the memory, the latter with cotangents `incoming`, at once."""
    ends: list[tuple[Tensor, Tensor | None]] = [(loss, None) for loss in losses if loss.requires_grad]
    leaves = pytree.tree_leaves(memory)
    for leaf, gradient in zip(leaves, incoming or [None] * len(leaves), strict=True):
        if gradient is not None and _differentiable(leaf) and leaf.requires_grad:
            ends.append((leaf, gradient))
    if ends:
        tensors, gradients = zip(*ends, strict=True)
        torch.autograd.backward(tensors, gradients)


def _devices(memory: Any) -> list[torch.device]:
    return list({x.device for x in pytree.tree_leaves(memory) if isinstance(x, Tensor) and x.is_cuda})


def _random_states(memory: Any) -> list[tuple[torch.device | None, Tensor]]:
    states: list[tuple[torch.device | None, Tensor]] = [(None, torch.get_rng_state())]
    return states + [(device, torch.cuda.get_rng_state(device)) for device in _devices(memory)]


def _set_random_states(states: list[tuple[torch.device | None, Tensor]]) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _restored(memory: Any) -> Iterator[None]:
    states = _random_states(memory)
    try:
        yield
    finally:
        _set_random_states(states)
