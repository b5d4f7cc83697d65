"""LongMem: the read memory written out, the frozen backbone beside the side network, and what every layer promises."""

import copy

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject

from memattn.nn import LongMem, LongMemAttention, SlidingWindowAttention
from memattn.nn.residual_block import ResidualBlock

EMBED, SIZE = 32, 4
LACKS = Lacks(
    pool="a step writes whole segments; pick rows with reorder",
    state_gradient="LongMem stops gradients at its memory",
)
SETTINGS = {"segment_size": SIZE, "memory_size": 2 * SIZE, "chunk_size": 2, "num_chunks": 4}


def subject(**settings):
    settings = {**SETTINGS, **settings}
    return Subject(lambda **kw: LongMemAttention(EMBED, 2, **settings, **kw), EMBED, chunk=2 * SIZE, lacks=LACKS)


def whole(**kw):
    def block(mixer):
        return ResidualBlock(mixer, EMBED, 48, **kw)

    backbone = [block(SlidingWindowAttention(EMBED, 2, window=6, **kw)) for _ in range(4)]
    side = [
        block(SlidingWindowAttention(EMBED, 2, window=6, **kw)),
        block(LongMemAttention(EMBED, 2, **SETTINGS, **kw)),
    ]
    return LongMem(backbone, side, source=2, read=1)


SUBJECTS = {
    "layer": subject(),
    "grouped": subject(num_kv_heads=1, num_chunks=1),
    "whole": Subject(whole, EMBED, chunk=2 * SIZE, lacks=LACKS, tolerance=2e-5, autocast_dtype=torch.float32),
}
ARITHMETIC = (
    "two_calls_equal_one",
    "prefill_then_step_equals_one_call",
    "padded_rows_equal_their_runs_alone",
    "packed_sequences_equal_separate_ones",
    "a_nan_stays_in_its_sequence",
    "later_tokens_do_not_reach_back",
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
    chosen = {c for c in layers.CHECKS if "compile" not in c} if name == "layer" else {*ARITHMETIC}
    if check not in chosen and (name == "whole" or not full):
        pytest.skip("--full: variants of a layer in every check, and compiled; of the wrapper, what it computes")
    layers.run(check, SUBJECTS[name])


@pytest.mark.parametrize("kv_heads, chunks", [(2, 3), (1, 2), (2, 20)])
def test_it_reads_all_tokens_of_the_chunks_with_the_best_mean(kv_heads, chunks):
    """The gate open: the output of the last token is the softmax over the other model's keys, written out."""
    layer = layers.fresh(subject(num_kv_heads=kv_heads, num_chunks=chunks, memory_size=24)).double()
    with torch.no_grad():
        layer.gate.fill_(50.0)
    x = layers.draw(1, 33, EMBED).double()
    k, v = (layers.draw(1, 33, kv_heads, 16, seed=s).double() for s in (5, 6))
    y = layer(x, remembered=(k, v))[0, -1]
    memory = range(33 - 1 - SIZE - 24, 33 - 1 - SIZE)  # the last token is the first of its segment
    parts = []
    for h, q in enumerate(layer._heads(x)[0][0, -1]):
        g = h // (2 // kv_heads)
        groups = [list(memory)[n : n + 2] for n in range(0, 24, 2)]
        groups.sort(key=lambda tokens, g=g, q=q: -(k[0, tokens, g].mean(0) @ q).item())
        best = [j for tokens in groups[:chunks] for j in tokens]
        parts.append((k[0, best, g] @ q / 4).softmax(0) @ v[0, best, g])
    layers.close(y, layer.out_proj(torch.cat(parts)), 1e-12)


def test_the_side_network_adds_what_the_frozen_blocks_add():
    torch.manual_seed(0)
    model, x = whole().double(), layers.draw(2, 21, EMBED).double()
    y = model(x)
    hidden = [x]
    for block in model.backbone:
        hidden.append(block(hidden[-1])[0])
    keys = model.backbone[2].mixer._heads(model.backbone[2].mixer_norm(hidden[2]))[1:]
    s = model.side[0](x)[0] + hidden[2] - x
    s = model.side[1](s, remembered=keys)[0] + hidden[4] - hidden[2]
    layers.close(y, s, 1e-12)
    y.square().sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.side.parameters())


def test_what_the_frozen_model_saw_is_what_is_remembered():
    """A training step of the side network leaves the memory valid: its keys do not change."""
    torch.manual_seed(0)
    model, x = whole(), layers.draw(1, 20, EMBED)
    _, state = model(x, return_state=True)
    with torch.no_grad():
        for p in model.side.parameters():
            p.add_(0.1)
    _, after = model(x, return_state=True)
    assert torch.equal(state.layer5.memory.source.k, after.layer5.memory.source.k)
    assert not torch.equal(state.layer5.memory.own.recent_k, after.layer5.memory.own.recent_k)


def test_without_memory_the_gate_is_closed():
    layer, x = layers.fresh(SUBJECTS["layer"]), layers.draw(2, 2 * SIZE, EMBED)
    bare = copy.deepcopy(layer)
    bare.memory_size = 0
    assert torch.equal(layer(x), bare(x)) and bare(layers.draw(2, 30, EMBED)).isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LongMemAttention(32, 2, **{**SETTINGS, "chunk_size": 3}), "segment_size is 4; expected a multiple of"),
        (lambda: LongMemAttention(32, 2, **{**SETTINGS, "num_chunks": 0}), "num_neighbors is 0; expected at least 1"),
        (lambda: LongMem([], [], source=0, read=0), "LongMem: 0 backbone and 0 side blocks; expected a multiple"),
        (lambda: LongMem(whole().backbone, whole().side, source=4, read=1), r"source is 4; allowed: 0\.\.3"),
        (lambda: LongMem(whole().backbone, whole().side, source=0, read=0), "read is 0; expected the place of a side"),
        (
            lambda: subject().make()(torch.zeros(1, 3, 32), remembered=(torch.zeros(1, 3, 1, 16),) * 2),
            r"remembered k has shape \[1, 3, 1, 16\]; expected \[1, 3, 2, 16\]",
        ),
    ],
)  # fmt: skip
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
