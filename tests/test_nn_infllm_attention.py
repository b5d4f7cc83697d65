"""InfLLMAttention and ActQKVAttention: their definition as a loop over queries, their limit, what layers promise."""

import math
from dataclasses import replace

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject

from memattn.nn import ActQKVAttention, InfLLMAttention
from memattn.nn.rotary import rotary
from memattn.ops import attention

EMBED = 64
SMALL = {"window": 5, "num_sinks": 2, "block_size": 2, "top_blocks": 2, "representatives": 1}


def make(kind=InfLLMAttention, **settings):
    settings = {**SMALL, "head_dim": 16, "num_kv_heads": 2, "query_chunk": 1, **settings}
    return lambda **kw: kind(EMBED, 4, **settings, **kw)


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


def probe(asking):
    """Σ w_i q_i with weights by the distance from the mean, query by query."""
    apart = [float((query - asking.mean(0)).square().sum()) for query in asking]
    if sum(apart) == 0:
        return asking.mean(0)
    return sum(w / sum(apart) * query for w, query in zip(apart, asking, strict=True))


def cut(layer, scores, chosen):
    """The first of `chosen`, best first, that together hold the layer's density of the softmax over all scores."""
    logits = {b: score / layer.num_heads / layer.head_dim**0.5 for b, score in scores.items()}
    total, kept, sum_kept = sum(math.exp(s) for s in logits.values()), [], 0.0
    for b in chosen:
        if layer.density < 1 and sum_kept >= layer.density:
            break
        kept.append(b)
        sum_kept += math.exp(logits[b]) / total
    return kept


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
        asking = torch.stack([turn(q[i], angle(i)) for i in chunk])
        mean = probe(asking) if isinstance(layer, ActQKVAttention) else asking.mean(0)
        scores = {}
        for b in range(sinks // size, gone):
            score = 0.0
            for h in range(heads):
                g = h // group
                best = mass[b * size : (b + 1) * size, g].topk(layer.representatives).indices + b * size
                score += float(mean[h] @ k[best, g].mean(0))
            scores[b] = score
        chosen = sorted(scores, key=lambda b: -scores[b])[: layer.top_blocks]
        if isinstance(layer, ActQKVAttention):
            chosen = cut(layer, scores, chosen)
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


@pytest.mark.parametrize("query_chunk, density", [(1, 0.5), (4, 0.3), (5, 0.9), (4, 1.0)])
def test_probe_and_cut_off_equal_their_definition(query_chunk, density):
    torch.manual_seed(0)
    layer = make(ActQKVAttention, query_chunk=query_chunk, top_blocks=6, density=density)(dtype=torch.float64)
    x = 3 * layers.draw(1, 31, EMBED, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        assert relative_error(y[0], defined(layer, x[0])) < 1e-12
        uncut = make(ActQKVAttention, query_chunk=query_chunk, top_blocks=6, density=1.0)(dtype=torch.float64)
        uncut.load_state_dict(layer.state_dict())
        assert torch.equal(y, uncut(x)) == (density == 1), "the cut-off did something"


@pytest.mark.parametrize(
    "check", ["prefill_then_step_equals_one_call", "padded_rows_equal_their_runs_alone", "no_sequence_is_no_error"]
)
def test_promises_of_actqkv(check):
    layers.run(check, replace(SUBJECT, make=make(ActQKVAttention, density=0.6, top_blocks=4)))


def test_a_flat_layer_reads_more_blocks_than_a_sharp_one():
    layer = make(ActQKVAttention, top_blocks=8, density=0.9)()
    flat, sharp = torch.zeros(1, 20), torch.zeros(1, 20)
    sharp[0, 7] = 1000.0
    none = torch.full((1, 20), -torch.inf)
    counts = [int((layer._choose(scores) >= 0).sum()) for scores in (flat, sharp, none)]
    assert counts == [8, 1, 0] and layer._choose(sharp).max() == 7


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
    with pytest.raises(ValueError, match="density is 0; expected in"):
        make(ActQKVAttention, density=0)()
