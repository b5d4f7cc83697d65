"""Memories as torch.nn modules: parameters, projections and state. The arithmetic is in `memattn.ops`."""

from memattn.nn.actqkv_attention import ActQKVAttention
from memattn.nn.associative_memory import AssociativeRecurrentMemory
from memattn.nn.block_recurrent import BlockRecurrentAttention
from memattn.nn.block_retrieval import BlockRetrievalState
from memattn.nn.delta_net import DeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.eviction_cache import EvictionCache
from memattn.nn.extended_mind_attention import ExtendedMindAttention, ExtendedMindState
from memattn.nn.forgetting_attention import ForgettingAttention
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.hierarchical_chunk_memory import HierarchicalChunkMemory
from memattn.nn.hierarchical_memory import HierarchicalMemory
from memattn.nn.hybrid_stack import HybridStack, StackState
from memattn.nn.infini_attention import InfiniAttention, InfiniAttentionState
from memattn.nn.infllm_attention import InfLLMAttention
from memattn.nn.kv_cache import HiddenMemory, KVCache, WindowCache
from memattn.nn.lightning_indexer_attention import IndexedCache, LightningIndexerAttention
from memattn.nn.lizard import Lizard, LizardState
from memattn.nn.long_mem_attention import LongMem, LongMemAttention
from memattn.nn.memformer import Memformer
from memattn.nn.memorizing_attention import KNNMemory, MemorizingAttention
from memattn.nn.memory_replay import memory_replay
from memattn.nn.memory_tokens import MemoryTokensState
from memattn.nn.mixture_of_block_attention import MixtureOfBlockAttention
from memattn.nn.multivariate_infini_attention import MultivariateInfiniAttention
from memattn.nn.native_sparse_attention import NativeSparseAttention
from memattn.nn.quest_attention import QuestAttention
from memattn.nn.rat import RAT, RATPlus
from memattn.nn.recurrent_memory import RecurrentMemory
from memattn.nn.sliding_window_attention import SlidingWindowAttention
from memattn.nn.summary_tokens import SummaryTokens
from memattn.nn.think_cache import ThinKCache
from memattn.nn.transformer_xl import TransformerXL
from memattn.nn.working_memory import WorkingMemory

__all__ = [
    "ActQKVAttention",
    "AssociativeRecurrentMemory",
    "BlockRecurrentAttention",
    "BlockRetrievalState",
    "DeltaNet",
    "DeltaRuleState",
    "EvictionCache",
    "ExtendedMindAttention",
    "ExtendedMindState",
    "ForgettingAttention",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "HiddenMemory",
    "HierarchicalChunkMemory",
    "HierarchicalMemory",
    "HybridStack",
    "IndexedCache",
    "InfLLMAttention",
    "InfiniAttention",
    "InfiniAttentionState",
    "KNNMemory",
    "KVCache",
    "LightningIndexerAttention",
    "Lizard",
    "LizardState",
    "LongMem",
    "LongMemAttention",
    "Memformer",
    "MemorizingAttention",
    "MemoryTokensState",
    "MixtureOfBlockAttention",
    "MultivariateInfiniAttention",
    "NativeSparseAttention",
    "QuestAttention",
    "RAT",
    "RATPlus",
    "RecurrentMemory",
    "SlidingWindowAttention",
    "StackState",
    "SummaryTokens",
    "ThinKCache",
    "TransformerXL",
    "WindowCache",
    "WorkingMemory",
    "memory_replay",
]
