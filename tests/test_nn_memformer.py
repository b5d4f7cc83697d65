"""Memformer: the paper's equations, what every memory layer promises, and memory-replay back-propagation."""

import copy
import gc

import pytest
import torch
from support import layers
from support.compare import relative_error
from support.layers import Lacks, Subject
from torch.nn import functional as F

from memattn.nn import Memformer, memory_replay

EMBED, SEGMENT = 32, 8
POOL = "a step changes whole memories; pick rows with reorder"
LACKS = Lacks(pool=POOL)
SUBJECTS = {
    "plain": Subject(lambda **kw: Memformer(EMBED, 2, num_slots=5, segment_len=SEGMENT, **kw), EMBED, SEGMENT, LACKS),
}


@pytest.mark.parametrize("check", layers.CHECKS)
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


def published(layer, x):
    """The paper's equations slot by slot, on whole segments and an open rest."""
    p = {n: q.detach().to(x.dtype) for n, q in layer.named_parameters()}
    heads, dim = layer.num_heads, layer.head_dim
    w_q, w_k, w_v = p["token_proj.weight"].chunk(3)
    read_k, read_v = p["read_proj.weight"].chunk(2)
    memory = (p["slot_bias"] / p["slot_bias"].norm(dim=-1, keepdim=True)).expand(x.shape[0], -1, -1)
    outputs = []
    for segment in x.split(layer.segment_len, 1):
        o = torch.empty_like(segment)
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            s = (segment @ w_q[part].T) @ (memory @ read_k[part].T).mT / dim**0.5
            o[..., part] = s.softmax(-1) @ (memory @ read_v[part].T)
        outputs.append(o @ p["out_proj.weight"].T)
        if segment.shape[1] < layer.segment_len:
            break
        slots = []
        for i in range(layer.num_slots):
            own, update = memory[:, i : i + 1], []
            for h in range(heads):
                part = slice(h * dim, (h + 1) * dim)
                keys = torch.cat([own, segment], 1) @ w_k[part].T
                values = torch.cat([own[..., part], segment @ w_v[part].T], 1)
                s = (own @ p["write_query_proj.weight"][part].T) @ keys.mT / (dim**0.5 * layer.tau)
                update.append(s.softmax(-1) @ values)
            new = torch.cat(update, -1) + p["slot_bias"][i]
            slots.append(new / new.norm(dim=-1, keepdim=True))
        memory = torch.cat(slots, 1)
    return torch.cat(outputs, 1), memory


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_published_equations(backend):
    layer = layers.fresh(SUBJECTS["plain"]).double()
    layer.backend = backend
    x = layers.draw(2, 3 * SEGMENT + 3, EMBED).double()
    y, state = layer(x, return_state=True)
    truth, memory = published(layer, x)
    torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state.memory.slots, memory, rtol=1e-9, atol=1e-10)
    assert state.memory.written.tolist() == [3, 3] and state.filled.tolist() == [3, 3]
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones_like(memory[..., 0]))


def test_tokens_read_what_earlier_segments_wrote_only():
    """Causal over segments, and inside one every token is on its own."""
    layer, x = layers.fresh(SUBJECTS["plain"]), layers.draw(1, 3 * SEGMENT, EMBED)
    base = layer(x)
    other = x.clone()
    other[:, SEGMENT + 2] += 1
    changed = (layer(other) != base).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [SEGMENT + 2, *range(2 * SEGMENT, 3 * SEGMENT)]


def test_three_calls_equal_one():
    """The second begins and ends anywhere in a segment."""
    layer, x = layers.fresh(SUBJECTS["plain"]).double(), layers.draw(1, 4 * SEGMENT, EMBED).double()
    with torch.no_grad():
        whole = layer(x)
        for first in range(1, SEGMENT):
            for last in range(first + SEGMENT - 1, first + 2 * SEGMENT):
                y, state = layer(x[:, :first], return_state=True)
                outputs = [y]
                for part in (x[:, first:last], x[:, last:]):
                    y, state = layer(part, state, return_state=True)
                    outputs.append(y)
                assert relative_error(torch.cat(outputs, 1), whole) <= 1e-12, f"parts at {first} and {last}"


def test_rows_of_a_step_are_written_apart():
    """Rows that stand at different places of their segments: each writes at its own end."""
    layer, x = layers.fresh(SUBJECTS["plain"]), layers.draw(2, 2 * SEGMENT, EMBED)
    with torch.no_grad():
        mask = torch.arange(SEGMENT) < torch.tensor([[SEGMENT - 2], [3]])
        state = layer(x[:, :SEGMENT], attention_mask=mask, return_state=True)[1]
        outputs = torch.cat([layer.step(token, state)[0] for token in x[:, SEGMENT:].split(1, 1)], 1)
        for b, count in enumerate((SEGMENT - 2, 3)):
            alone = layer(torch.cat([x[b : b + 1, :count], x[b : b + 1, SEGMENT:]], 1))[:, count:]
            assert relative_error(outputs[b : b + 1], alone) <= 5e-6, f"row {b}"


def test_step_on_the_device_computes_every_write_and_keeps_the_due(monkeypatch):
    """Where values are not looked at, the masked write gives what the conditional one gives."""
    layer, x = layers.fresh(SUBJECTS["plain"]), layers.draw(2, 2 * SEGMENT + 1, EMBED)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr("memattn.ops._checks.values_checked", lambda x: False)
        y, _ = layer.step(x, layer.init_state(2))
    assert relative_error(y, expected) <= 5e-6


