"""TransformerXL: the published scores with the relative shift written out, and what every memory layer promises."""

import copy

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject
from torch.nn import functional as F

from memattn.nn import TransformerXL

EMBED = 48
NO_GRADIENT = "Transformer-XL stops gradients at its memory"


def subject(**settings):
    return Subject(
        lambda **kw: TransformerXL(EMBED, 3, memory_size=8, **settings, **kw),
        EMBED,
        chunk=8,
        lacks=Lacks(state_gradient=NO_GRADIENT),
    )


SUBJECTS = {"published": subject(), "narrow": subject(position_dim=20, bias=True)}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_promises(name, check, full):
    if name == "narrow" and not full and check != "prefill_then_step_equals_one_call":
        pytest.skip("--full: a variant in every check")
    layers.run(check, SUBJECTS[name])


def published(layer, x, memory):
    """The authors' form: R for every distance, W_R applied to it, and the relative shift by gathering distances."""
    p = {n: q.to(x.dtype) for n, q in layer.named_parameters()}
    heads, dim, width, (batch, length, _) = layer.num_heads, layer.head_dim, layer.position_dim, x.shape
    both = torch.cat([memory.detach(), x], 1)
    q = F.linear(both, p["qkv_proj.weight"], p.get("qkv_proj.bias"))[:, -length:, : heads * dim]
    k, v = F.linear(both, p["qkv_proj.weight"], p.get("qkv_proj.bias"))[..., heads * dim :].chunk(2, -1)
    q, k, v = (y.unflatten(-1, (heads, dim)) for y in (q, k, v))
    keys, held = both.shape[1], memory.shape[1]
    distance = torch.arange(keys, dtype=x.dtype)
    inverse = 1 / 10000 ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
    waves = torch.cat([(distance[:, None] * inverse).sin(), (distance[:, None] * inverse).cos()], -1)
    r = (waves @ p["position_proj.weight"].t()).unflatten(-1, (heads, dim))
    content = torch.einsum("bihd,bjhd->bhij", q + p["content_bias"], k)
    by_distance = torch.einsum("bihd,nhd->bhin", q + p["position_bias"], r)
    ahead = held + torch.arange(length)[:, None] - torch.arange(keys)
    shifted = by_distance.gather(3, ahead.clamp(min=0).expand(batch, heads, -1, -1))
    seen = (ahead >= 0) & (ahead < layer.memory_size) if layer.same_length else ahead >= 0
    s = ((content + shifted) * dim**-0.5).masked_fill(~seen, -torch.inf)
    o = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)
    return F.linear(o.flatten(-2), p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize("same_length", [True, False])
@pytest.mark.parametrize("name", SUBJECTS)
def test_published_scores_and_gradients(name, same_length):
    layer = layers.fresh(SUBJECTS[name])
    layer.same_length = same_length
    exact = copy.deepcopy(layer).double()
    x, past = layers.draw(2, 21, EMBED).requires_grad_(), layers.draw(2, 30, EMBED, seed=4)
    x64 = x.detach().double().requires_grad_()
    _, state = layer(past, return_state=True)
    y, truth = layer(x, state), published(exact, x64, past[:, -layer.memory_size :].double())
    layers.close(y, truth, 5e-6)
    weights = layers.draw(2, 21, EMBED, seed=3)
    (y * weights).sum().backward()
    (truth * weights.double()).sum().backward()
    layers.close(x.grad, x64.grad, 1e-5)
    for (n, p), (_, p64) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
        assert relative_error(p.grad, p64.grad, max(p64.grad.norm().item(), 1e-3)) <= 5e-5, n


def test_all_of_a_call_sees_all_of_the_memory():
    """same_length=False: the tokens of a call see as far back as its first one; in the middle of a text, too."""
    layer = TransformerXL(EMBED, 3, memory_size=8, same_length=False)
    x = layers.draw(1, 28, EMBED)
    _, state = layer(x[:, :20], return_state=True)
    close_by, other = layer(x[:, 20:], state), x.clone()
    other[:, 12] += 1  # the oldest token in the memory
    _, changed = layer(other[:, :20], return_state=True)
    assert relative_error(layer(x[:, 20:], changed)[:, -1], close_by[:, -1]) > 1e-4
    other = x.clone()
    other[:, 11] += 1
    _, same = layer(other[:, :20], return_state=True)
    assert torch.equal(layer(x[:, 20:], same), close_by)


def test_no_gradient_enters_the_memory():
    layer, past = TransformerXL(EMBED, 3, memory_size=8), layers.draw(1, 9, EMBED).requires_grad_()
    y, state = layer(past, return_state=True)
    assert not state.x.requires_grad
    layer(layers.draw(1, 5, EMBED, seed=2), state).sum().backward()
    assert past.grad is None
    state.x.requires_grad_()  # a state from elsewhere, with a history
    y, after = layer(layers.draw(1, 5, EMBED, seed=2), state, return_state=True)
    y.sum().backward()
    assert state.x.grad is None and not after.x.requires_grad


def test_long_texts_keep_their_precision():
    """Positions are counted inside a call: far into a text, scores are as exact as at its start."""
    layer, x = layers.fresh(SUBJECTS["published"]), layers.draw(1, 20, EMBED)
    _, state = layer(x, return_state=True)
    far = state.clone()
    far.length += 8 * 10**9  # whole turns of the ring
    layers.close(layer(x, far), layer(x, state), 1e-6)


def test_extra_repr_and_initialisation():
    layer = TransformerXL(128, 4, memory_size=8, same_length=False)
    assert "128, num_heads=4, head_dim=32, memory_size=8, position_dim=128, same_length=False" in repr(layer)
    assert 0.01 < layer.content_bias.std() < 0.03 and 0.01 < layer.position_bias.std() < 0.03


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TransformerXL(48, 3, memory_size=0), "memory_size is 0; expected at least 1"),
        (
            lambda: TransformerXL(512, 8, memory_size=8),
            "position_dim is 512; allowed with head_dim 64: an even number 2..192",
        ),
        (lambda: TransformerXL(48, 3, memory_size=8, position_dim=21), "position_dim is 21; allowed with head_dim 16"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
