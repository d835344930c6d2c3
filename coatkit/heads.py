"""The built-in heads: from thinking states [A, L, hidden_size] to one expert's space [A, L, dim]."""

from __future__ import annotations

from torch import Tensor, nn

from coatkit.protocols import Head


class LinearHead(Head):
    """One linear map (the paper's head ablation)."""

    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden_size, dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        projected: Tensor = self.out(hidden)
        return projected


class TransformerHead(Head):
    """One pre-norm Transformer block over a sound's thinking states, then a linear map (paper section 3).

    Attention stays within one sound and ignores padding. There is no positional encoding of its own: the states come
    from a causal language model and carry their position.

    Raises:
        ValueError: If `heads` does not divide `hidden_size`.
    """

    def __init__(
        self, hidden_size: int, dim: int, heads: int = 8, feedforward: float = 4.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"head option 'heads: {heads}' does not divide the backbone's width {hidden_size}")
        self.block = nn.TransformerEncoderLayer(
            hidden_size,
            heads,
            int(hidden_size * feedforward),
            dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # A sound without thinking positions would attend to nothing and give NaN; let it see its own padding.
        blocked = ~mask & mask.any(1, keepdim=True)
        projected: Tensor = self.out(self.norm(self.block(hidden, src_key_padding_mask=blocked)))
        return projected