# --- memory replay ----------------------------------------------------------------------------------------------------


class Cell(torch.nn.Module):
    """A segment of a small model: memory layer, dropout, loss."""

    def __init__(self):
        super().__init__()
        self.layer = Memformer(EMBED, 2, num_slots=4, segment_len=SEGMENT)
        self.head = torch.nn.Linear(EMBED, EMBED)

    def forward(self, x, state):
        y, state = self.layer(F.dropout(x, 0.3), state, return_state=True)
        return (self.head(F.dropout(F.gelu(y + x), 0.3)) - x.roll(1, 1)).square().mean(), state


def gradients(cell, run):
    cell.zero_grad()
    torch.manual_seed(3)
    losses, state = run()
    return losses, state, {n: p.grad.clone() for n, p in cell.named_parameters()}, torch.rand(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_replay_is_backpropagation_through_time(dtype):
    """Losses, gradients, dropout's random numbers, the state and the random state left behind."""
    torch.manual_seed(0)
    cell, segments = Cell().to(dtype), layers.draw(2, 6 * SEGMENT, EMBED, dtype=dtype).split(SEGMENT, 1)
    start = cell.layer(layers.draw(2, SEGMENT, EMBED, seed=9, dtype=dtype), return_state=True)[1].detach()

    def through_time():
        total, state = [], start
        for x in segments:
            loss, state = cell(x, state)
            total.append(loss)
        sum(total).backward()
        return total, state

    losses, state, expected, after = gradients(cell, through_time)
    replayed, last, actual, then = gradients(cell, lambda: memory_replay(cell, segments, start))
    assert torch.equal(torch.stack(replayed), torch.stack(losses)) and not replayed[0].requires_grad
    assert torch.equal(last.memory.slots, state.memory.slots) and not last.memory.slots.requires_grad
    assert torch.equal(after, then), "the random state left behind"
    for name, x in expected.items():
        assert relative_error(actual[name], x) <= (1e-12 if dtype == torch.float64 else 2e-6), name


def test_replay_reaches_what_the_first_memory_depends_on():
    torch.manual_seed(0)
    weight, first = torch.randn(3, 3, dtype=torch.float64).requires_grad_(), torch.randn(3, dtype=torch.float64)
    first.requires_grad_()
    xs = torch.randn(5, 3, dtype=torch.float64)

    def segment(x, memory):
        memory = torch.tanh(memory @ weight + x)
        return memory.square().sum(), memory

    memory, total = first * 2, 0.0
    for x in xs:
        loss, memory = segment(x, memory)
        total = total + loss
    expected = torch.autograd.grad(total, (weight, first))
    memory_replay(segment, list(xs), first * 2)
    torch.testing.assert_close((weight.grad, first.grad), expected)


def peak_saved(run):
    """Bytes of the most activations that autograd held at once."""

    class Saved:
        live = peak = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Saved.live += tensor.numel() * tensor.element_size()
            Saved.peak = max(Saved.peak, Saved.live)

        def __del__(self):
            Saved.live -= self.tensor.numel() * self.tensor.element_size()

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    gc.collect()
    return Saved.peak


def test_replay_keeps_one_segment_of_activations():
    cell = Cell()

    def through_time(segments):
        total, state = 0.0, None
        for x in segments:
            loss, state = cell(x, state or cell.layer.init_state(2))
            total = total + loss
        total.backward()

    def replay(segments):
        memory_replay(cell, segments, cell.layer.init_state(2))

    short, long = (layers.draw(2, n * SEGMENT, EMBED).split(SEGMENT, 1) for n in (3, 24))
    assert peak_saved(lambda: replay(long)) <= 1.01 * peak_saved(lambda: replay(short))
    assert peak_saved(lambda: through_time(long)) > 6 * peak_saved(lambda: through_time(short))


def test_replay_refuses_what_is_no_loss():
    with pytest.raises(ValueError, match=r"memory_replay: segment returned a loss of \[2\]; expected a scalar tensor"):
        memory_replay(lambda x, m: (x, m), [torch.zeros(2)], torch.zeros(1))
    losses, memory = memory_replay(lambda x, m: (x, m), [], torch.ones(1))
    assert losses == [] and memory.item() == 1


def test_refusals():
    with pytest.raises(ValueError, match="Memformer: embed_dim 30 is no multiple of num_heads 4"):
        Memformer(30, 4, num_slots=2, segment_len=4)
    sizes = {"num_heads": 2, "num_slots": 2, "segment_len": 4}
    for name in sizes:
        with pytest.raises(ValueError, match=f"Memformer: {name} is 0; expected at least 1"):
            Memformer(EMBED, **{**sizes, name: 0})
    with pytest.raises(ValueError, match=r"Memformer: tau is 0.0; expected a finite number > 0"):
        Memformer(EMBED, **sizes, tau=0.0)
    layer = copy.deepcopy(layers.fresh(SUBJECTS["plain"]))
    with pytest.raises(ValueError, match="Memformer: state has 2 rows; expected 3, one per sequence of x"):
        layer(torch.zeros(3, 1, EMBED), layer.init_state(2))
