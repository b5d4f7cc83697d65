"""Memories as torch.nn modules: parameters, projections and state. The arithmetic is in `memattn.ops`."""

from memattn.nn.delta_net import DeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.hybrid_stack import HybridStack, StackState
from memattn.nn.memformer import Memformer
from memattn.nn.memory_replay import memory_replay
from memattn.nn.memory_tokens import MemoryTokensState
from memattn.nn.recurrent_memory import RecurrentMemory
from memattn.nn.summary_tokens import SummaryTokens

__all__ = [
    "DeltaNet",
    "DeltaRuleState",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "HybridStack",
    "Memformer",
    "MemoryTokensState",
    "RecurrentMemory",
    "StackState",
    "SummaryTokens",
    "memory_replay",
]
