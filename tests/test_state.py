"""MemoryState: a pytree of tensors whose rows are sequences."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from memattn.state import MemoryState


class Pair(MemoryState):
    fields = ("matrix", "tail")

    def __init__(self, matrix, tail):
        self.matrix, self.tail = matrix, tail


class Nested(MemoryState):
    fields = ("inner", "best")

    def __init__(self, inner, best):
        self.inner, self.best = inner, best

    def _fresh(self, name, tensor):
        return tensor.new_full((), -torch.inf)


def pair(batch=4, grad=False):
    return Pair(torch.randn(batch, 2, 3, requires_grad=grad), torch.randn(batch, 5, requires_grad=grad))


def equal(a, b):
    (a, a_spec), (b, b_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return a_spec == b_spec and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_pytree_with_keys():
    state = Nested(pair(), torch.zeros(4))
    paths = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path({"s": state})[0]}
    assert list(paths) == ["['s'].inner.matrix", "['s'].inner.tail", "['s'].best"]
    assert paths["['s'].inner.tail"] is state.inner.tail
    doubled = pytree.tree_map(lambda x: 2 * x, state)
    assert type(doubled) is Nested and type(doubled.inner) is Pair
    assert torch.equal(doubled.inner.matrix, 2 * state.inner.matrix)


def test_detach_and_clone():
    state = pair(grad=True)
    detached, cloned = state.detach(), state.clone()
    assert not detached.matrix.requires_grad and detached.matrix.data_ptr() == state.matrix.data_ptr()
    assert cloned.matrix.requires_grad and cloned.matrix.data_ptr() != state.matrix.data_ptr()
    assert equal(cloned.detach(), state.detach())
    assert (state.batch, Nested(state, None).batch) == (4, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_reorder(dtype):
    state, rows = pair(), torch.tensor([3, 0, 0], dtype=dtype)
    picked = state.reorder(rows)
    assert picked.batch == 3
    assert torch.equal(picked.matrix, state.matrix[[3, 0, 0]]) and torch.equal(picked.tail, state.tail[[3, 0, 0]])


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False, False, True]), torch.tensor([0, 3]), torch.tensor([3, 0], dtype=torch.int32)]
)
def test_reset_rows(rows):
    state = Nested(pair(), torch.randn(4))
    state.inner.matrix[0] = torch.nan
    before = state.clone()
    fresh = state.reset(rows)
    assert torch.equal(fresh.inner.matrix[[0, 3]], torch.zeros(2, 2, 3))
    assert torch.equal(fresh.best[[0, 3]], torch.full((2,), -torch.inf))
    assert torch.equal(fresh.inner.matrix[1:3], state.inner.matrix[1:3])
    assert torch.equal(fresh.best[1:3], state.best[1:3])
    assert torch.equal(state.best, before.best), "reset returns a new state"


def test_reset_all_and_its_gradient():
    state = pair(grad=True)
    assert torch.equal(state.reset().matrix, torch.zeros(4, 2, 3))
    state.reset(torch.tensor([1])).matrix.sum().backward()
    assert torch.equal(state.matrix.grad.sum((1, 2)), torch.tensor([6.0, 0.0, 6.0, 6.0]))


def test_copy_keeps_addresses():
    state, other = Nested(pair(), torch.randn(4)), Nested(pair(), torch.randn(4))
    address = state.inner.matrix.data_ptr()
    assert state.copy_(other) is state
    assert equal(state, other) and state.inner.matrix.data_ptr() == address != other.inner.matrix.data_ptr()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.copy_(Nested(s, None)), TypeError, "copy_: other is Nested; expected Pair"),
        (lambda s: s.copy_(pair(3)), ValueError, r"matrix has shape \[3, 2, 3\] in other; expected \[4, 2, 3\]"),
        (lambda s: s.copy_(Pair(s.matrix, None)), ValueError, "tail is missing in other"),
        (lambda s: Pair(None, s.tail).copy_(s), ValueError, "matrix is missing in this state"),
        (lambda s: s.reset(torch.zeros(3, dtype=torch.bool)), ValueError, r"rows has shape \[3\]; expected bool"),
        (lambda s: s.reset(torch.zeros(4)), ValueError, r"rows is float32 \[4\] on cpu; expected bool \[batch\]"),
        (lambda s: Pair(None, None).batch, ValueError, "Pair holds no tensor"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(pair())


def test_missing_part_stays_missing():
    state = Pair(torch.randn(2, 1), None)
    assert state.clone().tail is None and state.reset().tail is None
    state.copy_(Pair(torch.zeros(2, 1), None))
    assert state.matrix.eq(0).all() and state.tail is None


def test_deepcopy_pickle_repr():
    state = pair()
    assert equal(copy.deepcopy(state), state) and equal(pickle.loads(pickle.dumps(state)), state)
    assert repr(Pair(torch.zeros(2, 3), None)) == "Pair(matrix=float32 [2, 3] on cpu, tail=None)"


def test_compiled_code_takes_and_returns_states():
    def decay(state, rows):
        return Pair(0.5 * state.matrix, state.tail + 1).reset(rows)

    state, rows = pair(), torch.tensor([True, False, False, True])
    compiled = torch.compile(decay, fullgraph=True, backend="aot_eager")
    assert equal(compiled(state, rows), decay(state, rows))


def test_export_takes_and_returns_states():
    class Decay(torch.nn.Module):
        def forward(self, x, state):
            return x + state.tail, Pair(0.5 * state.matrix, state.tail)

    x, state = torch.randn(4, 5), pair()
    program = torch.export.export(Decay(), (x, state)).module()
    y, after = program(x, state)
    assert type(after) is Pair and torch.equal(y, x + state.tail) and torch.equal(after.matrix, 0.5 * state.matrix)
