"""The ops: one file each, with equation, shapes, errors and source in its docstring."""

from memattn.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]
