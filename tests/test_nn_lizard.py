"""Lizard: the published two branches in all their readings, and all forms of a layer."""

import copy
from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Subject, draw
from torch.nn import functional as F

from memattn.nn import Lizard

EMBED, WINDOW = 32, 6
LAYERS = {
    "sinks": dict(),
    "tokens": dict(meta="prefix_tokens", num_meta=3, normalize=False, num_kv_heads=1),
    "bare": dict(num_meta=0, activation="exp", head_dim=24, feature_dim=12),
}
SUBJECTS = {
    name: Subject(
        lambda settings=settings, **kw: Lizard(EMBED, 2, **{"window": WINDOW, "feature_dim": 8, **settings}, **kw),
        EMBED,
        WINDOW,
    )
    for name, settings in LAYERS.items()
}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("subject, check", layers.matrix(SUBJECTS, compiled=("sinks", "tokens")))
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


def published(layer, x):
    """The equations of the class docstring for one row x [T, D], token by token."""
    p = dict(layer.named_parameters())
    heads, kv, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = F.linear(x, p["qkv_proj.weight"]).split([heads * dim, kv * dim, kv * dim], -1)
    gamma, outputs = torch.sigmoid(F.linear(x, p["gate_proj.weight"]))[:, 0], []

    def feature(row, weight):
        halves = (row @ weight, -(row @ weight))
        return torch.cat([z.exp() if layer.activation == "exp" else z.softmax(-1) for z in halves], -1)

    for h in range(heads):
        group = h // (heads // kv)
        qh = q.view(-1, heads, dim)[:, h]
        kh, vh = (z.view(-1, kv, dim)[:, group] for z in (k, v))
        fq, fk = feature(qh, p["q_features"][h]), feature(kh, p["k_features"][group])
        rows = []
        for i in range(len(x)):
            weights = torch.stack([fq[i] @ fk[t] * gamma[t + 1 : i + 1].prod() for t in range(i + 1)])
            total = weights.sum() if layer.normalize else 1.0
            first = max(0, i - layer.window + 1)
            scores, values = kh[first : i + 1] @ qh[i] / dim**0.5, vh[first : i + 1]
            if "meta_k" in p:
                scores = torch.cat([p["meta_k"][0, :, group] @ qh[i] / dim**0.5, scores])
                values = torch.cat([p["meta_v"][0, :, group], values])
            below = scores.exp().sum() + (p["sink"][h].exp().sum() if "sink" in p else 0.0)
            rows.append(weights @ vh[: i + 1] / total + p["alpha"] * (scores.exp() @ values) / below)
        outputs.append(torch.stack(rows))
    return F.linear(torch.stack(outputs, 1).flatten(1), p["out_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_published_formula_and_gradients(name, dtype):
    layer = layers.fresh(SUBJECTS[name]).to(dtype)
    exact, x = copy.deepcopy(layer).double(), draw(2, 40, EMBED, dtype=dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, truth = layer(x), torch.stack([published(exact, row) for row in x64])
    assert relative_error(y, truth) <= (1e-5 if dtype == torch.float32 else 3e-2)
    if dtype == torch.float32:
        weights = draw(2, 40, EMBED, seed=3)
        (y * weights).sum().backward()
        (truth * weights.double()).sum().backward()
        layers.close(x.grad, x64.grad, 2e-5)
        for (n, p), (_, q) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
            assert relative_error(p.grad, q.grad) <= 1e-4, n


def test_the_readings_differ():
    """Each of the choices that the paper leaves open changes the result."""
    x, outputs = draw(1, 20, EMBED), []
    for settings in ({}, {"normalize": False}, {"meta": "prefix_tokens"}, {"num_meta": 0}, {"activation": "exp"}):
        torch.manual_seed(0)
        outputs.append(Lizard(EMBED, 2, window=WINDOW, feature_dim=8, **settings)(x))
    for n, a in enumerate(outputs):
        assert all(relative_error(a, b) > 1e-3 for b in outputs[:n])


def test_state_dict_and_repr():
    shapes = {n: tuple(p.shape) for n, p in Lizard(EMBED, 2, num_kv_heads=1).state_dict().items()}
    assert shapes == {
        "qkv_proj.weight": (64, EMBED), "out_proj.weight": (EMBED, EMBED), "gate_proj.weight": (1, EMBED),
        "q_features": (2, 16, 128), "k_features": (1, 16, 128), "alpha": (1,), "sink": (2, 4),
    }  # fmt: skip
    layer = Lizard(EMBED, 2, meta="prefix_tokens")
    assert layer.meta_k.shape == (1, 4, 2, 16) and layer.sink is None
    assert "window=128, meta='prefix_tokens', num_meta=4, feature_dim=128" in repr(layer)
    state = layer.init_state(3)
    assert state.memory.shape == (3, 2, 256, 17) and state.window.k.shape == (3, 128, 2, 16)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"meta": "logits"}, "meta is 'logits'; allowed: 'sink_logits', 'prefix_tokens'"),
        ({"activation": "elu"}, "activation is 'elu'; allowed: 'exp', 'softmax'"),
        ({"window": 0}, "window is 0; allowed: ≥ 1"),
        ({"num_meta": -1}, "num_meta is -1; allowed: ≥ 0"),
        ({"feature_dim": 129}, r"feature_dim is 129; allowed: 8\.\.128"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads 2"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=f"Lizard: {message}"):
        Lizard(EMBED, 2, **settings)


def test_the_page():
    layers.run_page(Path(__file__).resolve().parent.parent / "docs" / "lizard.md", 1)
