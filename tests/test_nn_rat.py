"""RAT and RATPlus: the published equations, and that training form, prefill and step are one layer."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Subject

from memattn.nn import RAT, RATPlus
from memattn.ops import RATState

EMBED = 48


def rat(heads=2, **settings):
    return lambda **kw: RAT(EMBED, heads, head_dim=16, **settings, **kw)


def plus(**settings):
    return lambda **kw: RATPlus(EMBED, 2, head_dim=16, **settings, **kw)


SUBJECTS = {
    "rat": Subject(rat(chunk_size=8), EMBED),
    "four heads": Subject(rat(4, chunk_size=5, rope_base=None), EMBED, chunk=5),
    "plus": Subject(plus(dilation=4), EMBED),
    "plus, window": Subject(plus(dilation=4, window=3, prefix_len=2), EMBED),
}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore:memattn.rat_attention")
@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_promises(subject, check):
    layers.run(check, subject)


def rotated(x, chunk):
    """x [H, K] turned by the chunk's index, as complex numbers."""
    half = x.shape[-1] // 2
    angle = chunk * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def test_rat_is_the_published_layer():
    """Token by token: gate, average inside the chunk, softmax over [ends; own], output gate. Groups are tiled."""
    layer = layers.fresh(SUBJECTS["rat"]).double()
    x = torch.randn(1, 19, EMBED, dtype=torch.float64)
    z, v, g, q, k = (x[0] @ layer.in_proj.weight.T).split([32, 32, 32, 32, 32], -1)
    gamma = (g + layer.gate_bias).sigmoid()
    outputs, ends = [], []
    for t in range(19):
        if t % 8 == 0:
            key, value = torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64)
        keep = gamma[t].view(2, 16)
        key, value = keep * key + (1 - keep) * k[t].view(2, 16), keep * value + (1 - keep) * v[t].view(2, 16)
        own = (rotated(key, t // 8), value)
        scores = torch.stack([(rotated(q[t].view(2, 16), t // 8) * e[0]).sum(-1) / 4 for e in (*ends, own)])
        o = (scores.softmax(0)[..., None] * torch.stack([e[1] for e in (*ends, own)])).sum(0)
        outputs.append((z[t].sigmoid() * o.flatten()) @ layer.out_proj.weight.T)
        if t % 8 == 7:
            ends.append(own)
    assert relative_error(layer(x)[0], torch.stack(outputs)) <= 1e-12


def test_groups_are_tiled_over_heads():
    layer = layers.fresh(replace(SUBJECTS["rat"], make=rat(4)))
    wide = RAT(EMBED, 4, head_dim=16, num_groups=4)
    shared = layer.in_proj.weight[3 * 64 :].view(2, 2, 16, EMBED)
    with torch.no_grad():
        wide.in_proj.weight.copy_(
            torch.cat((layer.in_proj.weight[: 3 * 64], shared.repeat(1, 2, 1, 1).view(128, EMBED)))
        )
        wide.out_proj.weight.copy_(layer.out_proj.weight)
        wide.gate_bias.copy_(layer.gate_bias)
    x = torch.randn(2, 40, EMBED)
    assert relative_error(layer(x), wide(x)) <= 2e-6


def test_gates_start_between_one_token_and_a_chunk():
    torch.manual_seed(0)
    bias = RAT(512, 8, chunk_size=16).gate_bias
    memory = bias.exp()
    assert 1 <= memory.min() < 2 and 14 < memory.max() <= 15 and abs(memory.mean() - 8) < 0.6
    assert RAT(64, 2, chunk_size=1).gate_bias.isfinite().all()


def test_a_dense_layer_may_become_sparse():
    """The published use of RAT+: trained with dilation 1, run with a larger one; far from it the window holds all."""
    layer = layers.fresh(replace(SUBJECTS["plus"], make=plus()))
    x = torch.randn(2, 20, EMBED)
    dense = layer(x)
    layer.dilation, layer.window = 64, 20
    assert relative_error(layer(x), dense) <= 2e-6
    layer.window = 0
    assert relative_error(layer(x), dense) > 1e-2


def test_step_makes_room_and_keeps_the_past():
    layer = layers.fresh(SUBJECTS["rat"])
    x = torch.randn(1, 300, EMBED)
    state, outputs = layer.init_state(1), []
    with torch.no_grad():
        for t in range(300):
            y, same = layer.step(x[:, t : t + 1], state)
            assert same is state
            outputs.append(y)
    assert state.keys.shape[1] >= 37
    assert relative_error(torch.cat(outputs, 1), layer(x)) <= 5e-6
    small = layer.init_state(1, max_tokens=10)
    assert small.keys.shape[1] == 1
    with pytest.raises(ValueError, match="more than the 1 entries"):
        small.copy_(state)
    assert isinstance(layer.init_state(1, max_tokens=400).copy_(state), RATState)


def test_bfloat16_state_is_rounded_where_the_cache_is():
    layer = layers.fresh(SUBJECTS["rat"], dtype=torch.bfloat16)
    _, state = layer(torch.randn(1, 19, EMBED).bfloat16(), return_state=True)
    assert state.keys.dtype == torch.bfloat16 and state.running_key.dtype == torch.float32
    assert math.isfinite(state.running_key.sum())


@pytest.mark.parametrize("make,message", [
    (lambda: RAT(50, 4), "RAT: embed_dim 50 is no multiple of num_heads 4; give head_dim"),
    (lambda: RAT(64, 0), "RAT: num_heads is 0; expected at least 1"),
    (lambda: RATPlus(64, 4, num_groups=0), "RATPlus: num_groups is 0; expected at least 1"),
    (lambda: RAT(64, 4, num_groups=3), "RAT: num_groups is 3; expected a divisor of num_heads 4"),
    (lambda: RAT(64, 8), "RAT: head_dim is 8; allowed: 16..256, even with rope_base"),
    (lambda: RAT(68, 4), "RAT: head_dim is 17; allowed: 16..256, even with rope_base"),
    (lambda: RAT(64, 4, chunk_size=0), "RAT: chunk_size is 0; expected at least 1"),
    (lambda: RATPlus(64, 4, dilation=0), "RATPlus: dilation is 0; expected at least 1"),
    (lambda: RATPlus(64, 4, window=-1), "RATPlus: window is -1; expected at least 0"),
])  # fmt: skip
def test_wrong_sizes_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_page_runs():
    """The code of docs/rat_attention.md, as one program."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "rat_attention.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 2
    scope = {}
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, "docs/rat_attention.md", "exec"), scope)
    assert scope["y_t"].shape == (2, 1, 256)
