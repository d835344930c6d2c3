"""The check on a backbone's sketch, which planning counts in place of the model."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import nn

from coatkit.backbones.hf import HFBackbone
from coatkit.errors import PluginError
from coatkit.protocols import Backbone, Sketch
from coatkit.testing.backbone_base import BackboneBase
from coatkit.testing.backbone_bench import BackboneBench
from coatkit.testing.bench import Failed


class SketchChecks(BackboneBase):
    """What is sketched is what is loaded."""

    def test_sketch_is_the_loaded_model(self, bench: BackboneBench) -> None:
        """`coatkit plan` counts what `sketch` builds without weights: it must be what training then loads."""
        self.loaded(bench)
        true = bench.raw
        assert isinstance(true, Backbone)
        found = bench.attempt(bench.sketched)
        if isinstance(found, Failed):
            if isinstance(found.error, PluginError):
                self.skip(f"it gives no sketch: {found.error}")
            self.broken("sketch()", found, "let it need no weights: build the model with `torch.device('meta')`")
        made, sketch = found
        if not isinstance(sketch, Sketch):
            self.fail(f"sketch() gave a {type(sketch).__name__}", "give a coatkit.protocols.Sketch")
        if valued := [name for name, p in made.model.named_parameters() if not p.is_meta]:
            self.fail(f"sketch() fills {valued[0]} with values", "build the model with `torch.device('meta')`")
        if wrong := _unlike(made, sketch, true):
            self.fail(
                f"sketch() and load() are not of one model: {wrong}",
                "give sketch() the configuration that load() reads, and the same options; resize embeddings as load()"
                " does",
            )
        for name in ("tower_flops", "tower_backward"):
            costs = [getattr(sketch, name)(seconds) for seconds in (0.5, 1.0, 10.0, 40.0)]
            grows = all(one < other for one, other in itertools.pairwise(costs)) and costs[0] > 0
            free = name == "tower_backward" and not any(costs)
            if not all(map(math.isfinite, costs)) or not (grows or free):
                self.fail(
                    f"the sketch's {name} of 0.5, 1, 10 and 40 s are {', '.join(f'{cost:.3g}' for cost in costs)}",
                    "count the operations of tower and projector on one sound: more for a longer one",
                )


def _unlike(made: Backbone, sketch: Sketch, true: Backbone) -> str:
    """What a sketched backbone has that the loaded one has not; empty where they are alike."""

    def of(backbone: Backbone) -> dict[str, Any]:
        frozen = sum(p.numel() for p in backbone.model.parameters() if not p.requires_grad)
        return {
            "hidden_size": backbone.hidden_size,
            "audio_dims": dict(backbone.audio_dims),
            "its preparer's sample_rate": backbone.preparer.sample_rate,
            "its preparer's frame_rate": backbone.preparer.frame_rate,
            **{f"parameter {name}": _shape(p) for name, p in backbone.model.named_parameters()},
            "the count of parts": {part: sum(p.numel() for p in ps) for part, ps in backbone.parts().items()},
            "the count of units": len(backbone.units()),
            "the count of frozen parameters": frozen,
        }

    planned, loaded = of(made), of(true)
    if sketch.frozen:
        planned["the count of frozen parameters"] = sum(sketch.frozen.values())
    if isinstance(true, HFBackbone):
        planned["vocabulary"] = sketch.vocabulary
        loaded["vocabulary"] = true.stock.get_output_embeddings().weight.shape[0]
    for what in {**planned, **loaded}:
        here, there = planned.get(what, "not there"), loaded.get(what, "not there")
        if here != there:
            return f"{what} is {here} in the sketch and {there} after load"
    return ""


def _shape(parameter: nn.Parameter) -> str:
    return f"{tuple(parameter.shape)} {parameter.dtype}{', which learns' if parameter.requires_grad else ''}"
