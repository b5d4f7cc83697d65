"""Memories as torch.nn modules: parameters, projections and state. The arithmetic is in `memattn.ops`."""

from memattn.nn.delta_net import DeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.forgetting_attention import ForgettingAttention
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.hybrid_stack import HybridStack, StackState
from memattn.nn.kv_cache import HiddenMemory, KVCache, WindowCache
from memattn.nn.memformer import Memformer
from memattn.nn.memory_replay import memory_replay
from memattn.nn.memory_tokens import MemoryTokensState
from memattn.nn.recurrent_memory import RecurrentMemory
from memattn.nn.sliding_window_attention import SlidingWindowAttention
from memattn.nn.summary_tokens import SummaryTokens
from memattn.nn.transformer_xl import TransformerXL

__all__ = [
    "DeltaNet",
    "DeltaRuleState",
    "ForgettingAttention",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "HiddenMemory",
    "HybridStack",
    "KVCache",
    "Memformer",
    "MemoryTokensState",
    "RecurrentMemory",
    "SlidingWindowAttention",
    "StackState",
    "SummaryTokens",
    "TransformerXL",
    "WindowCache",
    "memory_replay",
]
