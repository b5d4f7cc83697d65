"""MultivariateInfiniAttention: attention along a series, memory across the set."""

import copy
import pickle

import pytest
import torch
from support.compare import relative_error
from support.layers import draw
from torch.nn import functional as F

from memattn.nn import MultivariateInfiniAttention
from memattn.nn.rotary import rotary

EMBED, HEADS, SERIES, LENGTH = 64, 4, 5, 7


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


def make(beta=0.3, **settings):
    torch.manual_seed(0)
    layer = MultivariateInfiniAttention(EMBED, HEADS, num_kv_heads=2, **settings)
    with torch.no_grad():
        layer.beta.fill_(beta)
    return layer


def inputs():
    return draw(2, SERIES, LENGTH, EMBED)


def published(layer, x):
    """The equations of the docstring, series by series."""
    q, k, v = (y.view(2, SERIES, LENGTH, -1, 16).transpose(2, 3) for y in layer._heads(x.flatten(0, 1)))
    k, v = (y.repeat_interleave(2, 2) for y in (k, v))  # [B, N, H, T, D]
    positions = torch.arange(LENGTH)
    turned_q, turned_k = (rotary(y.flatten(0, 1).transpose(1, 2), positions).transpose(1, 2) for y in (q, k))
    local = F.scaled_dot_product_attention(turned_q, turned_k, v.flatten(0, 1), is_causal=layer.causal).view(q.shape)
    feature_q, feature_k = F.elu(q) + 1, F.elu(k) + 1
    memory, z = (feature_k.mT @ v).sum(1, keepdim=True), feature_k.sum(3)[..., None].sum(1, keepdim=True)
    recalled = feature_q @ memory / (feature_q @ z + layer.eps)
    gate = layer.beta.sigmoid()[:, None, None]
    return layer.out_proj((gate * recalled + (1 - gate) * local).transpose(2, 3).flatten(3))


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_published_form(causal):
    layer, x = make(causal=causal).double(), inputs().double()
    assert relative_error(layer(x), published(layer, x)) < 1e-10


def test_the_series_may_stand_in_any_order():
    layer, x, order = make(), inputs(), torch.tensor([3, 0, 4, 1, 2])
    assert relative_error(layer(x[:, order]), layer(x)[:, order]) < 1e-5
    ordered = make(delta=True)
    assert relative_error(ordered(x[:, order]), ordered(x)[:, order]) > 1e-4


def test_every_series_reads_all_and_the_gate_is_the_memorys():
    x = inputs()
    other = x.clone()
    other[:, -1] += 1
    for layer in (make(), make(beta=-40.0)):
        changed = (layer(other) - layer(x)).abs().amax((0, 2, 3)) > 1e-4
        assert changed.tolist() == ([True] * SERIES if layer.beta[0] > 0 else [False] * (SERIES - 1) + [True])


def test_a_masked_series_is_as_if_it_were_not_there():
    layer, x = make(), inputs()
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    x[0, 1] = torch.nan
    y = layer(x, series_mask=mask)
    assert y[0, ~mask[0]].eq(0).all()
    assert relative_error(y[:1, mask[0]], layer(x[:1, mask[0]])) < 1e-5
    assert relative_error(y[1:], layer(x[1:])) < 1e-5


def test_gradients_reach_every_parameter_and_it_compiles():
    layer, x = make(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (layer, compiled):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert relative_error(gradients[1][name], gradient) < 1e-5


def test_an_ordinary_module():
    layer, x = make(causal=True), inputs()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    meta = MultivariateInfiniAttention(EMBED, HEADS, device="meta")
    assert meta(x.to("meta")).shape == x.shape
    meta.to_empty(device=x.device).reset_parameters()
    assert meta(x).isfinite().all()
    assert layer(x[:, :0]).shape == (2, 0, LENGTH, EMBED) and layer(x[:, :, :0]).shape == (2, SERIES, 0, EMBED)
    narrow = make().bfloat16()
    assert relative_error(narrow(x.bfloat16()), copy.deepcopy(narrow).double()(x.bfloat16().double())) < 3e-2
    assert "causal=True" in repr(layer)


def test_wrong_inputs_are_refused_by_name():
    layer, x = make(), inputs()
    with pytest.raises(ValueError, match=r"MultivariateInfiniAttention: x has shape \[5, 7, 64\]; expected \[B, N, T"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"series_mask has shape \[2, 4\]; expected \[B, N\] = \[2, 5\]"):
        layer(x, series_mask=torch.ones(2, 4))
