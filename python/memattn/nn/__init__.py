"""Memories as torch.nn modules: parameters, projections and state. The arithmetic is in `memattn.ops`."""

from memattn.nn.block_recurrent import BlockRecurrentAttention
from memattn.nn.delta_net import DeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.forgetting_attention import ForgettingAttention
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.hierarchical_memory import HierarchicalMemory
from memattn.nn.hybrid_stack import HybridStack, StackState
from memattn.nn.kv_cache import KVCache, WindowCache
from memattn.nn.memformer import Memformer
from memattn.nn.memory_replay import memory_replay
from memattn.nn.memory_tokens import MemoryTokensState
from memattn.nn.recurrent_memory import RecurrentMemory
from memattn.nn.sliding_window_attention import SlidingWindowAttention
from memattn.nn.summary_tokens import SummaryTokens
from memattn.nn.working_memory import WorkingMemory

__all__ = [
    "BlockRecurrentAttention",
    "DeltaNet",
    "DeltaRuleState",
    "ForgettingAttention",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "HierarchicalMemory",
    "HybridStack",
    "KVCache",
    "Memformer",
    "MemoryTokensState",
    "RecurrentMemory",
    "SlidingWindowAttention",
    "StackState",
    "SummaryTokens",
    "WindowCache",
    "WorkingMemory",
    "memory_replay",
]
