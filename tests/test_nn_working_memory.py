"""WorkingMemory: the released code's form written out, and what memory layers promise between segments."""

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject
from torch.nn import functional as F

from memattn.nn import WorkingMemory

EMBED, SEGMENT = 32, 6
LACKS = Lacks(
    step="a segment is written before it is read, so no token can be answered alone",
    pool="no step",
    split="a segment is written when it is read, also a short one",
)


def subject(**settings):
    def make(**kw):
        return WorkingMemory(EMBED, 2, **{"num_slots": 5, "segment_len": SEGMENT, **settings}, **kw)

    return Subject(make, EMBED, SEGMENT, LACKS)


SUBJECTS = {"plain": subject(), "blocks": subject(num_blocks=3, num_mlp_layers=2, num_slots=40)}
NOT_CAUSAL_INSIDE = "later_tokens_do_not_reach_back"  # see test_causal_between_segments
OF_THE_BLOCKS = ("two_calls_equal_one", "padded_rows_equal_their_runs_alone", "gradients_reach_every_parameter")
PROMISES = [("plain", c) for c in layers.CHECKS if c != NOT_CAUSAL_INSIDE] + [("blocks", c) for c in OF_THE_BLOCKS]


@pytest.mark.parametrize("name, check", PROMISES)
def test_promises_of_a_layer(name, check):
    layers.run(check, SUBJECTS[name])


def released(layer, x):
    """One sequence [T, D], segment by segment, as relational_memory.py computes it (input as a matrix)."""
    p = {n: q.detach() for n, q in layer.named_parameters()}
    heads, dim, size = layer.num_heads, layer.head_dim, layer.embed_dim

    def linear(name, z):
        return z @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, z):
        z = z - z.mean(-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attend(inputs, memory):
        q, (k, v) = linear("query_proj", memory), linear("key_value_proj", inputs).chunk(2, -1)
        parts = []
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            parts.append((q[:, part] @ k[:, part].T / dim**0.5).softmax(-1) @ v[:, part])
        return torch.cat(parts, -1)

    memory, outputs = torch.zeros(layer.num_slots, size).double(), []
    for i in range(min(layer.num_slots, size)):
        memory[i, i] = 1.0
    for segment in x.split(layer.segment_len):
        inputs = linear("input_proj", segment)
        z = memory
        for _ in range(layer.num_blocks):
            z = norm("attention_norm", z + attend(inputs, z))
            hidden = z
            for _ in range(layer.num_mlp_layers):
                hidden = F.relu(linear("mlp", hidden))
            z = norm("mlp_norm", z + hidden)
        gates = linear("input_gate_proj", F.relu(p["input_gate_weight"] * inputs).mean(0))
        gates = gates + linear("memory_gate_proj", memory.tanh())
        write, forget = gates[:, :size], gates[:, size:]
        memory = (write + p["gate_bias"][0]).sigmoid() * z.tanh() + (forget + p["gate_bias"][1]).sigmoid() * memory
        outputs.append(attend(memory, inputs))
    return torch.cat(outputs), memory


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_released_form(name, backend):
    layer, x = layers.fresh(SUBJECTS[name]).double(), layers.draw(2, 3 * SEGMENT + 2, EMBED).double()
    layer.backend = backend
    y, state = layer(x, return_state=True)
    for b in range(2):
        truth, memory = released(layer, x[b])
        torch.testing.assert_close(y[b], truth, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(state.slots[b], memory, rtol=1e-8, atol=1e-9)
    assert state.written.tolist() == [4, 4]


def test_causal_between_segments():
    """A token reaches its own segment, also what came before it there, and all later ones."""
    layer, x = layers.fresh(SUBJECTS["plain"]), layers.draw(1, 3 * SEGMENT, EMBED)
    other = x.clone()
    other[:, SEGMENT + 3] += 1
    changed = (layer(other) != layer(x)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(SEGMENT, 3 * SEGMENT))


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    layer = WorkingMemory(512, 8, num_slots=4, segment_len=4)
    assert layer.gate_bias.tolist() == [0.0, 1.0] and abs(layer.input_gate_weight.std() - 1) < 0.1
    assert layer.memory_gate_proj.weight.abs().max() <= 1024**-0.5
    start = layer._slots(layer.init_state(1))[0]
    assert torch.equal(start, torch.eye(4, 512))


def test_refusals():
    for settings, message in (
        (dict(num_slots=0), "num_slots is 0; expected at least 1"),
        (dict(num_heads=0), "num_heads is 0; expected at least 1"),
        (dict(num_mlp_layers=0), "num_mlp_layers is 0; expected at least 1"),
        (dict(num_blocks=0), "num_blocks is 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=f"WorkingMemory: {message}"):
            WorkingMemory(32, **{"num_heads": 2, "num_slots": 2, "segment_len": 4, **settings})
