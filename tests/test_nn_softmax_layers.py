"""SlidingWindowAttention and ForgettingAttention: the published formula, and what every memory layer promises."""

import copy
from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Subject
from torch.nn import functional as F

from memattn.nn import ForgettingAttention, SlidingWindowAttention
from memattn.nn.rotary import rotary

EMBED = 48


def window(**settings):
    return lambda **kw: SlidingWindowAttention(EMBED, 3, window=8, **settings, **kw)


def forgetting(**settings):
    return lambda **kw: ForgettingAttention(EMBED, 3, **settings, **kw)


MAKE = {
    "window": window(),
    "sinks": window(num_sinks=2, sink_logits=True, rope_base=None, bias=True),
    "grouped window": lambda **kw: SlidingWindowAttention(
        EMBED, 4, window=8, head_dim=16, num_kv_heads=2, qk_norm=True, num_sinks=3, **kw
    ),
    "window 1": lambda **kw: SlidingWindowAttention(EMBED, 3, window=1, num_sinks=1, **kw),
    "forgetting": forgetting(),
    "plain forgetting": forgetting(qk_norm=False, output_gate=False, output_norm=False, rope_base=1e4, forget_bias=2.0),
    "grouped forgetting": lambda **kw: ForgettingAttention(EMBED, 4, head_dim=16, num_kv_heads=2, **kw),
}
SUBJECTS = {name: Subject(make, EMBED, chunk=8, state_options={"max_tokens": 64}) for name, make in MAKE.items()}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


VARIANTS = ("window 1", "grouped window", "plain forgetting", "grouped forgetting")  # that differ in the arithmetic
ARITHMETIC = ("prefill_then_step_equals_one_call", "padded_rows_equal_their_runs_alone", "step_on_a_pool_of_states")


@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_promises(name, check, full):
    if name in VARIANTS and check not in ARITHMETIC and not full:
        pytest.skip("--full: variants of a layer in every check")
    layers.run(check, SUBJECTS[name])


# --- what they compute ------------------------------------------------------------------------------------------------


