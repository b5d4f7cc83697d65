"""InfiniAttention: the published recurrence, in all forms of a layer."""

from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject, draw, fresh
from torch.nn import functional as F

from memattn.nn import InfiniAttention
from memattn.nn.rotary import rotary

EMBED, HEADS, SEGMENT = 64, 4, 8
MAKERS = {
    "delta": lambda **kw: InfiniAttention(EMBED, HEADS, segment_size=SEGMENT, num_kv_heads=2, **kw),
    "additive": lambda **kw: InfiniAttention(
        EMBED, HEADS, segment_size=SEGMENT, delta=False, rope_base=None, qk_norm=True, **kw
    ),
}
NO_POOL = Lacks(pool="step takes no state_indices")
SUBJECTS = {name: Subject(make, EMBED, SEGMENT, NO_POOL) for name, make in MAKERS.items()}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("subject, check", layers.matrix(SUBJECTS, compiled=("delta",)))
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


def published(layer, x, gate=None):
    """Equations 3 to 10 of the paper, segment by segment."""
    q, k, v = layer._heads(x)
    turned_q, turned_k = q, k
    if layer.rope_base is not None:
        turned_q, turned_k = (rotary(y, torch.arange(x.shape[1]), layer.rope_base) for y in (q, k))
    group = layer.num_heads // layer.num_kv_heads
    q, turned_q = (y.transpose(1, 2) for y in (q, turned_q))  # [B, H, T, D]
    k, turned_k, v = (y.repeat_interleave(group, 2).transpose(1, 2) for y in (k, turned_k, v))
    gate = layer.beta.sigmoid()[:, None, None] if gate is None else gate
    memory, z = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3]), q.new_zeros(*q.shape[:2], q.shape[3], 1)
    outputs = []
    for s in range(0, x.shape[1], layer.segment_size):
        here = slice(s, s + layer.segment_size)
        sq, sk = F.elu(q[:, :, here]) + 1, F.elu(k[:, :, here]) + 1
        recalled = sq @ memory / (sq @ z + layer.eps)
        local = F.scaled_dot_product_attention(
            turned_q[:, :, here], turned_k[:, :, here], v[:, :, here], is_causal=True
        )
        outputs.append(gate * recalled + (1 - gate) * local)
        old = sk @ memory / (sk @ z + layer.eps) if layer.delta else 0
        memory, z = memory + sk.mT @ (v[:, :, here] - old), z + sk.sum(2)[..., None]
    return layer.out_proj(torch.cat(outputs, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [1, SEGMENT, 4 * SEGMENT + 3])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_published_recurrence(name, tokens):
    layer = fresh(SUBJECTS[name]).double()
    x = draw(2, tokens, EMBED).double()
    assert relative_error(layer(x), published(layer, x)) < 1e-10


def test_a_large_beta_means_the_memory_alone():
    """The paper's direction: the gate multiplies the memory. Reversed, this fails."""
    layer, x = fresh(SUBJECTS["delta"]), draw(2, 3 * SEGMENT, EMBED)
    with torch.no_grad():
        layer.beta.fill_(40.0)
        assert relative_error(layer(x), published(layer, x, gate=1.0)) < 1e-5
        assert not layer(x)[:, :SEGMENT].any(), "the first segment has no memory"
        layer.beta.fill_(-40.0)
        assert relative_error(layer(x), published(layer, x, gate=0.0)) < 1e-5
        assert relative_error(layer(x)[:, SEGMENT:], layer(x[:, SEGMENT:])) < 1e-5, "segments alone"


def test_the_state_has_the_size_of_one_segment():
    layer = fresh(SUBJECTS["delta"])
    _, state = layer(draw(2, 5 * SEGMENT + 3, EMBED), return_state=True)
    assert state.memory.shape == state.written.shape == (2, 2, 16, 17)
    assert state.segment.k.shape == (2, SEGMENT, 2, 16) and state.segment.length.tolist() == [43, 43]
    assert not torch.equal(state.memory, state.written)
    _, closed = layer(draw(2, 5 * SEGMENT, EMBED), return_state=True)
    torch.testing.assert_close(closed.memory, closed.written)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"segment_size": 0}, "segment_size is 0; allowed: ≥ 1"),
        ({"segment_size": 4, "head_dim": 17}, "head_dim is 17; rotary positions need an even one"),
        ({"segment_size": 4, "num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads 4"),
    ],
)
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"InfiniAttention: {message}"):
        InfiniAttention(EMBED, HEADS, **arguments)


def test_the_page():
    layers.run_page(Path(__file__).resolve().parent.parent / "docs" / "segment_memory.md", 4)
