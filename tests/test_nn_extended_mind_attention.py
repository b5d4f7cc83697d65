"""ExtendedMindAttention: the paper's softmax written out, what it says it read, and what every layer promises."""

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject

from memattn.nn import ExtendedMindAttention

EMBED = 48


class Reminded(ExtendedMindAttention):
    """A layer whose empty state remembers 9 tokens, so that every check reads a memory."""

    def init_state(self, batch, max_tokens=None):
        x = layers.draw(1, 9, EMBED, seed=9).to(self.qkv_proj.weight).expand(batch, -1, -1)
        return self.remember(x, super().init_state(batch, max_tokens))


def subject(kind=Reminded, lacks=Lacks(), **settings):  # noqa: B008
    settings = {"num_neighbors": 16, **settings}
    return Subject(
        lambda **kw: kind(EMBED, 3, **settings, **kw), EMBED, chunk=6, lacks=lacks, state_options={"max_tokens": 64}
    )


CHOOSES = Lacks(bfloat16="rounding changes which tokens are found")
SUBJECTS = {
    "reminded": subject(),
    "empty": subject(ExtendedMindAttention),
    "grouped": subject(lacks=CHOOSES, num_kv_heads=1, num_neighbors=2, threshold=0.0, head_dim=20, bias=True),
}
OF_EMPTY = ("states_are_cloned_reordered_and_reset_by_row", "no_sequence_is_no_error", "two_calls_equal_one")
OF_GROUPED = ("prefill_then_step_equals_one_call", "padded_rows_equal_their_runs_alone", "step_on_a_pool_of_states")
NOT_REMINDED = ("states_are_cloned_reordered_and_reset_by_row", "padding_and_packing_compile")


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_promises(name, check, full):
    if name != "empty" and check == OF_EMPTY[0]:
        pytest.skip("a row that is reset remembers nothing, as it should; checked with a memory that is empty")
    chosen = {"reminded": set(layers.CHECKS) - {*NOT_REMINDED}, "empty": {*OF_EMPTY}, "grouped": {*OF_GROUPED}}
    if check not in chosen[name] and not full:
        pytest.skip("--full: variants of a layer in every check, and compiled with padding")
    layers.run(check, SUBJECTS[name])


def published(layer, x, remembered):
    """One sequence, token by token and head by head; also which remembered tokens were read."""
    heads, group, dim = layer.num_heads, layer.num_heads // layer.num_kv_heads, layer.head_dim
    (q, k, v), (_, mk, mv) = ([y[0] for y in layer._heads(z[None])] for z in (x, remembered))
    half, rows, read = dim // 2, [], []
    frequency = torch.tensor([layer.rope_base ** (-d / half) for d in range(half)], dtype=x.dtype)

    def at(z, position):
        pairs = torch.complex(z[:half], z[half:]) * torch.polar(torch.ones_like(frequency), position * frequency)
        return torch.cat([pairs.real, pairs.imag])

    for i in range(len(x)):
        parts = []
        for h in range(heads):
            g, qi = h // group, at(q[i, h], i)
            cosine = [(qi @ m / (qi.norm() * m.norm())).item() for m in mk[:, g]]
            best = sorted(range(len(cosine)), key=lambda m, c=cosine: -c[m])[: layer.num_neighbors]
            best = [m for m in best if layer.threshold is None or cosine[m] >= layer.threshold]
            read.append(sorted(best))
            keys = torch.stack([at(k[j, g], j) for j in range(i + 1)] + [mk[m, g] for m in best])
            values = torch.cat([v[: i + 1, g], mv[best, g]])
            parts.append((keys @ qi * dim**-0.5).softmax(0) @ values)
        rows.append(torch.cat(parts))
    return layer.out_proj(torch.stack(rows)), read