def published(layer, x):
    """The layer's equations with all scores at once, in the dtype of x."""
    p = {n: q.to(x.dtype) for n, q in layer.named_parameters()}
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    z = F.linear(x, p["qkv_proj.weight"], p.get("qkv_proj.bias"))
    q, k, v = z.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (kv_heads, dim)), v.unflatten(-1, (kv_heads, dim))

    def normalised(y, weight):
        return y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    if "q_norm.weight" in p:
        q, k = normalised(q, p["q_norm.weight"]), normalised(k, p["k_norm.weight"])
    position = torch.arange(x.shape[1])
    if layer.rope_base is not None:
        frequency = torch.tensor([layer.rope_base ** (-2 * d / dim) for d in range(dim // 2)], dtype=x.dtype)
        turn = torch.polar(torch.ones((), dtype=x.dtype), position[:, None].to(x.dtype) * frequency)[:, None]
        q, k = (torch.complex(y[..., : dim // 2], y[..., dim // 2 :]) * turn for y in (q, k))
        q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
    k, v = (y.repeat_interleave(heads // kv_heads, 2) for y in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * dim**-0.5
    ahead = position[:, None] - position
    seen = ahead >= 0
    if isinstance(layer, SlidingWindowAttention):
        seen = seen & ((ahead < layer.window) | (position < layer.num_sinks))
    else:
        log_f = F.logsigmoid(F.linear(x, p["forget_proj.weight"], p["forget_proj.bias"])).transpose(1, 2)
        total = log_f.cumsum(-1)
        s = s + total[..., :, None] - total[..., None, :]
    s = s.masked_fill(~seen, -torch.inf)
    if "sink" in p:
        s = torch.cat([p["sink"][:, None, None].expand(*s.shape[:3], 1), s], -1)
    o = torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., -x.shape[1] :], v)
    if "norm.weight" in p:
        o = normalised(o, p["norm.weight"])
    if "gate_proj.weight" in p:
        o = o * F.linear(x, p["gate_proj.weight"]).sigmoid().view_as(o)
    return F.linear(o.flatten(-2), p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize("name", SUBJECTS)
def test_published_formula_and_gradients(name):
    layer, x = layers.fresh(SUBJECTS[name]), layers.draw(2, 70, EMBED).requires_grad_()
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y, truth = layer(x), published(exact, x64)
    layers.close(y, truth, 5e-6)
    weights = layers.draw(2, 70, EMBED, seed=3)
    (y * weights).sum().backward()
    (truth * weights.double()).sum().backward()
    layers.close(x.grad, x64.grad, 1e-5)
    for (n, p), (_, p64) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
        scale = max(p64.grad.norm().item(), 1e-3)
        assert relative_error(p.grad, p64.grad, scale) <= 5e-5, n


def test_rotary_depends_on_differences_alone_and_is_exact_far_out():
    x = layers.draw(1, 4, 2, 16)
    near, far = (rotary(x, torch.arange(4) + start) for start in (0, 10**6))
    for a, b in ((near, far),):
        ours, theirs = (torch.einsum("bihd,bjhd->bhij", y, y) for y in (a, b))
        layers.close(theirs, ours, 1e-6)
    assert torch.equal(rotary(x, torch.zeros(4)), x)


def test_states_have_the_published_size():
    layer = SlidingWindowAttention(EMBED, 3, window=8, num_sinks=2)
    _, state = layer(layers.draw(2, 100, EMBED), return_state=True)
    assert state.k.shape == state.v.shape == (2, 10, 3, 16) and state.length.tolist() == [100, 100]
    _, state = ForgettingAttention(EMBED, 3)(layers.draw(2, 100, EMBED), return_state=True)
    assert state.k.shape == (2, 100, 3, 16) and state.c.shape == (2, 100, 3) and state.c.dtype == torch.float64


def test_a_step_in_a_long_text_meets_the_parallel_form():
    for layer in (SlidingWindowAttention(EMBED, 3, window=100, num_sinks=4), ForgettingAttention(EMBED, 3)):
        x = layers.draw(1, 1100, EMBED)
        with torch.no_grad():
            y, (_, state) = layer(x), layer(x[:, :1090], return_state=True)
            stepped = torch.cat([layer.step(token, state)[0] for token in x[:, 1090:].split(1, 1)], 1)
        layers.close(stepped, y[:, 1090:], 5e-6)


def test_forget_bias_starts_where_it_was_set():
    layer = ForgettingAttention(EMBED, 3, forget_bias=1.5)
    assert layer.forget_proj.bias.eq(1.5).all()
    assert ForgettingAttention(EMBED, 3).forget_proj.bias.eq(0).all()


def test_extra_repr():
    text = repr(MAKE["grouped window"]())
    assert "48, num_heads=4, head_dim=16, num_kv_heads=2, rope_base=10000.0, window=8, num_sinks=3" in text
    assert "sink_logits=True" in repr(MAKE["sinks"]())
    assert "qk_norm=True, output_gate=True, output_norm=True, forget_bias=0.0" in repr(MAKE["forgetting"]())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SlidingWindowAttention(50, 3, window=4), "embed_dim 50 is no multiple of num_heads 3; give head_dim"),
        (lambda: SlidingWindowAttention(48, 3, window=0), "window is 0; expected at least 1"),
        (lambda: SlidingWindowAttention(48, 3, window=4, num_sinks=-1), "num_sinks is -1; expected at least 0"),
        (lambda: SlidingWindowAttention(48, 0, window=4), "num_heads is 0; expected at least 1"),
        (lambda: SlidingWindowAttention(48, 3, window=4, num_kv_heads=2), "num_kv_heads is 2; expected a divisor of"),
        (lambda: SlidingWindowAttention(48, 6, window=4), "head_dim is 8; allowed: 16..256"),
        (lambda: SlidingWindowAttention(51, 3, window=4), "head_dim is 17; rotary positions need an even one"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_page_runs():
    """The code of docs/softmax_layers.md runs, and its assertions hold."""
    page = (Path(__file__).parent.parent / "docs" / "softmax_layers.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/softmax_layers.md", "exec"), scope)
