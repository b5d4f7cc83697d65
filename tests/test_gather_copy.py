"""gather_copy on every backend of this machine."""

import functools

import pytest
import torch

from memattn import backends
from memattn.ops import gather_copy
from memattn.ops._library import resolve


@pytest.fixture(params=["cpu", "chunked"])
def copy(request, device):
    """The op on each backend that can run here."""
    if reasons := backends.why_not("gather_copy", request.param, backends.Request(device, torch.float32)):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return functools.partial(gather_copy, backend=request.param)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64], ids=str
)
@pytest.mark.parametrize("shape", [(), (3,), (5, 2, 16), (64, 8, 128)], ids=str)
def test_copies_chosen_rows_and_no_others(dtype, shape, copy, device):
    source = torch.randn(9, *shape, device=device).to(dtype)
    target = torch.full((7, *shape), 3.0, device=device).to(dtype)
    before = target.clone()
    sources, targets = torch.tensor([8, 0, 3, 3], device=device), torch.tensor([2, 6, 0, 1], device=device)
    copy(source, sources, target, targets)
    for i in range(7):
        found = (targets == i).nonzero()[:, 0]
        expected = source[sources[found[0]]] if len(found) else before[i]
        assert torch.equal(target[i].float(), expected.float())


def test_rows_of_a_wider_record(copy, device):
    records = torch.randn(6, 2, 4, 8, device=device)
    target = torch.zeros(3, 4, 8, device=device)
    copy(records[:, 1], torch.tensor([5, 2], device=device), target, torch.tensor([0, 2], device=device))
    assert torch.equal(target[0], records[5, 1]) and torch.equal(target[2], records[2, 1]) and not target[1].any()
    copy(target, torch.tensor([0], device=device), records[:, 0], torch.tensor([4], device=device))
    assert torch.equal(records[4, 0], target[0])


def test_nothing_to_copy(copy, device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    target = torch.ones(2, 3, device=device)
    copy(torch.empty(0, 3, device=device), none, target, none)
    assert (target == 1).all()


def test_bits_do_not_depend_on_the_thread_count(copy):
    threads, results = torch.get_num_threads(), []
    source, sources, targets = torch.randn(300, 40, 64), torch.randint(300, (200,)), torch.randperm(256)[:200]
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            target = torch.zeros(256, 40, 64)
            copy(source, sources, target, targets)
            results.append(target)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], x) for x in results[1:])
    assert torch.equal(results[0][targets], source[sources])


def test_opcheck():
    if reasons := backends.why_not("gather_copy", "cpu", backends.Request("cpu", torch.float32)):
        pytest.skip("; ".join(reasons))
    args = (torch.randn(4, 3), torch.tensor([1]), torch.zeros(2, 3), torch.tensor([0]))
    assert set(torch.library.opcheck(resolve("gather_copy_cpu"), args).values()) == {"SUCCESS"}
    with pytest.raises(RuntimeError, match="gather_copy_cpu: sources must be in 0..3; got 4"):
        resolve("gather_copy_cpu")(args[0], torch.tensor([4]), *args[2:])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(source=torch.zeros(4, 2)), ValueError, r"target has shape \[2, 3\]; expected .* = \[2, 2\]"),
        (dict(source=torch.zeros(4, 3).half()), TypeError, "target is float32; expected float16 like source"),
        (dict(source=torch.zeros(4, 3, 2).mT, target=torch.zeros(2, 2, 3)), ValueError, "expected contiguous rows"),
        (dict(sources=torch.tensor([4])), ValueError, r"sources holds 4..4; allowed: 0..3"),
        (dict(targets=torch.tensor([-1])), ValueError, r"targets holds -1..-1; allowed: 0..1"),
        (dict(sources=torch.tensor([1, 2])), ValueError, r"targets has shape \[1\]; expected .* like sources = \[2\]"),
        (dict(sources=torch.tensor([1]).int()), TypeError, "sources is int32; expected int64"),
        (dict(backend="triton"), backends.BackendError, "gather_copy has no triton kernel"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    call = dict(
        source=torch.zeros(4, 3), sources=torch.tensor([1]), target=torch.zeros(2, 3), targets=torch.tensor([0])
    )
    with pytest.raises(error, match=message):
        gather_copy(**(call | change))
