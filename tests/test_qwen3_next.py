"""A tiny random Qwen3-Next with our ops in place of its torch functions gives what it gave before."""

import copy
import functools
import sys
import warnings

import pytest
import torch
from support.compare import relative_error

# transformers looks for Hugging Face's package `kernels`, and from the source root would find this project's folder.
sys.modules.setdefault("kernels", None)
transformers = pytest.importorskip("transformers")

from transformers import Qwen3NextConfig, Qwen3NextForCausalLM  # noqa: E402

from memattn.integrations import qwen3_next  # noqa: E402

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCABULARY, T = 128, 70
LINEAR = [f"model.layers.{i}.linear_attn" for i in range(3)]
needs_static = pytest.mark.skipif(VERSION < (5, 16), reason="this transformers has no static cache for linear layers")


@functools.cache
def original():
    """Three linear-attention layers and one attention layer; decays slow enough that the memory spans the text."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p.normal_(-3, 1)
            elif p.dim() > 1:
                p.normal_(std=0.1)
    return model


@functools.cache
def patched():
    model = copy.deepcopy(original())
    qwen3_next.patch(model)
    return model


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prompt(rows=2, length=T, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padding(ids, count=20):
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return mask


def logits_and_gradients(model, ids, **kwargs):
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False, **kwargs)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients(padded):
    ids = prompt()
    mask = left_padding(ids) if padded else None
    theirs, their_gradients = logits_and_gradients(original(), ids, attention_mask=mask)
    ours, our_gradients = logits_and_gradients(patched(), ids, attention_mask=mask)
    valid = slice(None) if mask is None else mask.bool()
    assert relative_error(ours[valid], theirs[valid]) <= 1e-5
    assert our_gradients.keys() == their_gradients.keys() and len(their_gradients) > 40
    whole = [torch.cat([g[n].flatten() for n in their_gradients]) for g in (our_gradients, their_gradients)]
    assert relative_error(*whole) <= 1e-5
    for name, gradient in their_gradients.items():
        # The decay's two parameters have gradients that are sums of cancelling terms: Hugging Face's own float32
        # gradient is 1e-5 off its float64 one there.
        limit = 4e-5 if name.endswith(("A_log", "dt_bias")) else 1e-5
        assert relative_error(our_gradients[name], gradient) <= limit, name


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=needs_static)])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens(cache, padded):
    ids = prompt()
    mask = left_padding(ids) if padded else torch.ones_like(ids)
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    theirs, ours = (
        m.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, **kwargs)
        for m in (original(), patched())
    )
    assert theirs.shape == (2, T + 64) and torch.equal(ours, theirs)
    assert len(theirs[0, T:].unique()) > 16, "a text that repeats itself would show nothing"


@torch.no_grad()
def test_prefill_in_parts_and_decode():
    ids = prompt()
    whole = original()(ids).logits
    for model in (original(), patched()):
        cache, outputs = None, []
        for part in ids.split([40, 1, 1, 28] if VERSION >= (5, 8) else [67, 1, 1, 1], 1):  # earlier: one prefill only
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            outputs.append(output.logits)
        assert relative_error(torch.cat(outputs, 1), whole) <= 1e-5


@torch.no_grad()
def test_a_step_with_gradients_enabled_uses_the_differentiable_op():
    ids, model = prompt(), patched()
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    with torch.enable_grad():
        logits = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert logits.requires_grad
    assert relative_error(logits, original()(ids).logits[:, -1:]) <= 1e-5


@torch.no_grad()
def test_bfloat16_layers():
    """Layer by layer: through a whole model rounding changes which experts a token goes to."""
    x = torch.randn(2, T, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(patched().model.layers[:3], original().model.layers[:3], strict=True):
        exact = theirs.linear_attn(x)
        ours, theirs = (copy.deepcopy(layer.linear_attn).bfloat16()(x.bfloat16()) for layer in (ours, theirs))
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


@pytest.mark.skipif(VERSION < (5, 16), reason="this transformers does not pass packed bounds to the layer")
@torch.no_grad()
def test_packed_sequences_stay_apart():
    ids, bounds = prompt(1), [0, 30, 31, T]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])[None]
    packed = patched()(
        ids, position_ids=positions, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32), use_cache=False
    ).logits
    for a, b in zip(bounds, bounds[1:], strict=False):
        assert relative_error(packed[:, a:b], original()(ids[:, a:b], use_cache=False).logits) <= 1e-5
    with pytest.raises(ValueError, match="seq_idx is given without cu_seq_lens_q"):
        patched()(ids, seq_idx=torch.zeros(1, T, dtype=torch.int32), use_cache=False)


@torch.no_grad()
def test_compiled_layer():
    layer = patched().model.layers[0].linear_attn
    x = torch.randn(2, T, 64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), original().model.layers[0].linear_attn(x)) <= 1e-5


# --- patching ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patch_reports_and_unpatch_restores():
    ids, model = prompt(), copy.deepcopy(original())
    before, attributes = model(ids).logits, {n: dict(vars(m)) for n, m in model.named_modules()}
    planned = qwen3_next.patch(model, dry_run=True)
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes, "dry_run changes nothing"
    changes = qwen3_next.patch(model, backend="chunked")
    assert changes == planned and [change.name for change in changes] == LINEAR
    bare = {name.removeprefix("torch_") for name in changes[0].functions}
    assert bare == {"chunk_gated_delta_rule", "recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update"}
    assert changes[0].via == ("forward" if VERSION >= (5, 16) else "attributes")
    qwen3_next.patch(model)
    assert qwen3_next.unpatch(model) == LINEAR
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, before) and qwen3_next.unpatch(model) == []


def test_patch_calls_our_ops_in_that_model_only(monkeypatch):
    calls = []

    def recorded(name, function):
        def call(*args, backend, **kwargs):
            calls.append((name, backend))
            return function(*args, backend=backend, **kwargs)

        return call

    for name in ("gated_delta_rule", "gated_delta_rule_step", "causal_conv1d"):
        monkeypatch.setattr(qwen3_next, name, recorded(name, getattr(qwen3_next, name)))
    model, other = copy.deepcopy(original()), copy.deepcopy(original())
    qwen3_next.patch(model, backend="chunked")
    with torch.no_grad():
        other.generate(prompt(), max_new_tokens=2, do_sample=False)
        assert calls == []
        model.generate(prompt(), max_new_tokens=2, do_sample=False)
    prefill, step = ["causal_conv1d", "gated_delta_rule"] * 3, ["causal_conv1d", "gated_delta_rule_step"] * 3
    assert calls == [(name, "chunked") for name in prefill + step]


@torch.no_grad()
def test_deepcopy_and_state_dict_of_a_patched_model():
    ids, twin = prompt(), copy.deepcopy(patched())
    assert twin.state_dict().keys() == original().state_dict().keys()
    twin.model.layers[0].linear_attn.A_log.add_(1)
    assert torch.equal(copy.deepcopy(patched())(ids).logits, patched()(ids).logits)
    assert not torch.equal(twin(ids).logits, patched()(ids).logits), "the copy runs with its own weights"


@pytest.mark.parametrize("call", [qwen3_next.patch, qwen3_next.unpatch])
def test_refuses_models_without_such_layers(call):
    with pytest.raises(ValueError, match="Linear has no Qwen3NextGatedDeltaNet layer"):
        call(torch.nn.Linear(2, 2))


@pytest.mark.skipif(VERSION < (5, 16), reason="attributes are replaced, not forward")
def test_refuses_a_layer_whose_forward_was_replaced():
    model = copy.deepcopy(original())
    layer = model.model.layers[1].linear_attn
    layer.forward = layer.forward
    with pytest.raises(RuntimeError, match="already replaced, e.g. by an accelerate hook"):
        qwen3_next.patch(model)


# --- the same layer as memattn.nn.GatedDeltaNet -----------------------------------------------------------------------


def test_to_gated_delta_net():
    theirs = copy.deepcopy(original().model.layers[1].linear_attn)
    ours = qwen3_next.to_gated_delta_net(theirs)
    x = torch.randn(2, T, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = left_padding(torch.ones(2, T, dtype=torch.int64))
    for attention_mask in (None, mask):
        valid = slice(None) if attention_mask is None else mask.bool()
        outputs = [layer(x, attention_mask=attention_mask)[valid] for layer in (ours, theirs)]
        assert relative_error(*outputs) <= 5e-6
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
        assert relative_error(*gradients) <= 1e-5
    with torch.no_grad():
        y, state = ours(x[:, :-1], return_state=True)
        last, _ = ours.step(x[:, -1:], state)
        assert relative_error(torch.cat([y, last], 1), theirs(x)) <= 5e-6
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