@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_the_paper_s_softmax_gradients_and_citations(threshold, kv_heads):
    torch.manual_seed(0)
    layer = ExtendedMindAttention(EMBED, 3, num_kv_heads=kv_heads, num_neighbors=4, threshold=threshold).double()
    x, past = (layers.draw(1, n, EMBED, seed=n).double().requires_grad_() for n in (11, 30))
    y, found = layer(x, layer.remember(past), return_found=True)
    truth, read = published(layer, x[0], past[0])
    layers.close(y[0], truth, 1e-12)
    assert [[int(j) for j in row if j >= 0] for row in found.indices.flatten(0, 2)] == read
    assert threshold is None or len({len(row) for row in read}) > 2, "the threshold leaves out some"
    weights = layers.draw(11, EMBED, seed=3).double()
    ours = torch.autograd.grad((y[0] * weights).sum(), [x, past, *layer.parameters()])
    theirs = torch.autograd.grad((truth * weights).sum(), [x, past, *layer.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        layers.close(a, b, 1e-10)


def test_a_threshold_that_nothing_reaches_is_no_memory():
    layer = layers.fresh(subject(ExtendedMindAttention, threshold=1.0))
    x, past = layers.draw(2, 9, EMBED), layers.draw(2, 40, EMBED, seed=4)
    y, found = layer(x, layer.remember(past), return_found=True)
    assert found.counts.eq(0).all() and found.indices.eq(-1).all() and found.values.eq(-torch.inf).all()
    layers.close(y, layer(x), 1e-6)


def test_rows_remember_for_themselves_and_say_what_they_read():
    """Padding in what is remembered and in what reads it; a second text goes behind the first."""
    layer = layers.fresh(SUBJECTS["grouped"])
    x, past = layers.draw(2, 7, EMBED), layers.draw(2, 12, EMBED, seed=4)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    state = layer.remember(past[:, :2], layer.init_state(2).reset())
    state = layer.remember(past, state, attention_mask=mask)
    assert state.memory.length.tolist() == [14, 9] and state.cache.length.tolist() == [0, 0]
    alone = layer.remember(torch.cat([past[1:, :2], past[1:, 5:]], 1), layer.init_state(1).reset())
    seen = torch.arange(7) >= torch.tensor([[0], [3]])
    y, found = layer(x, state, attention_mask=seen, return_found=True)
    own, expected = layer(x[1:, 3:], alone, return_found=True)
    layers.close(y[1:, 3:], own, 5e-6)
    assert torch.equal(found.indices[1:, 3:], expected.indices) and torch.equal(found.counts[1:, 3:], expected.counts)
    assert found.indices[1, :3].eq(-1).all() and found.values[1, :3].eq(-torch.inf).all()
    packed = torch.cat([x[:1], x[1:, 3:]], 1)
    z, after, again = layer(packed, state, cu_seqlens=torch.tensor([0, 7, 11]), return_state=True, return_found=True)
    layers.close(z[:, 7:], own, 5e-6)
    assert torch.equal(again.indices[:, 7:], expected.indices) and after.memory.length.tolist() == [14, 9]


@pytest.mark.parametrize("place", [0, 17, 99])
def test_a_needle_is_found_and_cited_at_every_place(place):
    layer = ExtendedMindAttention(64, 1, num_neighbors=1).double()
    with torch.no_grad():
        layer.qkv_proj.weight.copy_(torch.eye(64).repeat(3, 1))
        layer.qkv_proj.weight[:64] *= -1  # a token does not look for itself
        layer.out_proj.weight.copy_(torch.eye(64))
        past = layers.draw(1, 100, 64).double()
        y, found = layer(-30 * past[:, place : place + 1], layer.remember(past), return_found=True)
    assert found.indices.item() == place
    layers.close(y[0, 0], past[0, place], 1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_neighbors": 0}, "num_neighbors is 0; allowed: 1..128"),
        ({"threshold": 1.5}, "threshold is 1.5; allowed: a cosine, -1..1, or None"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"ExtendedMindAttention: {message}"):
        ExtendedMindAttention(48, 3, **settings)
