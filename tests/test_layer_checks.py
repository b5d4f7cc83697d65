"""The checks of tests/support/layers.py find what is planted: each bug in a GatedDeltaNet fails the named check."""

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject
from torch import nn

from memattn.nn import GatedDeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.padding import PaddedRows

EMBED = 32


class Buggy(GatedDeltaNet):
    """A GatedDeltaNet one method of which a bug replaces."""

    def __init__(self, **kwargs):
        super().__init__(EMBED, 2, chunk_size=16, **kwargs)


class ForgetsTheTail(Buggy):
    def forward(self, x, state=None, **kwargs):
        return super().forward(x, state and DeltaRuleState(state.memory, 0 * state.conv), **kwargs)


class ChangesTheStateItReads(Buggy):
    def forward(self, x, state=None, **kwargs):
        result = super().forward(x, state, **kwargs)
        if state is not None:
            with torch.no_grad():
                state.memory.mul_(0.9)
        return result


class IgnoresTheState(Buggy):
    def forward(self, x, state=None, **kwargs):
        return super().forward(x, None, **kwargs)


class StepReturnsACopy(Buggy):
    def step(self, x, state, **kwargs):
        y, after = super().step(x, state, **kwargs)
        return y, after.clone()


class StepForgetsToWrite(Buggy):
    def step(self, x, state, **kwargs):
        y, _ = super().step(x, state.clone(), **kwargs)
        return y, state


class SeesTheNextToken(Buggy):
    def forward(self, x, state=None, **kwargs):
        return super().forward(x + 0.1 * x.roll(-1, 1), state, **kwargs)


class PaddingDecays(Buggy):
    def forward(self, x, state=None, *, attention_mask=None, **kwargs):
        if attention_mask is not None:  # zeros in place of padding, which then counts as tokens
            x = PaddedRows(attention_mask, x).align(x)
            y, after = super().forward(x, state, **{**kwargs, "return_state": True})
            return PaddedRows(attention_mask, y).restore(y), after
        return super().forward(x, state, **kwargs)


class PackedAsOne(Buggy):
    def forward(self, x, state=None, *, cu_seqlens=None, **kwargs):
        if cu_seqlens is None:
            return super().forward(x, state, **kwargs)
        y, after = super().forward(x, state and state.reorder(layers.rows(0)), **{**kwargs, "return_state": True})
        return y, after.reorder(torch.zeros(len(cu_seqlens) - 1, dtype=torch.long))


class DetachesTheState(Buggy):
    def forward(self, x, state=None, **kwargs):
        return super().forward(x, state and state.detach(), **kwargs)


class HasAnIdleParameter(Buggy):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.idle = nn.Parameter(torch.zeros(3, device=kwargs.get("device"), dtype=kwargs.get("dtype")))


class ResetsAllButTheDecay(Buggy):
    def reset_parameters(self):
        self.A_log.data.zero_()
        for child in self.children():
            child.reset_parameters()


class HidesAWeight(Buggy):
    def state_dict(self, *args, **kwargs):
        return {**super().state_dict(*args, **kwargs), "A_log": torch.zeros(2)}


class RoundsItsGates(Buggy):
    def _gates(self, x):
        g, beta = super()._gates(x)
        return g if g.dtype == torch.float64 else g.to(torch.float8_e4m3fn).to(g.dtype), beta


class PoolIgnoresItsIndices(Buggy):
    def step(self, x, state, *, state_indices=None):
        y, _ = super().step(x, state.reorder(torch.arange(len(x))))
        return y, state


class BreaksTheGraph(Buggy):
    def forward(self, x, state=None, **kwargs):
        if float(x.sum()) == torch.pi:
            raise RuntimeError
        return super().forward(x, state, **kwargs)


CAUGHT_BY = {
    ForgetsTheTail: "two_calls_equal_one",
    ChangesTheStateItReads: "two_calls_equal_one",
    IgnoresTheState: "the_state_matters",
    StepReturnsACopy: "prefill_then_step_equals_one_call",
    StepForgetsToWrite: "step_takes_several_tokens",
    SeesTheNextToken: "later_tokens_do_not_reach_back",
    PaddingDecays: "padded_rows_equal_their_runs_alone",
    PackedAsOne: "packed_sequences_equal_separate_ones",
    DetachesTheState: "gradients_cross_the_state",
    HasAnIdleParameter: "gradients_reach_every_parameter",
    ResetsAllButTheDecay: "the_meta_device_then_reset_parameters_gives_a_new_layer",
    HidesAWeight: "a_state_dict_holds_all_of_it",
    RoundsItsGates: "bfloat16_is_near_float64",
    PoolIgnoresItsIndices: "step_on_a_pool_of_states",
    BreaksTheGraph: "it_compiles_as_one_graph",
}


@pytest.mark.parametrize("bug", CAUGHT_BY, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug):
    layers.run(CAUGHT_BY[bug], Subject(Buggy, EMBED, 16))
    with pytest.raises((AssertionError, RuntimeError)):
        layers.run(CAUGHT_BY[bug], Subject(bug, EMBED, 16))


def test_a_form_that_is_said_to_be_lacking_must_refuse():
    claims_no_padding = Subject(Buggy, EMBED, 16, Lacks(padding="not built"))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        layers.run("padded_rows_equal_their_runs_alone", claims_no_padding)
    with pytest.raises(ValueError, match="Lacks: padding is empty; expected the reason or None"):
        Lacks(padding="")
