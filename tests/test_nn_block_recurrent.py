"""BlockRecurrentAttention: the published layer written out, and what every memory layer promises."""

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject

from memattn.nn import BlockRecurrentAttention

EMBED, WINDOW = 32, 6
LACKS = Lacks(
    pool="a step changes whole memories; pick rows with reorder",
)


def subject(**settings):
    def make(**kw):
        return BlockRecurrentAttention(EMBED, 2, window=WINDOW, num_states=5, **settings, **kw)

    return Subject(make, EMBED, WINDOW, LACKS)


SUBJECTS = {"bias": subject(), "full": subject(gate="full", rope_base=None), "lstm": subject(gate="lstm")}
OF_THE_GATES = ("two_calls_equal_one", "prefill_then_step_equals_one_call", "gradients_reach_every_parameter")


@pytest.mark.parametrize(
    "name, check", [(n, c) for n in SUBJECTS for c in layers.CHECKS if n == "bias" or c in OF_THE_GATES]
)
def test_promises_of_a_layer(name, check):
    layers.run(check, SUBJECTS[name])


def rotate(x, positions):
    """Each pair (i, i + K/2) turned by position · 10000^(−2i/K)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions * 10000 ** (-2 * i / x.shape[-1])
        out[:, i] = x[:, i] * angle.cos() - x[:, half + i] * angle.sin()
        out[:, half + i] = x[:, half + i] * angle.cos() + x[:, i] * angle.sin()
    return out


def published(layer, x):
    """One sequence [T, D], window by window and head by head, after meliad's transformer_layer.py."""
    p = {n: q.detach() for n, q in layer.named_parameters()}
    heads, dim, window = layer.num_heads, layer.head_dim, layer.segment_len

    def unit(z):
        return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def head(z, h):
        return z[:, h * dim : (h + 1) * dim]

    def attend(scores, values):
        return scores.softmax(-1) @ values

    states, outputs = p["initial_states"], []
    q, q2, k, v = (x @ p["token_proj.weight"].T).chunk(4, -1)
    for start in range(0, len(x), window):
        stop, first = min(start + window, len(x)), max(0, start - window)
        normed = states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p["state_norm.weight"]
        normed = normed + p["state_positions"]
        sq, sq2 = (normed @ p["state_query_proj.weight"].T).chunk(2, -1)
        sk, sv = (normed @ p["state_key_proj.weight"].T).chunk(2, -1)
        by_window, by_states, of_states, of_tokens = [], [], [], []
        for h in range(heads):
            scale = p["score_scale"][:, h]
            at, seen = torch.arange(start, stop).double(), torch.arange(first, stop).double()
            queries, keys = unit(head(q, h)[start:stop]), unit(head(k, h)[first:stop])
            turned = (queries, keys) if layer.rope_base is None else (rotate(queries, at), rotate(keys, seen))
            distance = at[:, None] - seen
            s = (scale[0] * turned[0] @ turned[1].T).masked_fill((distance < 0) | (distance >= window), -torch.inf)
            by_window.append(attend(s, head(v, h)[first:stop]))
            state_keys = unit(head(sk, h))
            by_states.append(attend(scale[1] * unit(head(q2, h)[start:stop]) @ state_keys.T, head(sv, h)))
            of_states.append(attend(scale[2] * unit(head(sq, h)) @ state_keys.T, head(sv, h)))
            of_tokens.append(attend(scale[3] * unit(head(sq2, h)) @ keys.T, head(v, h)[first:stop]))
        outputs.append(torch.cat([*by_window, *by_states], -1) @ p["out_proj.weight"].T)
        if stop - start < window:
            break
        hidden = torch.cat([*of_states, *of_tokens], -1)
        y = hidden @ p["state_out_proj.weight"].T
        if layer.gate == "bias":
            g = p["gate_bias"].sigmoid()
            states = states * g + y * (1 - g)
            continue
        logits = hidden @ p["gate_proj.weight"].T + p["gate_proj.bias"]
        if layer.gate == "full":
            g = (logits + 1).sigmoid()
            states = states * g + y * (1 - g)
        else:
            forget, write = logits.chunk(2, -1)
            states = states * (forget + 1).sigmoid() + y * (write - 1).sigmoid()
    return torch.cat(outputs), states


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_published_layer(name, backend):
    layer, x = layers.fresh(SUBJECTS[name]).double(), layers.draw(2, 3 * WINDOW + 2, EMBED).double()
    layer.backend = backend
    y, state = layer(x, return_state=True)
    for b in range(2):
        truth, states = published(layer, x[b])
        torch.testing.assert_close(y[b], truth, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(state.memory.slots[b], states, rtol=1e-9, atol=1e-10)
    assert state.memory.written.tolist() == [3, 3] and state.filled.tolist() == [2, 2]


def test_how_far_a_token_reaches():
    """Inside the layer by the window exactly; through the states from the next window on."""
    layer, x = layers.fresh(SUBJECTS["bias"]), layers.draw(1, 4 * WINDOW, EMBED)
    with torch.no_grad():
        layer.out_proj.weight[:, EMBED:] = 0  # the window's half alone
    other = x.clone()
    other[:, 8] += 1
    changed = (layer(other) != layer(x)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(8, 8 + WINDOW))
    layer = layers.fresh(SUBJECTS["bias"])
    with torch.no_grad():
        layer.out_proj.weight[:, :EMBED] = 0  # the states' half alone
    changed = (layer(other) != layer(x)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [8, *range(2 * WINDOW, 4 * WINDOW)]  # 8 by its own query


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    layer = BlockRecurrentAttention(128, 4, window=8, num_states=200, gate="lstm")
    assert layer.score_scale.eq(1).all() and layer.state_norm.weight.eq(1).all()
    assert abs(layer.initial_states.std() - 0.1) < 0.005 and abs(layer.state_positions.std() - 1) < 0.05
    assert (
        abs(layer.gate_proj.weight.std() - (0.1 / 256) ** 0.5) < 1e-3 and abs(layer.gate_proj.bias.std() - 0.1) < 0.02
    )


def test_refusals():
    for settings, message in (
        (dict(embed_dim=30, num_heads=4), "embed_dim 30 is no multiple of num_heads 4"),
        (dict(num_heads=0), "num_heads is 0; expected at least 1"),
        (dict(num_heads=4), "embed_dim / num_heads is 8; allowed: 16..256"),
        (dict(window=0), "window is 0; expected at least 1"),
        (dict(num_states=0), "num_states is 0; expected at least 1"),
        (dict(gate="gru"), "gate is 'gru'; allowed: 'bias', 'full', 'lstm'"),
        (dict(embed_dim=51, num_heads=3), "head dimension 17 is odd; rotary positions need pairs"),
    ):
        arguments = {"embed_dim": 32, "num_heads": 2, "window": 4, "num_states": 3, **settings}
        with pytest.raises(ValueError, match=f"BlockRecurrentAttention: {message}"):
            BlockRecurrentAttention(arguments.pop("embed_dim"), arguments.pop("num_heads"), **arguments)
