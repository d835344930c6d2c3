"""Rows end to end in one sequence, in place of padding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coatkit.protocols import Inputs
from coatkit.thinking import IGNORE


def packed(inputs: Inputs) -> Inputs:
    """Right-padded rows [B, T] as one row [1, N] of their N real tokens, with positions that begin anew at each.

    A model that attends within runs of positions computes the same as for the padded batch. Several rows of a batch
    become one for the backbone only: sounds, ids and counts stay what they were.
    """
    tokens = dict(inputs.tokens)
    inside = tokens.pop("attention_mask").bool()
    lengths = inside.sum(1)
    first = lengths.cumsum(0) - lengths
    tokens["input_ids"] = tokens["input_ids"][inside][None]
    tokens["position_ids"] = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    labels = inputs.labels
    if labels is not None:
        labels = labels[inside][None].clone()
        labels[0, first] = IGNORE  # nobody's first token follows from another row's last

    def moved(index: Tensor, counts: Tensor) -> Tensor:
        """Positions [A, L] within each sound's row, as positions within the one row; padding stays 0."""
        valid = torch.arange(index.shape[1]) < counts[:, None]
        return (index + first[inputs.audio_row][:, None]) * valid

    return replace(
        inputs,
        tokens=tokens,
        labels=labels,
        audio_row=torch.zeros_like(inputs.audio_row),
        audio_index=moved(inputs.audio_index, inputs.audio_lengths),
        think_index=moved(inputs.think_index, inputs.think_lengths),
    )
