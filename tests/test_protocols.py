"""The containers that plugins exchange."""

import pytest
import torch

from coatkit.protocols import AudioBatch, BackboneAudio


@pytest.mark.parametrize("with_tower", [True, False])
def test_sounds_move_with_the_backbones_features_of_them(with_tower: bool) -> None:
    tower = torch.ones(2, 3, 5) if with_tower else None
    heard = BackboneAudio(torch.ones(2, 3, 4), tower, torch.tensor([3, 2]), 25.0)
    moved = AudioBatch(torch.ones(2, 9), torch.tensor([9, 8]), 16_000, heard).to("meta")
    assert moved.backbone is not None
    here = [moved.samples, moved.lengths, moved.backbone.consumed, moved.backbone.lengths, moved.backbone.tower]
    assert [t.device.type for t in here if t is not None] == ["meta"] * (5 if with_tower else 4)
    assert (moved.sample_rate, moved.backbone.frame_rate) == (16_000, 25.0)
    assert heard.consumed.device.type == "cpu"
    assert AudioBatch(torch.ones(2, 9), torch.tensor([9, 8]), 16_000).to("meta").backbone is None
