"""RecurrentMemory and SummaryTokens: the published recurrence around any backbone, in all forms of a layer."""

from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject, draw
from torch import nn

from memattn.nn import GatedDeltaNet, RecurrentMemory, SummaryTokens

EMBED, SEGMENT = 32, 8


def delta(**kwargs):
    return GatedDeltaNet(EMBED, 2, chunk_size=16, **kwargs)


WRAPPERS = {
    "memory": lambda backbone=delta, **kw: RecurrentMemory(backbone(**kw), EMBED, 3, segment_size=SEGMENT, **kw),
    "accumulate": lambda backbone=delta, **kw: SummaryTokens(
        backbone(**kw), EMBED, 2, segment_size=SEGMENT, max_segments=2, **kw
    ),
    "overwrite": lambda backbone=delta, **kw: SummaryTokens(
        backbone(**kw), EMBED, 2, segment_size=SEGMENT, mode="overwrite", **kw
    ),
}
NO_POOL = Lacks(pool="step takes no state_indices")
SUBJECTS = {name: Subject(make, EMBED, SEGMENT, NO_POOL) for name, make in WRAPPERS.items()}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("subject, check", layers.matrix(SUBJECTS, compiled=("accumulate",)))
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


class Stateless(nn.Module):
    """y = backbone(x) and nothing else."""

    def __init__(self, **kwargs):
        super().__init__()
        self.inner = delta(**kwargs)

    def forward(self, x):
        return self.inner(x)

    def reset_parameters(self):
        self.inner.reset_parameters()


def published(layer, x):
    """The recurrences of the docstrings, segment by segment."""
    outputs, kept = [], []
    memory = getattr(layer, "memory", None)
    memory = None if memory is None else memory.expand(x.shape[0], -1, -1)
    for part in x.split(SEGMENT, 1):
        if memory is not None:
            before, after = memory, memory
        else:
            before, after = torch.cat([x[:, :0], *kept], 1), layer.queries.expand(x.shape[0], -1, -1)
        z = layer.backbone(torch.cat([before, part, after], 1))
        outputs.append(z[:, before.shape[1] : before.shape[1] + part.shape[1]])
        memory = None if memory is None else z[:, before.shape[1] + part.shape[1] :]
        kept = [*kept, z[:, before.shape[1] + part.shape[1] :]][-layer.max_segments :] if memory is None else []
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("tokens", [0, 1, SEGMENT, 4 * SEGMENT + 3])
@pytest.mark.parametrize("backbone", [delta, Stateless])
@pytest.mark.parametrize("name", WRAPPERS)
def test_published_recurrence(name, backbone, tokens):
    layer = layers.fresh(Subject(lambda **kw: WRAPPERS[name](backbone, **kw), EMBED)).double()
    x = draw(2, tokens, EMBED, dtype=torch.float64).requires_grad_()
    y, truth = layer(x), published(layer, x)
    layers.close(y, truth, 1e-12)
    if tokens:
        weights, leaves = draw(*x.shape, seed=3).double(), [x, *layer.parameters()]
        gradients = [torch.autograd.grad((z * weights).sum(), leaves, materialize_grads=True) for z in (y, truth)]
        for ours, theirs in zip(*gradients, strict=True):
            layers.close(ours, theirs, 1e-10)


def test_memory_reaches_back_over_segments():
    """A token changes the output three segments later, and only through the memory."""
    for name, reach in (("memory", 4), ("accumulate", 4), ("overwrite", 4)):
        layer, x = layers.fresh(SUBJECTS[name]), draw(1, 5 * SEGMENT, EMBED)
        other = x.clone()
        other[:, 3] += 1
        moved = (layer(other) - layer(x)).abs().amax((0, 2)).view(5, SEGMENT).amax(1)
        assert bool((moved[: reach + 1] > 0).all()), (name, moved)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_join_the_last_segments_only(depth):
    """bptt_depth k: the loss of the last segment reaches the tokens of the last k segments."""
    torch.manual_seed(0)
    layer = RecurrentMemory(delta(), EMBED, 3, segment_size=SEGMENT, bptt_depth=depth)
    x = draw(1, 5 * SEGMENT, EMBED).requires_grad_()
    layer(x)[:, -SEGMENT:].square().sum().backward()
    reached = x.grad.abs().view(5, -1).sum(1) > 0
    assert reached.tolist() == [n >= 5 - depth for n in range(5)]
    x.grad = None
    layer.bptt_depth = None
    layer(x)[:, -SEGMENT:].square().sum().backward()
    assert x.grad.abs().view(5, -1).sum(1).gt(0).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_join_the_last_segments_of_every_row(depth):
    """With a state, too, and where rows stand elsewhere in their segments and are padded."""
    torch.manual_seed(0)
    layer = RecurrentMemory(delta(), EMBED, 3, segment_size=SEGMENT, bptt_depth=depth)
    began, lengths = [0, 3, SEGMENT - 1], [3 * SEGMENT, 2 * SEGMENT, SEGMENT + 1]
    past, present = torch.arange(SEGMENT), torch.arange(3 * SEGMENT)
    with torch.no_grad():
        _, state = layer(draw(3, SEGMENT, EMBED), attention_mask=past < torch.tensor(began)[:, None], return_state=True)
    x = draw(3, 3 * SEGMENT, EMBED, seed=2).requires_grad_()
    mask = present < torch.tensor(lengths)[:, None]
    y, after = layer(x, state, attention_mask=mask, return_state=True)
    for row, (before, count) in enumerate(zip(began, lengths, strict=True)):
        (dx,) = torch.autograd.grad(y[row, count - 1].sum(), x, retain_graph=True)
        last = (before + count - 1) // SEGMENT  # number of the last segment
        first = max((last - depth + 1) * SEGMENT - before, 0)
        assert dx[row].any(1).tolist() == [first <= t < count for t in range(3 * SEGMENT)], row
    assert after.memory[0].requires_grad and torch.autograd.grad(after.memory[0].sum(), x)[0].any()


