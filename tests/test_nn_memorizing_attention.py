"""MemorizingAttention: the paper's equations written out, what is remembered when, and what every layer promises."""

import copy
from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject
from torch.nn import functional as F

from memattn.nn import MemorizingAttention

EMBED, SIZE = 48, 4
LACKS = Lacks(
    pool="a step writes whole segments; pick rows with reorder",
    state_gradient="Memorizing Transformers stops gradients at its memory",
)
CHOOSES = Lacks(pool=LACKS.pool, state_gradient=LACKS.state_gradient, bfloat16="rounding changes which keys are found")


def subject(lacks=LACKS, **settings):
    settings = {"segment_size": SIZE, "memory_size": 2 * SIZE, "num_neighbors": 8, **settings}
    chunk = settings["memory_size"] if settings["memory_size"] < 2 * SIZE else 2 * SIZE
    return Subject(lambda **kw: MemorizingAttention(EMBED, 3, **settings, **kw), EMBED, chunk=chunk, lacks=lacks)


SUBJECTS = {
    "gate": subject(),
    "joint": subject(CHOOSES, combine="joint", metric="cos", num_neighbors=3, rope_base=None),
    "grouped": subject(CHOOSES, num_kv_heads=1, num_neighbors=2, bias=True, head_dim=20),
    "short": subject(memory_size=SIZE),  # few segments to compile
}
COMPILED = ("it_compiles_as_one_graph", "the_step_compiles_as_one_graph")
ARITHMETIC = (
    "two_calls_equal_one",
    "prefill_then_step_equals_one_call",
    "padded_rows_equal_their_runs_alone",
    "packed_sequences_equal_separate_ones",
    "gradients_reach_every_parameter",
    "a_nan_stays_in_its_sequence",
)


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_promises(name, check, full):
    chosen = {"gate": set(layers.CHECKS) - {c for c in layers.CHECKS if "compile" in c}, "short": {*COMPILED}}
    if not full and check not in chosen.get(name, ARITHMETIC):
        pytest.skip("--full: variants of a layer in every check, and compiled with padding")
    layers.run(check, SUBJECTS[name])


# --- the paper --------------------------------------------------------------------------------------------------------


