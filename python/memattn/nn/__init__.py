"""Memories as torch.nn modules: parameters, projections and state. The arithmetic is in `memattn.ops`."""

from memattn.nn.delta_net import DeltaNet
from memattn.nn.delta_rule_layer import DeltaRuleState
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.rat import RAT, RATPlus

__all__ = ["RAT", "DeltaNet", "DeltaRuleState", "GatedDeltaNet", "GatedRMSNorm", "RATPlus"]
