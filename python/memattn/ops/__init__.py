"""The ops: one file each, with equation, shapes, errors and source in its docstring."""

from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.attention_mass import attention_mass
from memattn.ops.block_scores import block_scores
from memattn.ops.block_summary import BlockSummary, block_summary
from memattn.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from memattn.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from memattn.ops.gated_scan import gated_scan, gated_scan_step
from memattn.ops.gather_copy import gather_copy
from memattn.ops.knn_attention import KNNAttention, knn, knn_attention
from memattn.ops.linear_attention import linear_attention, linear_attention_step
from memattn.ops.memory_recall import memory_recall
from memattn.ops.merge_states import gated_combine, merge_states
from memattn.ops.rat_attention import RATState, rat_attention, rat_attention_step
from memattn.ops.segment_events import Events, EventState, segment_events
from memattn.ops.segment_memory import segment_memory, segment_memory_step
from memattn.ops.sign_codes import sign_codes
from memattn.ops.slot_gate import slot_gate
from memattn.ops.slot_write import slot_write
from memattn.ops.sparse_attention import sparse_attention
from memattn.ops.topk import TopK, topk

__all__ = [
    "AttentionOutput",
    "BlockSummary",
    "EventState",
    "Events",
    "KNNAttention",
    "RATState",
    "TopK",
    "attention",
    "attention_decode",
    "attention_mass",
    "block_scores",
    "block_summary",
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_combine",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_scan",
    "gated_scan_step",
    "gather_copy",
    "knn",
    "knn_attention",
    "linear_attention",
    "linear_attention_step",
    "memory_recall",
    "merge_states",
    "rat_attention",
    "rat_attention_step",
    "segment_events",
    "segment_memory",
    "segment_memory_step",
    "sign_codes",
    "slot_gate",
    "slot_write",
    "sparse_attention",
    "topk",
]
