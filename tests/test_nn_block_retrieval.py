"""Layers that choose blocks or tokens of a growing memory: the published equations, and what every layer promises."""

import copy
from pathlib import Path

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject
from torch.nn import functional as F

from memattn.nn import LightningIndexerAttention, MixtureOfBlockAttention, NativeSparseAttention, QuestAttention

EMBED, BLOCK = 48, 4


def moba(**settings):
    settings = {"block_size": BLOCK, "top_blocks": 2, **settings}
    return lambda **kw: MixtureOfBlockAttention(EMBED, settings.get("heads", 3), **without_heads(settings), **kw)


def nsa(**settings):
    settings = {**SMALL_NSA, **settings}
    return lambda **kw: NativeSparseAttention(EMBED, settings.get("heads", 3), **without_heads(settings), **kw)


def quest(**settings):
    settings = {"page_size": BLOCK, "top_pages": 2, **settings}
    return lambda **kw: QuestAttention(EMBED, settings.get("heads", 3), **without_heads(settings), **kw)


def indexer(**settings):
    settings = {"index_heads": 2, "index_dim": 8, "top_tokens": 5, **settings}
    return lambda **kw: LightningIndexerAttention(EMBED, settings.get("heads", 3), **without_heads(settings), **kw)


def without_heads(settings):
    return {name: value for name, value in settings.items() if name != "heads"}


SMALL_NSA = {
    "compressed_block": 4, "compressed_stride": 2, "block_size": 4, "top_blocks": 3, "last_blocks": 1, "window": 5
}  # fmt: skip
GROUPED = {"heads": 4, "head_dim": 16, "num_kv_heads": 2}

INDEXER = ("index_q_proj.weight", "index_k_proj.weight", "index_norm.weight", "index_norm.bias", "weight_proj.weight")
CHOICE = "rounding decides between tokens that score alike; tested where all are chosen"


def subject(make, no_gradient=()):
    return Subject(make, EMBED, 8, Lacks(bfloat16=CHOICE), {"max_tokens": 64}, no_gradient)


SUBJECTS = {
    "moba": subject(moba()),
    "grouped moba": subject(moba(**GROUPED, rope_base=None, qk_norm=True)),
    "nsa": subject(nsa(compression="mlp")),
    "grouped nsa": subject(nsa(**GROUPED, block_size=8, first_blocks=0)),
    "quest": subject(quest(**GROUPED)),
    "quest by groups": subject(quest(**GROUPED, per_group=True, rope_base=None, bias=True)),
    "indexer": subject(indexer(), INDEXER),
    "grouped indexer": subject(indexer(**GROUPED, rope_base=None), INDEXER),
}
VARIANTS = ("grouped moba", "grouped nsa", "quest by groups", "grouped indexer")
COMPILED = ("nsa", "indexer")
ARITHMETIC = ("prefill_then_step_equals_one_call", "padded_rows_equal_their_runs_alone", "step_on_a_pool_of_states")


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_promises(name, check, full):
    if name in VARIANTS and check not in ARITHMETIC and not full:
        pytest.skip("--full: variants of a layer in every check")
    if "compile" in check and name not in COMPILED and not full:
        pytest.skip("--full: compiling layers whose steps NativeSparseAttention takes too")
    layers.run(check, SUBJECTS[name])


# --- what they compute: one dense mask per branch, in float64 ---------------------------------------------------------


