"""GatedDeltaNet and DeltaNet: the published formula, and that training form, prefill and step are one layer."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Subject, draw
from torch.nn import functional as F

from memattn import backends
from memattn.nn import DeltaNet, GatedDeltaNet
from memattn.nn.padding import PaddedRows
from memattn.reference import gated_delta_rule as reference

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
EMBED, T = 48, 70
LAYERS = {
    "gated": lambda **kw: GatedDeltaNet(EMBED, 3, **kw),
    "grouped": lambda **kw: GatedDeltaNet(
        EMBED, 2, head_dim=16, num_value_heads=4, value_head_dim=24, conv_size=3, conv_bias=True, chunk_size=16, **kw
    ),
    "negative": lambda **kw: GatedDeltaNet(EMBED, 2, head_dim=32, allow_neg_eigval=True, **kw),
    "delta": lambda **kw: DeltaNet(EMBED, 2, head_dim=16, num_value_heads=4, **kw),
    "delta_gate": lambda **kw: DeltaNet(EMBED, 3, conv_size=2, output_gate=True, allow_neg_eigval=True, **kw),
}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, seed=0, **kwargs):
    """The layer with weights large enough that gates and values vary."""
    torch.manual_seed(seed)
    layer = LAYERS[name](**kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    return layer


def close(x, y, tolerance=5e-6):
    assert relative_error(x, y) <= tolerance


# --- what it computes -------------------------------------------------------------------------------------------------


def published(layer, x):
    """The layer's equations in the dtype of x, token loop and torch's own convolution; see the class docstrings."""
    p = {n: q.to(x.dtype) for n, q in layer.named_parameters()}
    keys, values = layer.num_heads * layer.head_dim, layer.num_value_heads * layer.value_head_dim
    width = p["conv.weight"].shape[1]
    z = F.linear(x, p["qkv_proj.weight"]).transpose(1, 2)
    z = F.conv1d(F.pad(z, (width - 1, 0)), p["conv.weight"][:, None], p.get("conv.bias"), groups=z.shape[1])
    q, k, v = F.silu(z).transpose(1, 2).split([keys, keys, values], -1)
    heads = [q.unflatten(-1, (layer.num_heads, -1)), k.unflatten(-1, (layer.num_heads, -1))]
    heads.append(v.unflatten(-1, (layer.num_value_heads, -1)))
    beta = F.linear(x, p["beta_proj.weight"]).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    g = None
    if "A_log" in p:
        g = -p["A_log"].exp() * F.softplus(F.linear(x, p["decay_proj.weight"]) + p["dt_bias"])
    o, state = reference.loop(*heads, g, beta, qk_l2norm=True, output_final_state=True)
    o = o * (o.square().mean(-1, keepdim=True) + layer.norm.eps).rsqrt() * p["norm.weight"]
    if "gate_proj.weight" in p:
        o = o * F.silu(F.linear(x, p["gate_proj.weight"])).view_as(o)
    return F.linear(o.flatten(-2), p["out_proj.weight"]), state


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_published_formula_and_gradients(name, dtype):
    layer, x = make(name, dtype=dtype), draw(2, T, EMBED, dtype=dtype).requires_grad_()
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y, state = layer(x, return_state=True)
    truth, memory = published(exact, x64)
    close(y, truth, TOLERANCE[dtype])
    close(state.memory, memory, TOLERANCE[dtype])
    assert y.dtype == dtype and state.memory.dtype == state.conv.dtype == torch.float32
    if dtype == torch.float32:
        weights = draw(2, T, EMBED, seed=3).double()
        ((y * weights).sum() + state.memory.sum()).backward()
        ((truth * weights).sum() + memory.sum()).backward()
        close(x.grad, x64.grad, 1e-5)
        for (n, p), (_, p64) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
            assert relative_error(p.grad, p64.grad) <= 2e-5, n


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    layer = GatedDeltaNet(64, 2, num_value_heads=2048, value_head_dim=16)
    rate, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0 < rate.min() and rate.max() < 16 and abs(rate.mean() - 8) < 0.5
    assert 0.99e-3 < dt.min() and dt.max() < 0.101 and abs(dt.log().mean() - torch.tensor(0.01).log()) < 0.1
    assert layer.norm.weight.eq(1).all() and layer.conv.weight.abs().max() <= 0.5
    assert abs(layer.qkv_proj.weight.std() - (3 * 64) ** -0.5) < 1e-3


# --- one layer in all its forms, an ordinary module -------------------------------------------------------------------

SUBJECTS = {n: Subject(make, EMBED, chunk=33 if n == "gated" else 16) for n, make in LAYERS.items()}


@pytest.mark.parametrize("subject, check", layers.matrix(SUBJECTS))
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


# --- padding ----------------------------------------------------------------------------------------------------------

RUNS = [(0, T), (0, 50), (20, T), (30, 33), (69, T), (7, 7)]  # valid tokens [a, b) of each row


def padding(kind=torch.bool):
    position = torch.arange(T)
    return torch.stack([(a <= position) & (position < b) for a, b in RUNS]).to(kind)


def test_align_and_restore_are_inverse():
    mask, x = padding(), draw(len(RUNS), T, 3)
    rows = PaddedRows(mask, x)
    aligned = rows.align(x)
    for b, (i, j) in enumerate(RUNS):
        assert torch.equal(aligned[b, : j - i], x[b, i:j]) and aligned[b, j - i :].eq(0).all()
    assert torch.equal(rows.restore(aligned), torch.where(mask[..., None], x, 0))


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(2, 4), TypeError, "attention_mask is float32; expected bool or integer"),
        (torch.ones(2, 5, dtype=torch.bool), ValueError, r"shape \[2, 5\]; expected \[B, T\] = \[2, 4\]"),
        (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]), ValueError, "row 1 has 2 runs of valid tokens; expected one"),
        ([[1]], TypeError, "attention_mask is list; expected a torch.Tensor"),
    ],
)
def test_bad_masks(mask, error, message, device):
    if device != "cpu" and "runs" in message:
        pytest.skip("values are looked at in eager CPU calls")
    mask = mask.to(device) if isinstance(mask, torch.Tensor) else mask
    with pytest.raises(error, match=message):
        make("gated")(draw(2, 4, EMBED), attention_mask=mask)


def test_no_value_is_read_on_the_host():
    """On the meta device there are no values: any wait for one would fail."""
    layer = GatedDeltaNet(EMBED, 3, device="meta")
    x, mask = torch.empty(2, T, EMBED, device="meta"), torch.empty(2, T, dtype=torch.bool, device="meta")
    y, state = layer(x, layer.init_state(2), attention_mask=mask, return_state=True)
    assert y.shape == x.shape and state.memory.shape == (2, 3, 16, 16) and state.conv.shape == (2, 144, 3)


# --- the module itself -----------------------------------------------------------------------------------------------


def test_state_dict():
    layer = make("grouped")
    shapes = {n: tuple(p.shape) for n, p in layer.state_dict().items()}
    assert shapes == {
        "A_log": (4,), "dt_bias": (4,), "qkv_proj.weight": (160, EMBED), "conv.weight": (160, 3), "conv.bias": (160,),
        "beta_proj.weight": (4, EMBED), "gate_proj.weight": (96, EMBED), "norm.weight": (24,),
        "out_proj.weight": (EMBED, 96), "decay_proj.weight": (4, EMBED),
    }  # fmt: skip
    assert list(DeltaNet(EMBED, 3).state_dict()) == [
        "qkv_proj.weight", "conv.weight", "beta_proj.weight", "norm.weight", "out_proj.weight"
    ]  # fmt: skip
    other, x = make("grouped", seed=5), draw(1, 9, EMBED)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_extra_repr():
    text = repr(LAYERS["grouped"](backend="chunked"))
    assert "48, num_heads=2, head_dim=16, num_value_heads=4, value_head_dim=24, chunk_size=16, backend='chunk" in text
    assert "ShortConv(160, width=3, bias=True)" in text and "GatedRMSNorm(24, eps=1e-05)" in text
    assert "allow_neg_eigval=True" in repr(LAYERS["negative"]())


def test_compile_fullgraph_under_a_default_device(device):
    layer, x = make("gated"), draw(2, T, EMBED)
    if backends.choose("gated_delta_rule", backends.Request(device, torch.float32)) == "chunked":
        pytest.skip("plain torch uses unflatten, which does not compile under a default device")
    torch.set_default_device(device)
    close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_compile_with_inductor():
    layer, x = make("gated"), draw(2, T, EMBED)
    compiled = torch.compile(layer, fullgraph=True)
    y = compiled(x)
    close(y, layer(x))
    gradients = [torch.autograd.grad(z.square().sum(), list(layer.parameters())) for z in (y, layer(x))]
    for (n, _), a, b in zip(layer.named_parameters(), *gradients, strict=True):
        assert relative_error(a, b) <= 1e-5, n


PARALLEL = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from memattn.nn import GatedDeltaNet

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def make():
    torch.manual_seed(0)
    return GatedDeltaNet(32, 2)
x, whole = torch.randn(4, 20, 32, generator=torch.Generator().manual_seed(1)), make()
whole(x).square().mean().backward()
ddp = DistributedDataParallel(make())
y, state = ddp(x[2 * rank : 2 * rank + 2], return_state=True)
y.square().mean().backward()
for (name, p), q in zip(ddp.module.named_parameters(), whole.parameters()):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)

sharded, dtypes = make(), []
sharded.register_forward_pre_hook(lambda m, args: dtypes.append((args[0].dtype, args[1].memory.dtype)))
fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)),
            mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
y, after = sharded(x[2 * rank : 2 * rank + 2], state.detach(), return_state=True)
assert dtypes == [(torch.bfloat16, torch.float32)], dtypes
assert y.dtype == torch.bfloat16 and after.memory.dtype == after.conv.dtype == torch.float32
with torch.no_grad():
    exact = whole(x[2 * rank : 2 * rank + 2], state.detach())
assert ((y.float() - exact).norm() / exact.norm()).item() < 2e-2
y.square().mean().backward()
assert all(p.grad.full_tensor().isfinite().all() for p in sharded.parameters())
dist.barrier()
dist.destroy_process_group()
print("parallel ok", rank, flush=True)
os._exit(0)  # threads of the process group that the interpreter's end would catch alive end the process with an abort
"""


