"""Memories as torch.nn modules: parameters, projections and state. The arithmetic is in `memattn.ops`."""

from memattn.nn.block_recurrent import BlockRecurrentAttention
from memattn.nn.delta_net import DeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.hierarchical_memory import HierarchicalMemory
from memattn.nn.memformer import Memformer
from memattn.nn.memory_replay import memory_replay
from memattn.nn.working_memory import WorkingMemory

__all__ = [
    "BlockRecurrentAttention",
    "DeltaNet",
    "DeltaRuleState",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "HierarchicalMemory",
    "Memformer",
    "WorkingMemory",
    "memory_replay",
]
