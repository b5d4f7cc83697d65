"""Planted bugs in the slot memory's layers and in memory replay: their tests must catch every one."""

# ruff: noqa: E501 (tables, one case a line)
import importlib
import inspect
import sys
import types

import pytest
import test_nn_block_recurrent as block_tests
import test_nn_hierarchical_memory as hierarchical_tests
import test_nn_memformer as memformer_tests
import test_nn_working_memory as working_tests
import torch
from support import layers, relations

BASE = "segment_recurrence"
LAYERS = {
    "Memformer": (memformer_tests, "memformer", memformer_tests.test_published_equations),
    "BlockRecurrentAttention": (
        block_tests,
        "block_recurrent",
        lambda backend: block_tests.test_published_layer("bias", backend),
    ),
    "WorkingMemory": (
        working_tests,
        "working_memory",
        lambda backend: working_tests.test_released_form("plain", backend),
    ),
    "HierarchicalMemory": (
        hierarchical_tests,
        "hierarchical_memory",
        lambda backend: hierarchical_tests.test_published_passes(),
    ),
}
# Layer, what is there, what is put in its place, and the check that has to fail ("published": against the formula).
BUGS = {
    "written one token early": ("Memformer", "else total >= start + size)", "else total >= start + size - 1)", "test_three_calls_equal_one"),
    "a segment that ends with the call not written": ("Memformer", "else total >= start + size)", "else total > start + size)", "test_three_calls_equal_one"),
    "open segment one short": ("Memformer", "filled = total.remainder(size)", "filled = (total - 1).clamp(min=0).remainder(size)", "two_calls_equal_one"),
    "outputs of the open tokens": ("Memformer", "device=features.device) + state.filled[:, None]", "device=features.device) + 0 * state.filled[:, None]", "two_calls_equal_one"),
    "padding fills the segment": ("Memformer", "(tokens if lengths is None else lengths)", "tokens", "padded_rows_equal_their_runs_alone"),
    "step forgets to write": ("Memformer", "filled.masked_fill_(full, 0)", "pass", "prefill_then_step_equals_one_call"),
    "step writes every row": ("Memformer", "open.to(features.dtype), full))", "open.to(features.dtype), full | True))", "test_rows_of_a_step_are_written_apart"),
    "segment written before it is read": ("Memformer", "outputs.append(self._read(memory, segment))", "outputs.append(self._read(self._write(memory, segment) if segment.shape[1] == size else memory, segment))", "published"),
    "initial slots never left": ("Memformer", "(self.written == 0)[:, None, None]", "(self.written >= 0)[:, None, None]", "the_state_matters"),
    "tau ignored": ("Memformer", "tau=self.tau, backend", "backend", "published"),
    "own key not projected": ("Memformer", "F.linear(narrow, key_weight)", "narrow", "published"),
    "bias left out of the update": ("Memformer", 'update, "bias_l2", bias=self.slot_bias', 'update, "bias_l2", bias=0 * self.slot_bias', "published"),
    "previous window one long": ("BlockRecurrentAttention", "window=window, q_offset=window", "window=window + 1, q_offset=window", "published"),
    "step sees one key less before": ("BlockRecurrentAttention", "window - 1 - filled", "(window - 2 - filled).clamp(min=0)", "prefill_then_step_equals_one_call"),
    "step does not see itself": ("BlockRecurrentAttention", "v, filled + 1)", "v, filled)", "prefill_then_step_equals_one_call"),
    "zeros before the first window": ("BlockRecurrentAttention", "before.lse.masked_fill((memory.written == 0)[:, None, None], -torch.inf)", "before.lse", "published"),
    "states read rotated keys": ("BlockRecurrentAttention", "return BlockMemory(slots, memory.written + 1, k, v)", "return BlockMemory(slots, memory.written + 1, self._rotated(k, 0), v)", "published"),
    "one scale for both queries": ("BlockRecurrentAttention", "self._scaled(q2, 1)", "self._scaled(q2, 0)", "published"),
    "read before write": ("WorkingMemory", "outputs.append(self._read(memory, segment))", "outputs.append(self._read(state or self.init_state(len(x)), segment))", "published"),
    "gates exchanged": ("WorkingMemory", "forget=forget, input=write", "forget=write, input=forget", "published"),
    "mean over the padding": ("WorkingMemory", "total / lengths.clamp(min=1)[:, None]", "total / tokens.shape[1]", "padded_rows_equal_their_runs_alone"),
    "empty rows written": ("WorkingMemory", "choose(lengths > 0,", "choose(lengths > -1,", "padded_rows_equal_their_runs_alone"),
    "queue of one more": ("HierarchicalMemory", "(state.count + 1).clamp(max=self.memory_size)", "state.count + 1", "published"),
    "first tokens kept": ("HierarchicalMemory", "(lengths - kept)[:, None] + place", "0 * (lengths - kept)[:, None] + place", "published"),
    "prompt recalled from the empty queue": ("HierarchicalMemory", "torch.where((state.count == 0)", "torch.where((state.count < 0)", "published"),
    "embedding from the last token": ("HierarchicalMemory", "summary = rows_at(hidden, place[:, -1:])", "summary = rows_at(hidden, place[:, -2:-1])", "published"),
}  # fmt: skip
FAILURES = (AssertionError, AttributeError, RuntimeError, ValueError)
REPLAY = {
    "dropout drawn anew": ("_set_random_states(states)\n            with", "with"),
    "gradient of the next memory lost": ("_backward([loss], after, incoming)", "_backward([loss], after, None)"),
    "loss of the last segment alone": ("_backward([loss], after, incoming)", "_backward([loss] if incoming is None else [], after, incoming)"),
    "memories one off": ("reversed(memories), reversed(random)", "reversed([memories[0], *memories[:-1]]), reversed(random)"),
    "random state not put back": ("with _restored(memory):", "if True:"),
}  # fmt: skip


def source_of(name):
    return inspect.getsource(importlib.import_module(f"memattn.nn.{name}"))


def planted(name, old, new, sources):
    """A module of the sources, executed one after the other, with the bug in it."""
    sys.modules["planted_layer"] = module = types.ModuleType("planted_layer")
    for code in relations.with_bug(name, old, new, *sources):
        exec(code, module.__dict__)
    return module


def without_import(source, module):
    """The source without its import of names that are already there."""
    lines = source.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(f"from memattn.nn.{module} import"))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_of_a_layer_is_caught(bug, monkeypatch):
    layer, old, new, check = BUGS[bug]
    tests, module, published = LAYERS[layer]
    buggy = planted(bug, old, new, (source_of(BASE), without_import(source_of(module), BASE)))
    monkeypatch.setattr(tests, layer, getattr(buggy, layer))
    subject = tests.SUBJECT if layer == "HierarchicalMemory" else next(iter(tests.SUBJECTS.values()))
    with pytest.raises(FAILURES):
        if check == "published":
            published("chunked")
        elif check.startswith("test_"):
            getattr(tests, check)()
        else:
            layers.run(check, subject)


@pytest.mark.parametrize("bug", REPLAY)
def test_planted_bug_of_memory_replay_is_caught(bug, monkeypatch):
    old, new = REPLAY[bug]
    buggy = planted(bug, old, new, (source_of("memory_replay"),))
    monkeypatch.setattr(memformer_tests, "memory_replay", buggy.memory_replay)
    with pytest.raises(FAILURES):
        memformer_tests.test_replay_is_backpropagation_through_time(torch.float64)