def test_ddp_and_fsdp2_on_two_processes(tmp_path):
    """DDP gradients are those of the whole batch; FSDP2 in bfloat16 leaves the float32 memory alone."""
    script = tmp_path / "worker.py"
    script.write_text(PARALLEL)
    command = [sys.executable, str(script)]
    workers = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for r in range(2)
    ]
    for rank, worker in enumerate(workers):
        text = worker.communicate(timeout=120)[0].decode()
        assert worker.returncode == 0 and f"parallel ok {rank}" in text, text


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: GatedDeltaNet(48, 5), ValueError, "embed_dim 48 is no multiple of num_heads 5; give head_dim"),
        (lambda: DeltaNet(48, 2, num_value_heads=3), ValueError, "num_value_heads is 3; expected a multiple of"),
        (lambda: DeltaNet(48, 3, conv_size=5), ValueError, "width is 5; allowed: 2, 3, 4"),
        (lambda: make("gated")(draw(2, 47)), ValueError, r"x has shape \[2, 47\]; expected \[B, T, embed_dim\]"),
        (lambda: make("gated")(draw(2, 9, 47)), ValueError, r"x has shape \[2, 9, 47\]"),
        (
            lambda: make("gated")(
                draw(1, 9, EMBED),
                attention_mask=torch.ones(1, 9, dtype=torch.bool),
                cu_seqlens=torch.tensor([0, 9]),
            ),
            ValueError,
            "attention_mask and cu_seqlens are both given; allowed: one",
        ),
        (
            lambda: make("gated")(draw(2, 9, EMBED), make("gated").init_state(3)),
            ValueError,
            r"initial_state has shape \[3, 144, 3\]",
        ),
        (lambda: make("gated").step(draw(2, 1, EMBED), make("gated").init_state(2)), RuntimeError, "no_grad"),
        (lambda: make("gated", backend="cuda")(draw(2, 9, EMBED)), backends.BackendError, "cuda"),
        (lambda: make("gated", chunk_size=48)(draw(2, 9, EMBED)), ValueError, "chunk_size is 48; allowed: 16, 32, 64"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_page_about_modules():
    """The code of docs/modules.md runs, and its assertions hold."""
    page = ROOT / "docs" / "modules.md"
    scope = layers.run_page(page, 7)
    assert f"# {scope['layer'].init_state(2)}" in page.read_text()