def turned(x, position, base):
    """One vector [D] at a position: the pair (d, d + D/2) as a complex number."""
    half = len(x) // 2
    angle = position * torch.tensor([base ** (-d / half) for d in range(half)], dtype=x.dtype)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def published(layer, x):
    """One sequence [T, embed_dim] token by token and head by head: which keys it sees, and the softmaxes over them."""
    p = {n: q.to(x.dtype) for n, q in layer.named_parameters()}
    heads, kv_heads, dim, size = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.segment_len
    z = F.linear(x, p["qkv_proj.weight"], p.get("qkv_proj.bias"))
    q, k, v = z.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    outputs = []
    for i in range(len(x)):
        segment, heads_out = i // size, []
        for h in range(heads):
            g = h // (heads // kv_heads)
            qi, ks, vs = q[i, h * dim : (h + 1) * dim], k[:, g * dim : (g + 1) * dim], v[:, g * dim : (g + 1) * dim]
            scale = dim**-0.5
            if layer.metric == "cos":
                qi, ks, scale = qi / qi.norm(), ks / ks.norm(dim=-1, keepdim=True), p["log_scale"][h].exp()
            first = max(0, (segment - 1) * size)
            # Only the own segment has a gradient into its keys and values.
            seen = list(range(first, i + 1))
            own_k = torch.stack([ks[j] if j >= segment * size else ks[j].detach() for j in seen])
            own_v = torch.stack([vs[j] if j >= segment * size else vs[j].detach() for j in seen])
            memory = list(range(max(0, first - layer.memory_size), first))
            scores = qi.detach() @ ks[memory].detach().T
            best = sorted(range(len(memory)), key=lambda m: -scores[m].item())[: layer.num_neighbors]
            found = [memory[m] for m in best]
            if layer.rope_base is not None:
                qr = turned(qi, i, layer.rope_base)
                own_k = torch.stack([turned(y, j, layer.rope_base) for y, j in zip(own_k, seen, strict=True)])
            else:
                qr = qi
            local, remote = own_k @ qr * scale, ks[found].detach() @ qi * scale
            far = vs[found].detach()
            if layer.combine == "joint":
                o = torch.cat([local, remote]).softmax(0) @ torch.cat([own_v, far])
            else:
                gate = p["gate"][h].sigmoid() if found else 0.0
                o = (1 - gate) * (local.softmax(0) @ own_v) + gate * (remote.softmax(0) @ far)
            heads_out.append(o)
        outputs.append(torch.cat(heads_out))
    return F.linear(torch.stack(outputs), p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_paper_s_equations_and_gradients(name):
    layer, x = layers.fresh(SUBJECTS[name]).double(), layers.draw(1, 23, EMBED).double().requires_grad_()
    exact, x2 = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    y, truth = layer(x), published(exact, x2[0])[None]
    layers.close(y, truth, 1e-10)
    weights = layers.draw(1, 23, EMBED, seed=3).double()
    (y * weights).sum().backward()
    (truth * weights).sum().backward()
    layers.close(x.grad, x2.grad, 1e-9, "dx:")
    for (n, a), (_, b) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
        assert relative_error(a.grad, b.grad, max(b.grad.norm().item(), 1e-6)) <= 1e-9, n
    layers.close(copy.deepcopy(layer).float()(x.float()), truth, 1e-5, "float32:")


# --- the memory -------------------------------------------------------------------------------------------------------


def needle(distance, **settings):
    """Output of a layer whose last token looks for a key `distance` tokens back, and that token's value."""
    layer = MemorizingAttention(64, 1, segment_size=8, num_neighbors=4, rope_base=None, bias=False, **settings).double()
    with torch.no_grad():
        eye = torch.eye(64, dtype=torch.float64)
        layer.qkv_proj.weight.copy_(torch.cat([-eye, eye, eye]))  # so that a token does not look for itself
        layer.out_proj.weight.copy_(eye)
        if layer.gate is not None:
            layer.gate.fill_(40.0)
        x = layers.draw(1, 128, 64).double()
        x[:, -1] = -30 * x[:, -1 - distance]
        return layer(x)[0, -1], x[0, -1 - distance]


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("distance", [20, 33, 64, 100, 111, 119])
def test_a_needle_is_found_at_every_depth_of_the_memory_and_not_beyond(distance, combine):
    y, value = needle(distance, memory_size=96, combine=combine)
    held = 128 - 16 - 96  # the first token that the last segment's memory holds
    if 127 - distance < held:
        assert relative_error(y, value) > 0.1
    else:
        layers.close(y, value, 1e-6)


def test_all_neighbours_in_one_softmax_are_dense_attention():
    """A full budget: nothing is left out, so the layer is causal attention."""
    layer = layers.fresh(subject(combine="joint", memory_size=64, num_neighbors=64, rope_base=None)).double()
    x = layers.draw(2, 60, EMBED).double()
    q, k, v = layer._heads(x)
    o = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
    layers.close(layer(x), layer.out_proj(o.transpose(1, 2).flatten(2)), 1e-12)


def test_without_memory_the_gate_is_closed():
    """Empty rows, and a memory of size 0, give the local part alone: no NaN, whatever the gate."""
    layer = layers.fresh(SUBJECTS["gate"])
    with torch.no_grad():
        layer.gate.fill_(40.0)
    x = layers.draw(2, 2 * SIZE, EMBED)
    bare = copy.deepcopy(layer)
    bare.memory_size = 0
    assert torch.equal(layer(x), bare(x)) and layer(x).isfinite().all()
    longer = layers.draw(2, 5 * SIZE, EMBED)
    assert bare(longer).isfinite().all() and relative_error(layer(longer), bare(longer)) > 1e-3
    _, state = bare(longer, return_state=True)
    assert state.memory.k.shape == (2, 0, 3, 16) and state.memory.written.tolist() == [5, 5]


def test_the_ring_holds_whole_old_segments_of_each_row():
    layer, x = layers.fresh(SUBJECTS["gate"]), layers.draw(2, 19, EMBED)
    _, state = layer(x, attention_mask=torch.arange(19) < torch.tensor([[19], [9]]), return_state=True)
    memory, keys = state.memory, layer._heads(x)[1]
    assert memory.written.tolist() == [4, 2] and memory.held().tolist() == [8, 4] and state.filled.tolist() == [3, 1]
    layers.close(memory.k[0], keys[0, [*range(8, 12), *range(4, 8)]], 1e-6)
    layers.close(memory.k[1, :4], keys[1, :4], 1e-6)
    layers.close(memory.recent_k[1], keys[1, 4:8], 1e-6)
    after = state.reset(torch.tensor([0]))
    assert after.memory.held().tolist() == [0, 4]


def test_a_trained_layer_takes_another_memory_size():
    layer, x = layers.fresh(SUBJECTS["gate"]), layers.draw(1, 40, EMBED)
    small = layer(x)
    layer.memory_size = 32
    assert layer.init_state(1).memory.k.shape[1] == 32
    assert relative_error(layer(x)[:, -4:], small[:, -4:]) > 1e-3
    layer.memory_size = 30
    with pytest.raises(ValueError, match="memory_size is 30; expected 0 or a multiple of segment_size 4"):
        layer.init_state(1)


def test_initialisation_and_repr():
    layer = MemorizingAttention(64, 2, segment_size=8, memory_size=32, metric="cos")
    assert layer.gate.eq(0).all()
    torch.testing.assert_close(layer.log_scale.exp(), torch.full((2,), 20.0))
    assert "64, num_heads=2, head_dim=32, segment_size=8, memory_size=32, num_neighbors=32, combine='gate'" in repr(
        layer
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"segment_size": 0}, "segment_size is 0; expected at least 1"),
        ({"memory_size": -8}, "memory_size is -8; expected 0 or a multiple of segment_size 8"),
        ({"memory_size": 12}, "memory_size is 12; expected 0 or a multiple of segment_size 8"),
        ({"num_neighbors": 129}, "num_neighbors is 129; allowed: 1..128"),
        ({"combine": "add"}, "combine is 'add'; allowed: 'gate', 'joint'"),
        ({"metric": "l2"}, "metric is 'l2'; allowed: 'dot', 'cos'"),
        ({"head_dim": 17}, "head_dim is 17; rotary positions need an even one"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"MemorizingAttention: {message}"):
        MemorizingAttention(48, 3, **{"segment_size": 8, "memory_size": 16, **settings})


def test_the_page_runs():
    layers.run_page(Path(__file__).parent.parent / "docs" / "memorizing_attention.md", blocks=4)