def test_jitter_draws_segment_lengths_in_training_only():
    torch.manual_seed(0)
    layer = SummaryTokens(delta(), EMBED, 2, segment_size=10, segment_jitter=0.2, max_segments=3)
    x, lengths = draw(2, 100, EMBED), []
    sizes = layer._sizes

    def drawn(*args):
        lengths.extend(sizes(*args))
        return sizes(*args)

    layer._sizes = drawn
    for _ in range(20):
        y, state = layer(x, return_state=True)
        y, state = layer(x, state, return_state=True)
        assert y.isfinite().all() and 0 <= state.position.min() and state.position.max() < 12
    assert set(lengths) == {8, 9, 10, 11, 12}
    lengths.clear()
    layer.eval()(x)
    assert lengths == [10] * 10


def test_random_detach_ends_gradients():
    torch.manual_seed(0)
    layer = SummaryTokens(delta(), EMBED, 2, segment_size=SEGMENT, detach_probability=0.999)
    x = draw(1, 2 * SEGMENT, EMBED).requires_grad_()
    for train in (True, False):
        x.grad = None
        layer.train(train)(x)[:, SEGMENT:].sum().backward()
        assert bool(x.grad[:, :SEGMENT].any()) is not train


def test_a_backbone_without_state_refuses_what_needs_one():
    layer = WRAPPERS["memory"](Stateless)
    x, mask = draw(2, SEGMENT + 1, EMBED), torch.ones(2, SEGMENT + 1, dtype=torch.bool)
    y, state = layer(x[:, :SEGMENT], return_state=True)
    whole = layer(torch.cat([x[:, :SEGMENT], x], 1))
    layers.close(torch.cat([y, layer(x, state)], 1), whole, 1e-6)
    for call, message in (
        (lambda: layer(x, return_state=True), "9 tokens leave a segment open and Stateless has no state to carry it"),
        (lambda: layer(x, attention_mask=mask), "Stateless takes no attention_mask"),
        (lambda: layer(x[:1], cu_seqlens=torch.tensor([0, 9])), "Stateless takes no attention_mask"),
        (lambda: layer.step(x[:, :1], state), "Stateless has no state, so there is no step"),
        (lambda: WRAPPERS["overwrite"](Stateless)(x, state), "state is given and Stateless takes no attention_mask"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RecurrentMemory(delta(), EMBED, 0, segment_size=8), "num_memory_tokens is 0; allowed: ≥ 1"),
        (lambda: RecurrentMemory(delta(), EMBED, 2, segment_size=0), "segment_size is 0; allowed: ≥ 1"),
        (lambda: RecurrentMemory(delta(), EMBED, 2, segment_size=8, bptt_depth=0), "bptt_depth is 0; allowed: ≥ 1"),
        (lambda: SummaryTokens(delta(), EMBED, 2, segment_size=8, mode="fifo"), "mode is 'fifo'; allowed: 'accumulate"),
        (
            lambda: SummaryTokens(delta(), EMBED, 2, segment_size=8, segment_jitter=1.0),
            "segment_jitter is 1.0; allowed",
        ),
        (lambda: SummaryTokens(delta(), EMBED, 2, segment_size=8, max_segments=0), "max_segments is 0; allowed: ≥ 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_state_dict_and_repr():
    layer = WRAPPERS["accumulate"]()
    assert layer.state_dict()["queries"].shape == (2, EMBED)
    assert WRAPPERS["memory"]().state_dict()["memory"].shape == (3, EMBED)
    assert "32, num_summary_tokens=2, segment_size=8, mode='accumulate', max_segments=2" in repr(layer)
    state = layer.init_state(5)
    assert state.memory.shape == (5, 4, EMBED) and state.batch == state.backbone.batch == 5
    assert relative_error(state.memory, torch.zeros(5, 4, EMBED)) == 0


def test_the_page():
    layers.run_page(Path(__file__).resolve().parent.parent / "docs" / "recurrent_memory.md", 4)
