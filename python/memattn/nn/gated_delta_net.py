"""Gated DeltaNet layer (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464), in the form also found in Qwen3-Next."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.delta_rule_layer import DeltaRuleLayer

DECAY_RATES = (0.0, 16.0)  # A is drawn uniformly from here
TIME_STEPS = (1e-3, 0.1)  # softplus(dt_bias) is drawn log-uniformly from here


class GatedDeltaNet(DeltaRuleLayer):
    """A layer whose memory is one matrix per head: it forgets by a learnt decay and overwrites what a key held before.

    S_t = (I − β_t k_t k_tᵀ) e^{g_t} S_{t−1} + β_t k_t v_tᵀ,  g = −exp(A_log) · softplus(decay_proj x + dt_bias),
    β = sigmoid(beta_proj x), twice that with allow_neg_eigval (eigenvalues down to −1: Grazzi et al. 2024, arXiv
    2411.12537). Gates and state are float32. The readout is RMSNorm(Sᵀq) · silu(gate_proj x) per head.

    head_dim defaults to embed_dim / num_heads, value_head_dim to head_dim, num_value_heads to num_heads. The paper uses
    num_heads · head_dim = ¾ embed_dim and value_head_dim = 2 · head_dim; Qwen3-Next two value heads per key head.

    Initialisation as published by the authors and kept in flash-linear-attention (fla/layers/gated_deltanet.py), after
    Mamba-2: A uniform in (0, 16), softplus(dt_bias) log-uniform in [0.001, 0.1]; projections as torch.nn.Linear.
    Weight decay is meant for the projections only, not for A_log and dt_bias.

    >>> layer = GatedDeltaNet(256, num_heads=4)
    >>> y = layer(x)                                        # train
    >>> y, state = layer(prompt, return_state=True)         # prefill, in as many parts as you like
    >>> y_t, state = layer.step(x_t, state)                 # generate; updates state in place
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
            conv_bias=conv_bias,
            output_gate=True,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            chunk_size=chunk_size,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.decay_proj = nn.Linear(embed_dim, self.num_value_heads, bias=False, **factory)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads, **factory))
        self._reset_decay()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_decay()

    @torch.no_grad()
    def _reset_decay(self) -> None:
        rates = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*DECAY_RATES)
        self.A_log.copy_(rates.clamp(min=1e-4).log())
        low, high = map(math.log, TIME_STEPS)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def _gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        beta, decay = self._beta(x), self.decay_proj(x)
        # softplus(x) = −logsigmoid(−x)
        log_keep = F.logsigmoid(-(decay.to(beta.dtype) + self.dt_bias.to(beta.dtype)))
        return self.A_log.to(beta.dtype).exp() * log_keep, beta