def heads_of(layer, x):
    """q [B, HQ, T, D] and k, v [B, HQ, T, D], turned and repeated for the heads of a group."""
    p = {n: w.to(x.dtype) for n, w in layer.named_parameters()}
    hq, hkv, dim, tokens = layer.num_heads, layer.num_kv_heads, layer.head_dim, x.shape[1]
    z = F.linear(x, p["qkv_proj.weight"], p.get("qkv_proj.bias"))
    q, k, v = z.split([hq * dim, hkv * dim, hkv * dim], -1)
    q, k, v = (y.unflatten(-1, (-1, dim)).transpose(1, 2) for y in (q, k, v))
    if "q_norm.weight" in p:
        q, k = (
            y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p[w]
            for y, w in ((q, "q_norm.weight"), (k, "k_norm.weight"))
        )
    if layer.rope_base is not None:
        q, k = (turned(y, torch.arange(tokens), layer.rope_base) for y in (q, k))
    k, v = (y.repeat_interleave(hq // hkv, 1) for y in (k, v))
    return q, k, v


def turned(y, positions, base):
    half = y.shape[-1] // 2
    frequency = torch.tensor([base ** (-d / half) for d in range(half)], dtype=y.dtype)
    turn = torch.polar(torch.ones((), dtype=y.dtype), positions[:, None].to(y.dtype) * frequency)
    z = torch.complex(y[..., :half], y[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


def masked_attention(q, k, v, mask):
    """mask [..., T, T]; a row that sees nothing gives 0."""
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v


def best(scores, forced, n):
    """bool [..., N] of the n largest, the first of equal ones, forced ones before all, −inf never."""
    scores = scores.masked_fill(forced, torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    chosen = torch.zeros_like(forced).scatter(-1, order, True)
    return chosen & (scores > -torch.inf)


def tokens_of(blocks, size, tokens):
    """Mask over blocks [..., N] as one over tokens, causal."""
    return blocks.repeat_interleave(size, -1)[..., :tokens] & causal(tokens)


def out(layer, o):
    bias = layer.out_proj.bias
    return F.linear(o.transpose(1, 2).flatten(2), layer.out_proj.weight.to(o.dtype), bias)


def published_moba(layer, x):
    q, k, v = heads_of(layer, x)
    size, tokens, t = layer.block, x.shape[1], torch.arange(x.shape[1])
    count = -(-tokens // size)
    means = torch.stack([k[:, :, j * size : (j + 1) * size].mean(2) for j in range(count)], 2)
    own = (t // size)[:, None] == torch.arange(count)
    past = (t // size)[:, None] > torch.arange(count)
    full = (torch.arange(count) * size + size <= t[:, None] + 1) & own  # its last token may count the own block
    scores = (q @ means.mT).masked_fill(~(past | full), -torch.inf)
    chosen = best(scores, own.expand_as(scores), layer.top_blocks)
    return out(layer, masked_attention(q, k, v, tokens_of(chosen, size, tokens)))


def compressed(phi, x, size, stride):
    """Of full blocks of x [B, H, T, D]: [B, H, N, D]."""
    starts = range(0, x.shape[2] - size + 1, stride)
    return torch.stack([phi(x[:, :, a : a + size]) for a in starts], 2)


def phi_of(layer, which):
    """The map of one block [B, H, l, D] → [B, H, D], for query heads."""
    module = getattr(layer, f"compress_{which}")
    if module is None:
        return lambda x: x.mean(2)

    def mlp(x):
        e = module.positions.transpose(0, 1).repeat_interleave(layer.num_heads // layer.num_kv_heads, 0)
        hidden = F.linear((x + e).flatten(2), module.hidden.weight, module.hidden.bias)
        return F.linear(hidden.relu(), module.out.weight, module.out.bias)

    return mlp


def published_nsa(layer, x):
    """Equations 7 to 12 of the paper, the importance of equation 9 by counting shared strides one by one."""
    q, k, v = heads_of(layer, x)
    tokens, t = x.shape[1], torch.arange(x.shape[1])[:, None]
    size, stride, wide, group = layer.block, layer.stride, layer.block_size, layer.num_heads // layer.num_kv_heads
    short_k, short_v = (compressed(phi_of(layer, n), y, size, stride) for n, y in (("k", k), ("v", v)))
    ends = torch.arange(short_k.shape[2]) * stride + size
    s = (q @ short_k.mT * layer.head_dim**-0.5).masked_fill(ends > t + 1, -torch.inf)
    p = s.softmax(-1).nan_to_num(0.0)
    count = -(-tokens // wide)
    omega = torch.zeros(len(ends), count, dtype=x.dtype)
    for i in range(len(ends)):
        for j in range(count):
            mine = range(i * stride, i * stride + size, stride)
            omega[i, j] = sum(j * wide <= a < (j + 1) * wide for a in mine)
    importance = (p @ omega).unflatten(1, (-1, group)).sum(2)
    own, block = t // wide, torch.arange(count)
    forced = (block < layer.first_blocks) | (block > own - layer.last_blocks)
    importance = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    chosen = best(importance, torch.zeros_like(importance, dtype=torch.bool), layer.top_blocks)
    chosen = tokens_of(chosen, wide, tokens).repeat_interleave(group, 1)
    near = (t >= t.T) & (t - t.T < layer.window)
    branches = p @ short_v, masked_attention(q, k, v, chosen), masked_attention(q, k, v, near)
    gates = F.linear(x, layer.gate_proj.weight).sigmoid().unflatten(-1, (layer.num_heads, 3)).transpose(1, 2)
    return out(layer, sum(gates[..., c, None] * o for c, o in enumerate(branches)))


def published_quest(layer, x):
    q, k, v = heads_of(layer, x)
    size, tokens, group = layer.block, x.shape[1], layer.num_heads // layer.num_kv_heads
    pages = k.split(size, 2)
    scores = torch.stack(
        [torch.maximum(q * p.amin(2)[:, :, None], q * p.amax(2)[:, :, None]).sum(-1) for p in pages], 3
    )
    own = torch.arange(tokens)[:, None] // size
    page = torch.arange(len(pages))
    scores = scores.masked_fill(page > own, -torch.inf)
    if layer.per_group:
        scores = scores.unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
    chosen = best(scores, (page == own).expand_as(scores), layer.top_pages)
    return out(layer, masked_attention(q, k, v, tokens_of(chosen, size, tokens)))


def index_scores(layer, x):
    """I [B, T, T], query by key."""
    p = {n: w.to(x.dtype) for n, w in layer.named_parameters()}
    q = F.linear(x, p["index_q_proj.weight"]).unflatten(-1, (layer.index_heads, -1)).transpose(1, 2)
    k = F.linear(x, p["index_k_proj.weight"])
    k = F.layer_norm(k, k.shape[-1:], p["index_norm.weight"], p["index_norm.bias"])[:, None]
    if layer.rope_base is not None:
        half = layer.index_dim // 2
        t = torch.arange(x.shape[1])
        q, k = (torch.cat([turned(y[..., :half], t, layer.rope_base), y[..., half:]], -1) for y in (q, k))
    weight = F.linear(x, p["weight_proj.weight"]).transpose(1, 2) / (layer.index_heads * layer.index_dim) ** 0.5
    return (weight[..., None] * (q @ k.mT).relu()).sum(1).masked_fill(~causal(x.shape[1]), -torch.inf)


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def published_indexer(layer, x):
    scores = index_scores(layer, x.detach())[:, None]
    chosen = best(scores, torch.zeros_like(scores, dtype=torch.bool), layer.top_tokens)
    return out(layer, masked_attention(*heads_of(layer, x), chosen))


PUBLISHED = {
    MixtureOfBlockAttention: published_moba,
    NativeSparseAttention: published_nsa,
    QuestAttention: published_quest,
    LightningIndexerAttention: published_indexer,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_published_equations_and_gradients(name):
    layer, x = layers.fresh(SUBJECTS[name]).double(), layers.draw(2, 37, EMBED, dtype=torch.float64).requires_grad_()
    truth = PUBLISHED[type(layer)](layer, x)
    weights = layers.draw(*x.shape, seed=3, dtype=torch.float64)
    wanted = torch.autograd.grad((truth * weights).sum(), [x, *layer.parameters()], allow_unused=True)
    y = layer(x)
    layers.close(y, truth, 1e-12)
    found = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()], allow_unused=True)
    for actual, expected in zip(found, wanted, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            layers.close(actual, expected, 1e-10)


def test_nsa_is_lucidrains_at_matched_settings():
    """native-sparse-attention-pytorch without its positions and its memory slot, one head a group, blocks apart.

    It shows a compressed block one token later than the paper, and averages all blocks where a query sees none: those
    tokens are left out.
    """
    peer_module = pytest.importorskip("native_sparse_attention_pytorch", reason="pip install it to compare with it")
    settings = {"compressed_block": 4, "compressed_stride": 4, "window": 5, "compression": "mlp", "rope_base": None}
    layer = layers.fresh(Subject(nsa(**settings, first_blocks=0), EMBED)).double()
    peer = peer_module.SparseAttention(EMBED, 16, 3, 4, 4, 4, 4, 2, causal=True, norm=False).double()
    peer.rotary_emb.rotate_queries_with_cached_keys = lambda q, k: (q, k)
    peer.compress_mem_kv = torch.nn.Parameter(peer.compress_mem_kv[:, :, :0].detach())
    with torch.no_grad():
        peer.to_qkv.weight.copy_(layer.qkv_proj.weight)
        peer.combine_heads.weight.copy_(layer.out_proj.weight)
        peer.to_strategy_combine[0].weight.copy_(layer.gate_proj.weight)
        peer.to_strategy_combine[0].bias.zero_()
        for which in ("k", "v"):
            ours, theirs = getattr(layer, f"compress_{which}"), getattr(peer, f"{which}_compress")
            getattr(peer, f"{which}_intrablock_positions").copy_(ours.positions.transpose(0, 1))
            theirs[1].load_state_dict(ours.hidden.state_dict())
            theirs[3].weight.copy_(ours.out.weight)
            theirs[3].bias.copy_(0 if ours.out.bias is None else ours.out.bias)
        x = layers.draw(2, 40, EMBED, dtype=torch.float64)
        kept = [t for t in range(4, 40) if (t + 1) % 4]
        layers.close(layer(x)[:, kept], peer(x)[:, kept], 1e-10)


FULL_BUDGET = {
    "moba": moba(top_blocks=10), "grouped moba": moba(**GROUPED, top_blocks=10),
    "quest": quest(top_pages=10), "grouped quest": quest(**GROUPED, top_pages=10, per_group=True),
    "indexer": indexer(**GROUPED, top_tokens=37),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_BUDGET)
def test_a_full_budget_is_causal_attention(name):
    layer = layers.fresh(Subject(FULL_BUDGET[name], EMBED)).double()
    x = layers.draw(2, 37, EMBED, dtype=torch.float64)
    with torch.no_grad():
        layers.close(layer(x), out(layer, masked_attention(*heads_of(layer, x), causal(37))), 1e-12)


@pytest.mark.parametrize("name", [*FULL_BUDGET, "nsa"])
def test_bfloat16_where_everything_is_chosen(name):
    make = FULL_BUDGET.get(name, nsa(**GROUPED, top_blocks=10, compression="mlp"))
    layers.run("bfloat16_is_near_float64", Subject(make, EMBED, 8, state_options={"max_tokens": 64}))


def test_quest_with_a_dense_forward_chooses_in_its_steps_alone():
    layer, dense = (layers.fresh(Subject(quest(**s), EMBED)).double() for s in ({"dense_forward": True}, {}))
    x = layers.draw(2, 37, EMBED, dtype=torch.float64)
    with torch.no_grad():
        y = out(layer, masked_attention(*heads_of(layer, x), causal(37)))
        first, state = layer(x[:, :20], return_state=True)
        second, state = layer(x[:, 20:36], state, return_state=True)
        layers.close(torch.cat([first, second], 1), y[:, :36], 1e-12)
        layers.close(layer.step(x[:, 36:], state)[0], dense(x)[:, 36:], 1e-12)


def test_nsa_branches_with_full_budgets():
    """All blocks selected, and a window over all: those two branches are causal attention, each with its gate."""
    layer = layers.fresh(Subject(nsa(top_blocks=10, window=100), EMBED)).double()
    x = layers.draw(2, 37, EMBED, dtype=torch.float64)
    with torch.no_grad():
        layer.gate_proj.weight[0::3] = 0
        dense = masked_attention(*heads_of(layer, x), causal(37))
        gates = F.linear(x, layer.gate_proj.weight).sigmoid().unflatten(-1, (3, 3)).transpose(1, 2)
        q, k, v = heads_of(layer, x)
        short_k, short_v = (compressed(phi_of(layer, "k"), y, 4, 2) for y in (k, v))
        ends = torch.arange(short_k.shape[2]) * 2 + 4
        s = (q @ short_k.mT * 0.25).masked_fill(ends > torch.arange(37)[:, None] + 1, -torch.inf)
        o = 0.5 * s.softmax(-1).nan_to_num(0.0) @ short_v + (gates[..., 1, None] + gates[..., 2, None]) * dense
        layers.close(layer(x), out(layer, o), 1e-12)


@pytest.mark.parametrize("name", ["moba", "nsa", "quest", "indexer"])
def test_no_summary_tells_of_tokens_to_come(name):
    """Whatever token the future begins with, and however loud it is."""
    layer, x = layers.fresh(SUBJECTS[name]).double(), layers.draw(1, 21, EMBED, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        for now in range(1, 21):
            other = x.clone()
            other[:, now:] = 10 * layers.draw(1, 21 - now, EMBED, seed=now)
            layers.close(layer(other)[:, :now], y[:, :now], 1e-12, f"from token {now}:")


# --- the loss of the indexer ------------------------------------------------------------------------------------------


def published_loss(layer, x, chosen):
    """KL to the mean attention of all heads, over all past tokens or over the chosen ones, of every token [B, T]."""
    scores, (q, k, _) = index_scores(layer, x), heads_of(layer, x)
    mask = causal(x.shape[1]).expand_as(scores)
    if chosen:
        mask = best(scores.detach(), torch.zeros_like(mask), layer.top_tokens)
    s = (q @ k.mT * layer.head_dim**-0.5).masked_fill(~mask[:, None], -torch.inf)
    p = s.softmax(-1).mean(1).detach()
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return (torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0.0)).sum(-1)


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("name", ["indexer", "grouped indexer"])
def test_the_indexer_learns_from_its_loss_alone(name, chosen):
    layer, x = layers.fresh(SUBJECTS[name]).double(), layers.draw(2, 37, EMBED, dtype=torch.float64).requires_grad_()
    mine = [p for n, p in layer.named_parameters() if n in INDEXER]
    rest = [x, *(p for n, p in layer.named_parameters() if n not in INDEXER)]
    loss, truth = layer.indexer_loss(x, chosen=chosen), published_loss(layer, x, chosen).mean()
    layers.close(loss, truth, 1e-12)
    wanted = torch.autograd.grad(truth, mine)
    for actual, expected in zip(torch.autograd.grad(loss, mine, retain_graph=True), wanted, strict=True):
        layers.close(actual, expected, 1e-10)
        assert expected.any()
    assert all(g is None for g in torch.autograd.grad(loss, rest, allow_unused=True))


def test_the_loss_of_padded_and_packed_texts_is_that_of_their_tokens():
    layer = layers.fresh(Subject(indexer(bias=True), EMBED)).double()
    x = layers.draw(1, 37, EMBED, dtype=torch.float64)
    each = [published_loss(layer, part, True) for part in (x[:, :11], x[:, 11:])]
    mean = torch.cat(each, 1).mean()
    layers.close(layer.indexer_loss(x, cu_seqlens=torch.tensor([0, 11, 11, 37])), mean, 1e-12)
    padded = x.new_full((2, 30, EMBED), torch.nan)
    padded[0, 3:14], padded[1, :26] = x[0, :11], x[0, 11:]
    layers.close(layer.indexer_loss(padded, attention_mask=padded[..., 0].isfinite()), mean, 1e-12)
    assert layer.indexer_loss(x[:, :0]) == 0


def test_the_loss_in_bfloat16_and_under_autocast():
    layer, x = layers.fresh(SUBJECTS["indexer"]), layers.draw(2, 37, EMBED)
    truth = layer.indexer_loss(x, chosen=False)
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = layer.indexer_loss(x, chosen=False)
    layers.close(loss, truth, 3e-2)
    layers.close(copy.deepcopy(layer).bfloat16().indexer_loss(x.bfloat16(), chosen=False).float(), truth, 3e-2)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in layer.named_parameters() if n in INDEXER)


def test_the_indexer_learns_to_choose_what_attention_wants():
    torch.manual_seed(0)
    layer, x = indexer(index_heads=4, index_dim=16)(), 2 * layers.draw(4, 40, EMBED)
    mine = [p for n, p in layer.named_parameters() if n in INDEXER]
    optimiser, losses = torch.optim.Adam(mine, 1e-2), []
    for step in range(60):
        optimiser.zero_grad()
        loss = layer.indexer_loss(x, chosen=step >= 40)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[39] < 0.5 * losses[0] and losses[-1] < losses[40]


# --- needles ----------------------------------------------------------------------------------------------------------


def needle_layer(make):
    """One head that copies: queries and keys are the first 16 channels of x, values the next 16."""
    layer = make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        eye = torch.eye(16)
        for row, column in ((0, 0), (16, 0), (32, 16)):
            layer.qkv_proj.weight[row : row + 16, column : column + 16] = eye
        layer.out_proj.weight[:16, :16] = eye
        if isinstance(layer, LightningIndexerAttention):
            layer.index_q_proj.weight[:, :16] = layer.index_k_proj.weight[:, :16] = eye
            layer.index_norm.weight.fill_(1)
            layer.weight_proj.weight[:, -1] = 1
        if isinstance(layer, NativeSparseAttention):  # the last channel of x is 1: only the selected branch is open
            layer.gate_proj.weight[:, -1] = torch.tensor([-50.0, 50.0, -50.0])
    return layer


NEEDLES = {
    "moba": lambda: MixtureOfBlockAttention(EMBED, 1, head_dim=16, block_size=BLOCK, top_blocks=2, rope_base=None),
    "quest": lambda: QuestAttention(EMBED, 1, head_dim=16, page_size=BLOCK, top_pages=2, rope_base=None),
    "indexer": lambda: LightningIndexerAttention(
        EMBED, 1, head_dim=16, index_heads=1, index_dim=16, top_tokens=3, rope_base=None
    ),
    "nsa": lambda: NativeSparseAttention(EMBED, 1, head_dim=16, rope_base=None, **SMALL_NSA),
}


@pytest.mark.parametrize("name", NEEDLES)
def test_a_needle_is_found_at_every_depth(name):
    """The question, the last token, matches one key of 96; decoding from a prefilled memory gives the same."""
    layer, tokens = needle_layer(NEEDLES[name]), 96
    question, answer = 24 * F.normalize(layers.draw(16), dim=0), layers.draw(16, seed=4)
    with torch.no_grad():
        for depth in range(0, tokens - 1, 5):
            x = 0.1 * layers.draw(1, tokens, EMBED, seed=2)
            x[0, depth, :16], x[0, depth, 16:32], x[0, -1, :16] = question, answer, question
            x[..., -1] = 1
            x[0, -1, 16:32] = answer  # its own key matches too
            y, (_, state) = layer(x), layer(x[:, :-1], return_state=True)
            layers.close(y[0, -1, :16], answer, 1e-2, f"depth {depth}:")
            without = x.clone()
            without[0, depth, 16:32] = -answer
            assert layer(without)[0, -1, :16].norm() < 1e-2 * answer.norm(), "half of it is this, half its own"
            layers.close(layer.step(x[:, -1:], state)[0], y[:, -1:], 1e-5)


# --- states -----------------------------------------------------------------------------------------------------------


def test_summaries_of_a_state_are_those_of_its_blocks():
    """Kept step by step, by calls and in a cache that grows: the same means, of full blocks alone."""
    layer, x = layers.fresh(SUBJECTS["moba"]), layers.draw(2, 90, EMBED)
    with torch.no_grad():
        _, whole = layer(x, return_state=True)
        stepped = layer.init_state(2)
        for part in x.split(7, 1):
            layer.step(part, stepped)
    means = whole.cache.k[:, :88].unflatten(1, (22, BLOCK)).mean(2)
    layers.close(whole.summaries[:, :22], means, 1e-6)
    layers.close(stepped.summaries[:, :22], means, 1e-6)
    assert stepped.summaries.shape[1] == -(-stepped.cache.capacity // BLOCK) and stepped.length.tolist() == [90, 90]


def test_a_copy_goes_into_a_larger_memory_and_not_into_a_smaller_one():
    layer, x = layers.fresh(SUBJECTS["moba"]), layers.draw(2, 30, EMBED)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        large = layer.init_state(2, max_tokens=100)
        assert large.copy_(state) is large
        layers.close(layer(x, large), layer(x, state), 5e-6)
    with pytest.raises(ValueError, match="other holds 30 tokens; expected at most 10"):
        layer.init_state(2, max_tokens=10).copy_(state)
    with pytest.raises(TypeError, match="other is KVCache; expected BlockRetrievalState"):
        state.copy_(state.cache)


def test_deep_copies_train_apart():
    layer = layers.fresh(SUBJECTS["moba"])
    other = copy.deepcopy(layer)
    layer(layers.draw(1, 9, EMBED)).sum().backward()
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize(
    "make, message",
    [
        (moba(block_size=0), "MixtureOfBlockAttention: block_size is 0; expected at least 1"),
        (moba(top_blocks=0), "MixtureOfBlockAttention: top_blocks is 0; expected at least 1"),
        (quest(top_pages=0), "QuestAttention: top_pages is 0; expected at least 1"),
        (indexer(index_dim=6), "index_dim is 6; expected a positive multiple of 4"),
        (indexer(index_heads=0), "index_heads is 0; expected at least 1"),
        (indexer(top_tokens=4097), "top_tokens is 4097; allowed: 1..4096"),
        (nsa(block_size=7), "block_size is 7; expected a multiple of compressed_stride 2"),
        (nsa(compressed_block=5), "compressed_block is 5; expected a multiple of compressed_stride 2"),
        (nsa(last_blocks=0), "last_blocks 0; expected at least 0 and 1, together at most top_blocks 3"),
        (nsa(first_blocks=3), "first_blocks is 3, last_blocks 1; expected at least 0 and 1, together at most"),
        (nsa(compression="max"), r"compression is 'max'; allowed: \('mean', 'mlp'\)"),
        (nsa(window=0), "window is 0; expected at least 1"),
        (moba(top_blocks=5000), "MixtureOfBlockAttention: top_blocks is 5000; allowed: 1..4096"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_page_runs():
    """The code of docs/block_retrieval.md runs, and its assertions hold."""
    layers.run_page(Path(__file__).parent.parent / "docs" / "block_retrieval.md", blocks=2)
