"""Planted bugs in the layers that choose blocks or tokens: their tests must catch every one."""

# ruff: noqa: E501 (tables, one case a line)
import importlib
import inspect
import sys
import types

import pytest
import test_nn_block_retrieval as tests
from support import layers, relations

BASE = "block_retrieval"
MODULES = {
    "MixtureOfBlockAttention": ("mixture_of_block_attention", "moba"),
    "NativeSparseAttention": ("native_sparse_attention", "nsa"),
    "QuestAttention": ("quest_attention", "quest"),
    "LightningIndexerAttention": ("lightning_indexer_attention", "indexer"),
}
MOBA, NSA, QUEST, INDEXER = MODULES
# Layer, what is there, what is put in its place, and the check that has to fail ("published": against the formula).
BUGS = {
    "own block not forced": (MOBA, ", force_last=1", "", "published"),
    "choice one too many": (MOBA, "r.shape[1], self.top_blocks)", "r.shape[1], self.top_blocks + 1)", "published"),
    "blocks seen one token early": (MOBA, "ends = q.to(r.dtype), block_ends(r, self.block)", "ends = q.to(r.dtype), block_ends(r, self.block) - 1", "published"),
    "the future inside a summary": (MOBA, "block_ends(r, self.block)", "block_ends(r, self.block) - self.block + 1", "future"),
    "no mask in the own block": (MOBA, "q_positions=positions, page_table", "q_positions=None, page_table", "future"),
    "filled blocks never summarised by steps": (MOBA, "full.flatten())\n", "(full & False).flatten())\n", "prefill_then_step_equals_one_call"),
    "only the first filled block": (MOBA, "torch.arange(-(-tokens // self.stride), device=device)", "torch.arange(1, device=device)", "test_summaries_of_a_state_are_those_of_its_blocks"),
    "summaries do not grow": (MOBA, "if missing > 0:", "if missing > 10**9:", "test_summaries_of_a_state_are_those_of_its_blocks"),
    "summaries of another row": (MOBA, "else state.summaries.index_select(0, at)", "else state.summaries[: len(at)]", "step_on_a_pool_of_states"),
    "blocks of another row": (MOBA, "page_table=seen.pages", "page_table=None if seen.pages is None else seen.pages.clamp(min=0) * 0", "step_on_a_pool_of_states"),
    "heads of a group mixed": (MOBA, "o.unflatten(1, (length, heads // groups)).transpose(2, 3)", "o.unflatten(1, (length, heads // groups))", "published grouped"),
    "positions of the batch, not of the row": (MOBA, "positions.repeat_interleave(heads // groups, 1)", "positions.repeat(1, heads // groups)", "published grouped"),
    "positions from 0 in every call": (MOBA, "positions = new.positions(before)", "positions = new.positions(0 * before)", "two_calls_equal_one"),
    "padding counted": (MOBA, "new = NewRows(rows, None if runs is None else runs.length)", "new = NewRows(rows)", "padded_rows_equal_their_runs_alone"),
    "NaN never chosen": (INDEXER, "scores.masked_fill(scores.isnan(), torch.inf)", "scores", "a_nan_stays_in_its_sequence"),
    "compressed blocks tell the future": (NSA, "torch.div(positions + 1 - self.block", "torch.div(positions + 1 - self.stride", "future"),
    "compressed blocks seen too early": (NSA, "torch.div(positions + 1 - self.block", "torch.div(positions + 1 - self.stride", "published"),
    "compressed keys for values": (NSA, "k, v = compressed.split(self.head_dim, -1)", "k, v = compressed.split(self.head_dim, -1); v = k", "published"),
    "importance without the overlap": (NSA, "for a in range(spans)", "for a in range(spans - 1, spans)", "published"),
    "importance one stride off": (NSA, "F.pad(p, (spans - 1,", "F.pad(p, (spans - 2,", "published"),
    "importance of one head": (NSA, 'over="group", block_ends', 'over="group", reduce="max", block_ends', "published grouped"),
    "first block not forced": (NSA, "(block < self.first_blocks) |", "", "published"),
    "future blocks chosen": (NSA, ".masked_fill(block > own, -torch.inf)", "", "published"),
    "gates exchanged": (NSA, "gates[..., c, None]", "gates[..., 2 - c, None]", "published"),
    "window one long": (NSA, '"window": self.window', '"window": self.window + 1', "published"),
    "positions in the block left out": (NSA, "(windows + self.positions)", "windows", "published"),
    "least and largest exchanged": (QUEST, 'mode="minmax").values', 'mode="minmax").values.roll(self.head_dim, -1)', "published"),
    "a group's mean bound": (QUEST, 'reduce="max",', 'reduce="mean",', "published by groups"),
    "always dense": (QUEST, "if self.dense_forward and not seen.stepping", "if not seen.stepping", "published"),
    "dense in steps": (QUEST, "and not seen.stepping", "", "test_quest_with_a_dense_forward_chooses_in_its_steps_alone"),
    "the indexer's ReLU left out": (INDEXER, 'kind="relu", weight=weight[', 'kind="dot", weight=weight[', "published"),
    "the indexer's keys turned whole": (INDEXER, "half = self.index_dim // 2", "half = self.index_dim", "published"),
    "the indexer sees the future": (INDEXER, "q_positions=positions[:, at]", "q_positions=positions[:, at] + 1", "published"),
    "the indexer's gradient reaches x": (INDEXER, "runs.align(x)).detach()", "runs.align(x))", "loss"),
    "the attention learns from the loss": (INDEXER, "with torch.no_grad():\n            p =", "if True:\n            p =", "loss"),
    "loss over the sum of heads": (INDEXER, 'over="heads", reduce="mean", **places', 'over="heads", **places', "loss"),
    "loss counts padding": (INDEXER, "torch.where(runs.valid, divergence, 0.0)", "divergence", "test_the_loss_of_padded_and_packed_texts_is_that_of_their_tokens"),
}  # fmt: skip
FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, ValueError)


def source_of(name):
    return inspect.getsource(importlib.import_module(f"memattn.nn.{name}"))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, monkeypatch):
    layer, old, new, check = BUGS[bug]
    module, subject = MODULES[layer]
    lines = source_of(module).splitlines(keepends=True)
    sources = source_of(BASE), "".join(x for x in lines if not x.startswith(f"from memattn.nn.{BASE} import"))
    monkeypatch.setitem(sys.modules, "planted_layer", types.ModuleType("planted_layer"))
    buggy = sys.modules["planted_layer"]
    for code in relations.with_bug(bug, old, new, *sources):
        exec(code, buggy.__dict__)
    planted = getattr(buggy, layer)
    monkeypatch.setitem(tests.PUBLISHED, planted, tests.PUBLISHED[getattr(tests, layer)])
    monkeypatch.setattr(tests, layer, planted)
    with pytest.raises(FAILURES):
        if check.startswith("published"):
            names = {"published": subject, "published grouped": f"grouped {subject}"}
            tests.test_published_equations_and_gradients(names.get(check, f"{subject} by groups"))
        elif check == "future":
            tests.test_no_summary_tells_of_tokens_to_come(subject)
        elif check == "loss":
            tests.test_the_indexer_learns_from_its_loss_alone("grouped indexer", True)
        elif check.startswith("test_"):
            getattr(tests, check)()
        else:
            layers.run(check, tests.SUBJECTS[subject])
