"""AssociativeRecurrentMemory: the published recurrence around layers, in all forms of a layer."""

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject, draw, fresh
from torch import nn
from torch.nn import functional as F

from memattn.nn import AssociativeRecurrentMemory, GatedDeltaNet, HybridStack, SlidingWindowAttention

EMBED, SEGMENT, TOKENS = 32, 8, 3


def delta(**kwargs):
    return GatedDeltaNet(EMBED, 2, chunk_size=16, **kwargs)


def attention(**kwargs):
    return SlidingWindowAttention(EMBED, 2, window=32, **kwargs)


MAKERS = {
    "one layer": lambda **kw: AssociativeRecurrentMemory(delta(**kw), EMBED, TOKENS, segment_size=SEGMENT, memory_dim=8, **kw),  # fmt: skip # noqa: E501
    "two layers, two heads": lambda **kw: AssociativeRecurrentMemory(
        [delta(**kw), attention(**kw)], EMBED, TOKENS, segment_size=SEGMENT, memory_dim=8, memory_heads=2, nu=2, correction=False, **kw  # noqa: E501
    ),
    "blocks": lambda **kw: AssociativeRecurrentMemory(
        [HybridStack(EMBED, 2, "gdn", **kw) for _ in range(2)], EMBED, TOKENS, segment_size=SEGMENT, memory_dim=6, **kw
    ),
}  # fmt: skip
NO_POOL = Lacks(pool="step takes no state_indices")
SUBJECTS = {name: Subject(make, EMBED, SEGMENT, NO_POOL, depth=2) for name, make in MAKERS.items()}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


PROMISED = {name: SUBJECTS[name] for name in ("one layer", "two layers, two heads")}


@pytest.mark.parametrize("subject, check", layers.matrix(PROMISED, compiled=("one layer",)))
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


def features(x, nu):
    u = torch.cat([x.relu(), (-x).relu()], -1)
    return F.normalize(torch.cat([u * u.roll(j, -1) for j in range(1, nu + 1)], -1), dim=-1)


def published(wrapper, x):
    """The recurrence of the docstring, one head at a time."""
    pairs = wrapper.backbone._pairs()
    stores = [[None] * memory.heads for _, memory in pairs]
    outputs = []
    for part in x.split(wrapper.segment_size, 1):
        full = part.shape[1] == wrapper.segment_size
        h = torch.cat([part, wrapper.memory.expand(len(x), -1, -1)], 1) if full else part
        for (layer, memory), store in zip(pairs, stores, strict=True):

            def split(y, memory=memory):
                return y.view(*y.shape[:2], memory.heads, -1).unbind(2)

            reads = []
            for head, q in enumerate(split(memory.q_proj(h))):
                phi = features(q, memory.nu)
                none = h.new_zeros(*h.shape[:2], EMBED // memory.heads)
                a, z = store[head] or (None, None)
                reads.append(none if a is None else phi @ a / (phi @ z + 1e-5))
            h = layer(h + torch.cat(reads, -1))
            if not full:
                continue
            m = h[:, -TOKENS:]
            heads = zip(split(memory.k_proj(m)), split(memory.v_proj(m)), memory.beta_proj(m).split(1, -1), strict=True)
            for head, (k, v, b) in enumerate(heads):
                phi = features(k, memory.nu)
                a, z = store[head] or (phi.new_zeros(len(x), phi.shape[2], v.shape[2]), phi.new_zeros(len(x), phi.shape[2], 1))  # fmt: skip # noqa: E501
                seen = phi @ z
                gamma = (1 - seen / (phi.square().sum(-1, keepdim=True) + 1e-5)).clamp(0, 1).detach()
                gamma = gamma if memory.correction else torch.ones_like(gamma)
                error = v - phi @ a / (seen + 1e-5)
                store[head] = a + phi.mT @ (b.sigmoid() * error), z + (gamma * phi).sum(1)[..., None]
        outputs.append(h[:, : part.shape[1]])
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("tokens", [1, SEGMENT, 3 * SEGMENT + 3])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_published_recurrence(name, tokens):
    wrapper = fresh(SUBJECTS[name]).double()
    x = draw(2, tokens, EMBED).double()
    assert relative_error(wrapper(x), published(wrapper, x)) < 1e-9


def test_the_memory_carries_what_the_layers_do_not():
    """Layers start afresh at a segment: only the memories know the one before."""
    wrapper, x = fresh(SUBJECTS["one layer"]), draw(2, 2 * SEGMENT, EMBED)
    other = torch.cat([draw(2, SEGMENT, EMBED, seed=9), x[:, SEGMENT:]], 1)
    with torch.no_grad():
        assert relative_error(wrapper(x)[:, SEGMENT:], wrapper(other)[:, SEGMENT:]) > 1e-3
        for _, memory in wrapper.backbone._pairs():
            memory.v_proj.weight.zero_()
        assert torch.equal(wrapper(x)[:, SEGMENT:], wrapper(other)[:, SEGMENT:])


def test_a_reset_row_forgets_and_a_new_segment_does_not():
    wrapper = fresh(SUBJECTS["one layer"])
    _, state = wrapper(draw(2, 2 * SEGMENT, EMBED), return_state=True)
    (memory,) = state.backbone.memories
    assert memory.flatten(1).any(1).all(), "closing a segment lost the memory"
    (afresh,) = state.reset(torch.tensor([True, False])).backbone.memories
    assert not afresh[0].any() and torch.equal(afresh[1], memory[1])


def test_bptt_depth_cuts_the_gradient():
    def gradient(depth):
        wrapper = AssociativeRecurrentMemory(
            delta(), EMBED, TOKENS, segment_size=SEGMENT, memory_dim=8, bptt_depth=depth
        )
        with torch.no_grad():
            nn.init.normal_(wrapper.backbone.memories[0].v_proj.weight)
        x = draw(1, 3 * SEGMENT, EMBED).requires_grad_()
        wrapper(x)[:, 2 * SEGMENT :].sum().backward()
        return x.grad.unflatten(1, (3, SEGMENT)).abs().sum((0, 2, 3)) > 0

    assert gradient(None).tolist() == [True, True, True]
    assert gradient(2).tolist() == [False, True, True]
    assert gradient(1).tolist() == [False, False, True]


def test_wrong_arguments_are_refused():
    for layer, message in ((nn.Linear(EMBED, EMBED), "layers has Linear"), ([], "layers has no layer")):
        with pytest.raises(ValueError, match=f"{message}; allowed: layers with init_state"):
            AssociativeRecurrentMemory(layer, EMBED, segment_size=8)
    with pytest.raises(ValueError, match="memory_heads is 3; expected a divisor of memory_dim 64 and embed_dim 32"):
        AssociativeRecurrentMemory(delta(), EMBED, segment_size=8, memory_heads=3)
    with pytest.raises(ValueError, match="num_memory_tokens is 0; allowed: ≥ 1"):
        AssociativeRecurrentMemory(delta(), EMBED, 0, segment_size=8)
