"""InfLLMAttention: its definition as a loop over queries, dense attention as its limit, and what layers promise."""

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject

from memattn.nn import InfLLMAttention
from memattn.nn.rotary import rotary
from memattn.ops import attention

EMBED = 64
SMALL = {"window": 5, "num_sinks": 2, "block_size": 2, "top_blocks": 2, "representatives": 1}


def make(**settings):
    settings = {**SMALL, "head_dim": 16, "num_kv_heads": 2, "query_chunk": 1, **settings}
    return lambda **kw: InfLLMAttention(EMBED, 4, **settings, **kw)


SUBJECT = Subject(
    make(),
    EMBED,
    chunk=8,
    state_options={"max_tokens": 64},
    lacks=Lacks(pool="steps read the memory of their own row", compile="a loop of one chunk per token is no graph"),
)


@pytest.fixture(autouse=True)
def on_device(device):
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("check", [name for name in layers.CHECKS if "compile" not in name])
def test_promises(check):
    layers.run(check, SUBJECT)


def defined(layer, x):
    """y [T, embed_dim] of one sequence in one call, query by query over lists of tokens."""
    q, k, v = (y[0] for y in layer._heads(x[None]))
    window, size, sinks, heads = layer.window, layer.block_size, layer.num_sinks, layer.num_heads
    group, tokens = heads // layer.num_kv_heads, len(x)
    turn = lambda y, p: rotary(y[None, None], torch.tensor([[p]]), layer.rope_base)[0, 0]  # noqa: E731
    angle = {"window": lambda i: window - 1}.get(layer.remote_positions, lambda i: i)
    mass, outputs = torch.zeros(tokens, layer.num_kv_heads, dtype=x.dtype), []
    for start in range(0, tokens, layer.query_chunk):
        chunk = range(start, min(start + layer.query_chunk, tokens))
        gone = max(start - window + 1, 0) // size
        mean = torch.stack([turn(q[i], angle(i)) for i in chunk]).mean(0)
        scores = {}
        for b in range(sinks // size, gone):
            score = 0.0
            for h in range(heads):
                g = h // group
                best = mass[b * size : (b + 1) * size, g].topk(layer.representatives).indices + b * size
                score += float(mean[h] @ k[best, g].mean(0))
            scores[b] = score
        chosen = sorted(scores, key=lambda b: -scores[b])[: layer.top_blocks]
        added = torch.zeros_like(mass)
        for i in chunk:
            near = range(max(i - window + 1, 0), i + 1)
            far = [j for j in range(i - window + 1) if j < sinks or j // size in chosen or j // size >= gone]
            row = []
            for h in range(heads):
                g = h // group
                keys = [turn(k[j], j)[g] for j in near]
                s = [float(turn(q[i], i)[h] @ key) for key in keys]
                remote = [turn(k[j], j)[g] if layer.remote_positions == "true" else k[j, g] for j in far]
                s += [float(turn(q[i], angle(i))[h] @ key) for key in remote]
                p = (torch.tensor(s, dtype=x.dtype) / layer.head_dim**0.5).softmax(0)
                row.append(p @ v[[*near, *far], g])
                added[list(near), g] += p[: len(near)]
            outputs.append(layer.out_proj(torch.cat(row)))
        mass += added
    return torch.stack(outputs)


@pytest.mark.parametrize("remote_positions", ["window", "true", "query"])
@pytest.mark.parametrize("query_chunk, size", [(1, 2), (4, 2), (3, 4)])
def test_equals_its_definition(remote_positions, query_chunk, size):
    settings = {"block_size": size, "num_sinks": size, "representatives": size // 2, "query_chunk": query_chunk}
    torch.manual_seed(0)
    layer = make(**settings, remote_positions=remote_positions)(dtype=torch.float64)
    x = 3 * layers.draw(1, 31, EMBED, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(layer(x)[0], defined(layer, x[0])) < 1e-12


@pytest.mark.parametrize("query_chunk", [1, 4, 100])
def test_with_all_blocks_and_true_positions_it_is_dense_attention(query_chunk):
    layer = make(top_blocks=100, query_chunk=query_chunk, remote_positions="true")()
    x = layers.draw(2, 40, EMBED)
    q, k, v = layer._heads(x)
    position = torch.arange(40)
    dense = attention(rotary(q, position), rotary(k, position), v).o
    assert relative_error(layer(x), layer.out_proj(dense.flatten(-2))) < 5e-6


def test_a_needle_is_found_at_every_depth():
    """A block that holds the key asked for is chosen wherever it lies; with it out of reach, it is not."""
    layer = make(top_blocks=1, num_sinks=0, representatives=1, remote_positions="window")(dtype=torch.float64)
    generator = torch.Generator("cpu").manual_seed(3)
    for depth in range(0, 30, 2):
        x = 0.1 * torch.randn(1, 40, EMBED, generator=generator, dtype=torch.float64, device="cpu").to(
            torch.get_default_device()
        )
        with torch.no_grad():
            memory = layer(x[:, :39], return_state=True)[1]
            memory.cache.k[:, depth] = memory.representative[:, depth // 2] = 50.0
            q = torch.ones(1, 1, 4, 16, dtype=torch.float64)
            lists = layer._lists(q, torch.ones(1, 1, dtype=torch.bool), memory.length, memory)
        assert lists[0, 0, 0, 0] == depth // 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_sinks": 3}, "num_sinks is 3; expected a multiple of block_size 2"),
        ({"representatives": 3}, "representatives is 3; allowed: 1..2"),
        ({"window": 0}, "window is 0; expected at least 1"),
        ({"remote_positions": "none"}, "remote_positions is 'none'; allowed"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)()
