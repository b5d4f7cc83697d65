"""HierarchicalChunkMemory: the published read as a loop over tokens and chunks, and what every layer promises."""

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject

from memattn.nn import HierarchicalChunkMemory

EMBED, CHUNK = 48, 4
SUBJECT = Subject(
    lambda **kw: HierarchicalChunkMemory(EMBED, 3, chunk_size=CHUNK, top_k=2, **kw),
    EMBED,
    chunk=2 * CHUNK,
    state_options={"max_tokens": 64},
    lacks=Lacks(pool="steps read the memory of their own row"),
)
OWN = (  # what another statement below replaces, with its reason
    "gradients_reach_every_parameter",  # tokens before the first whole chunk have no output, so no gradient
    "later_tokens_do_not_reach_back",  # a token reaches its own output only beside a whole chunk
)


@pytest.fixture(autouse=True)
def on_device(device):
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("check", [name for name in layers.CHECKS if name not in OWN])
def test_promises(check):
    layers.run(check, SUBJECT)


def published(layer, x):
    """y [T, embed_dim] of one sequence, chunk by chunk."""
    size, heads, dim = layer.chunk_size, layer.num_heads, layer.head_dim
    frequency = 10000.0 ** (-torch.arange(EMBED // 2, dtype=x.dtype) / (EMBED // 2))
    angle = torch.arange(size - 1, -1, -1, dtype=x.dtype)[:, None] * frequency
    code, outputs = torch.cat([angle.sin(), angle.cos()], 1), []
    for t, query in enumerate(x):
        chunks = [x[a : a + size] for a in range(0, t - size + 1, size)]
        if not chunks:
            outputs.append(torch.zeros_like(query))
            continue
        means = torch.stack([chunk.mean(0) for chunk in chunks])
        scores = layer.chunk_key_proj(means) @ layer.chunk_query_proj(query) / EMBED**0.5
        best, chosen = scores.topk(min(layer.top_k, len(chunks)))
        total = torch.zeros_like(query)
        for weight, r in zip(best.softmax(0), chosen.tolist(), strict=True):
            k, v = layer.kv_proj(chunks[r] + code).chunk(2, -1)
            k, v = (y.unflatten(-1, (layer.num_kv_heads, dim)) for y in (k, v))
            k, v = (y.repeat_interleave(heads // layer.num_kv_heads, 1) for y in (k, v))
            q = layer.q_proj(query).unflatten(-1, (heads, dim))
            p = (torch.einsum("hd,lhd->hl", q, k) / dim**0.5).softmax(-1)
            total = total + weight * torch.einsum("hl,lhd->hd", p, v).flatten()
        outputs.append(layer.out_proj(total))
    return torch.stack(outputs)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_k": 100, "bias": True}, {"top_k": 1, "num_kv_heads": 1}])
def test_equals_the_published_read(settings):
    torch.manual_seed(0)
    layer = HierarchicalChunkMemory(EMBED, 3, chunk_size=CHUNK, dtype=torch.float64, **settings)
    x = layers.draw(2, 27, EMBED, dtype=torch.float64)
    truth = torch.stack([published(layer, row) for row in x])
    assert relative_error(layer(x), truth) < 1e-12
    assert layer(x)[:, :CHUNK].eq(0).all(), "an empty memory is not read"


def test_gradients_are_those_of_the_published_read_with_a_stopped_memory():
    torch.manual_seed(0)
    layer = HierarchicalChunkMemory(EMBED, 3, chunk_size=CHUNK, top_k=2, dtype=torch.float64)
    x, weights = (layers.draw(1, 14, EMBED, seed=s, dtype=torch.float64) for s in (1, 2))
    ours = torch.autograd.grad((layer(x) * weights).sum(), list(layer.parameters()))
    theirs = torch.autograd.grad((published(layer, x[0]) * weights[0]).sum(), list(layer.parameters()))
    for (name, _), a, b in zip(layer.named_parameters(), ours, theirs, strict=True):
        assert b.any() and relative_error(a, b) < 1e-11, name
    x.requires_grad_()
    layer(x)[:, -1].sum().backward()
    assert x.grad[:, -1].any() and x.grad[:, :-1].eq(0).all(), "past inputs are constants"


def test_a_planted_chunk_is_found_at_every_depth():
    """The chunk whose mean the query asks for alone decides the output."""
    layer = HierarchicalChunkMemory(EMBED, 3, chunk_size=CHUNK, top_k=1)
    with torch.no_grad():
        for p in (layer.chunk_query_proj, layer.chunk_key_proj):
            p.weight.copy_(torch.eye(EMBED))
        for depth in range(8):
            x = layers.draw(1, 8 * CHUNK + 1, EMBED)
            chunk = slice(depth * CHUNK, (depth + 1) * CHUNK)
            x[0, -1] = 10 * x[0, chunk].mean(0)
            kept = torch.zeros_like(x)
            kept[:, chunk], kept[:, -1] = x[:, chunk], x[:, -1]
            assert relative_error(layer(x)[:, -1], layer(kept)[:, -1]) < 1e-6


def test_a_chunk_is_seen_from_the_token_after_its_last():
    layer = HierarchicalChunkMemory(EMBED, 3, chunk_size=CHUNK)
    x = layers.draw(1, 3 * CHUNK, EMBED)
    other = x.clone()
    other[:, 2 * CHUNK - 2] += 1
    same = (layer(x) == layer(other)).all(-1)[0].tolist()
    assert same == [t != 2 * CHUNK - 2 and t < 2 * CHUNK for t in range(3 * CHUNK)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"num_kv_heads": 2}, "num_kv_heads is 2; expected a divisor of num_heads 3"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalChunkMemory(EMBED, 3, **settings)
    with pytest.raises(ValueError, match="embed_dim is 50; expected num_heads"):
        HierarchicalChunkMemory(50, 3)
