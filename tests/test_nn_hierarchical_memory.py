"""HierarchicalMemory: the three passes written out, and what memory layers promise between segments."""

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject
from torch import nn
from torch.nn import functional as F

from memattn.nn import HierarchicalMemory

EMBED, SEGMENT = 24, 6
LACKS = Lacks(
    step="the representation pass looks ahead in the segment, so no token can be answered alone",
    pool="no step",
    split="a segment is pushed when it is read, also a short one",
)


class Backbone(nn.Module):
    """One causal transformer layer with absolute positions; the mask is for others."""

    def __init__(self, **factory):
        super().__init__()
        self.norm = nn.LayerNorm(EMBED, **factory)
        self.qkv = nn.Linear(EMBED, 3 * EMBED, **factory)
        self.out = nn.Linear(EMBED, EMBED, **factory)

    def reset_parameters(self):
        for child in self.children():
            child.reset_parameters()

    def forward(self, x, attention_mask):
        assert attention_mask.shape == x.shape[:2] and attention_mask.dtype == torch.bool
        position = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[:, None]
        x = x + (position / 3 ** torch.arange(EMBED, device=x.device)).sin().to(x.dtype)
        q, k, v = (y[:, None] for y in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def make(**kw):
    settings = {"segment_len": SEGMENT, "memory_size": 2, "sensory": 4, "recall_dim": 10}
    return HierarchicalMemory(Backbone(**kw), EMBED, **settings, **kw)


SUBJECT = Subject(make, EMBED, SEGMENT, LACKS)
NOT_CAUSAL_INSIDE = "later_tokens_do_not_reach_back"  # see test_causal_between_segments


@pytest.mark.parametrize("check", [c for c in layers.CHECKS if c != NOT_CAUSAL_INSIDE])
def test_promises_of_a_layer(check):
    layers.run(check, SUBJECT)


def published(layer, x):
    """One sequence [T, D]: represent, recall, augment, push."""
    memory, before, outputs = [], x[:0], []

    def backbone(*parts):
        joined = torch.cat([y.view(-1, EMBED) for y in parts])[None]
        return layer.backbone(joined, torch.ones(joined.shape[:2], dtype=torch.bool))[0]

    for segment in x.split(layer.segment_len):
        half = segment[: int(layer.representation * layer.segment_len)]
        q = backbone(layer.summary_token, half, layer.summary_token)[-1]
        if memory:
            rows = torch.stack(memory)
            keys = rows @ layer.recall_key_proj.weight.T
            prompt = (keys @ (layer.recall_query_proj.weight @ q) / layer.recall_dim**0.5).softmax(0) @ rows
        else:
            prompt = layer.first_prompt
        hidden = backbone(prompt, before, segment, prompt)
        outputs.append(hidden[1 + len(before) : -1])
        memory = [*memory, hidden[-1]][-layer.memory_size :]
        before = segment[max(0, len(segment) - layer.sensory) :]
    return torch.cat(outputs), torch.stack(memory), before


def test_published_passes():
    """Five segments, so that the queue of two overflows; the last is shorter than what is kept of it."""
    layer, x = layers.fresh(SUBJECT).double(), layers.draw(2, 4 * SEGMENT + 3, EMBED).double()
    with torch.no_grad():
        y, state = layer(x, return_state=True)
        for b in range(2):
            truth, memory, before = published(layer, x[b])
            torch.testing.assert_close(y[b], truth, rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(state.memory[b], memory.flip(0), rtol=1e-10, atol=1e-11)
            assert torch.equal(state.sensory[b, :3], before) and not state.sensory[b, 3:].any()
    assert state.count.tolist() == [2, 2] and state.kept.tolist() == [3, 3]


def test_causal_between_segments():
    """A token of a segment's second half reaches what follows it; one of its first half, by the recall, all of it."""
    layer, x = layers.fresh(SUBJECT).double(), layers.draw(1, 4 * SEGMENT, EMBED).double()
    for at, first in ((2 * SEGMENT + 4, 2 * SEGMENT + 4), (2 * SEGMENT + 2, 2 * SEGMENT)):
        other = x.clone()
        other[:, at, ::2] += 1  # not all alike, which a layer norm would take off again
        changed = (layer(other) != layer(x)).any(-1)[0].nonzero().flatten().tolist()
        assert changed == list(range(first, 4 * SEGMENT)), at


def test_what_the_backbone_is_given():
    """Rows are padded behind only, and the mask says where."""
    layer, seen = layers.fresh(SUBJECT), []
    layer.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    mask = torch.ones(2, SEGMENT, dtype=torch.bool)
    mask[0, :4] = False
    layer(layers.draw(2, SEGMENT, EMBED), attention_mask=mask)
    for (embeddings, given), counts in zip(seen, ((4, 5), (4, 8)), strict=True):
        position = torch.arange(given.shape[1])
        assert torch.equal(given, position < torch.tensor(counts)[:, None]) and not embeddings[~given].any()


def test_refusals():
    for settings, message in (
        (dict(representation=0.0), r"representation is 0.0; expected a share of the segment in \(0, 1\]"),
        (dict(segment_len=0), "segment_len is 0; expected at least 1"),
        (dict(memory_size=0), "memory_size is 0; expected at least 1"),
        (dict(recall_dim=0), "recall_dim is 0; expected at least 1"),
        (dict(sensory=-1), "sensory is -1; expected at least 0"),
    ):
        with pytest.raises(ValueError, match=f"HierarchicalMemory: {message}"):
            HierarchicalMemory(Backbone(), EMBED, **{"segment_len": 4, **settings})
