"""Checks on how a backbone comes into being: what it reaches for, whether it is the same each time, its identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from coatkit.backbones.options import BackboneOptions
from coatkit.errors import AssetError
from coatkit.protocols import Backbone
from coatkit.testing.backbone_base import BackboneBase
from coatkit.testing.backbone_bench import BackboneBench
from coatkit.testing.bench import Failed, parts
from coatkit.testing.fresh import Found, look
from coatkit.testing.loading import SharedLoadingChecks


class LoadingChecks(SharedLoadingChecks, BackboneBase):
    """Loading, here and in a new interpreter; the manifest; the fingerprint; what data workers get."""

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, bench: BackboneBench, tmp_path_factory: pytest.TempPathFactory) -> Found:
        """The backbone in a new interpreter, once for all checks."""
        options = None if isinstance(bench.raw, Failed) else bench.options
        folder = tmp_path_factory.mktemp("elsewhere")
        return look(bench.light_modules, cls.name, options, torch.get_num_threads(), folder, "backbone")

    def test_loads(self, bench: BackboneBench) -> None:
        """`coatkit.load_backbone` makes it from its options, and it has what the protocol asks for."""
        for backbone in (bench.raw, bench.backbone):
            if isinstance(backbone, Failed):
                self.broken("loading", backbone, "repair load(), or give `options` it can be loaded with here")
        assert isinstance(bench.raw, Backbone)
        for name in ("preparer", "model", "hidden_size", "audio_dims"):
            if not hasattr(bench.raw, name):
                self.fail(f"it has no {name} after load", f"set self.{name} in load; see coatkit.Backbone")
        for name in ("sample_rate", "frame_rate", "thinking_rate"):
            value = getattr(bench.raw.preparer, name, None)
            if not isinstance(value, int | float) or value <= 0:
                self.fail(f"its preparer's {name} is {value!r}", f"set {name} to a positive number of Hz")
        if "consumed" not in bench.raw.audio_dims:
            self.fail("audio_dims does not say how wide `consumed` is", "set audio_dims['consumed'] in load")

    def test_works_in_a_fresh_process(self, bench: BackboneBench, elsewhere: Found) -> None:
        """A new interpreter loads it, hears with it, and finds the same fingerprint: `--resume` needs that."""
        self.loaded(bench)
        assert isinstance(bench.raw, Backbone)
        if elsewhere.error:
            self.fail(
                f"a new Python process with an empty home and no network could not use it: {elsewhere.error}",
                "let it need nothing that another module or an earlier run has left behind",
            )
        if elsewhere.fingerprint != bench.raw.fingerprint():
            self.fail(
                "its fingerprint is another one in a new process",
                "leave out of fingerprint() what changes from run to run: hash(), id(), the order of a set, a time, a"
                " temporary path; draw random weights from a generator with a fixed seed",
            )

    def test_manifest_is_true(self, bench: BackboneBench) -> None:
        """What `coatkit plugins` prints of it is what it is; `dim` is that of the default weights."""
        backbone, manifest = self.loaded(bench), bench.attempt(lambda: bench.component).manifest  # type: ignore[union-attr]
        if manifest is None:
            self.skip("it is no installed plugin, so it has no manifest")
        true = {"sample_rate": backbone.preparer.sample_rate, "frame_rate": backbone.preparer.frame_rate}
        default: Any = backbone
        if manifest.dim is not None and bench.options.get("weights", "default") != "default":
            default = bench.attempt(lambda: bench.sketched(weights="default")[0])  # needs none of those weights
        if isinstance(default, Backbone):
            true["dim"] = default.hidden_size
        for name, value in true.items():
            said = getattr(manifest, name)
            which = "default" if name == "dim" else "loaded"
            if said is not None and abs(said - value) > 1e-6 * value:
                self.fail(
                    f"its manifest says {name} {said:g}, the {which} backbone {value:g}",
                    f"set {name} in the manifest to {value!r}",
                )

    def test_second_load_is_equal(self, bench: BackboneBench) -> None:
        """Two instances with the same options have the same weights, adapters and token rows, bit for bit."""
        self.loaded(bench)
        if isinstance(bench.second, Failed):
            self.broken("loading it a second time", bench.second, "leave nothing in load that another trips over")
        if bench.loads_differ:
            self.fail(
                f"{bench.loads_differ} is another one in a second instance with the same options",
                "fill every tensor from the weights; draw random ones from a generator with a fixed seed",
            )

    def test_fingerprint_is_stable(self, bench: BackboneBench) -> None:
        """The same for two instances, and before and after training: `--resume` and `ask` compare it."""
        self.loaded(bench)
        one, other = bench.raw, bench.second
        assert isinstance(one, Backbone)
        first = bench.attempt(one.fingerprint)
        if not isinstance(first, str) or not first:
            self.fail(f"fingerprint() gave {first}", "give a string, as the inherited method does")
        if isinstance(other, Backbone) and other.fingerprint() != first:
            self.fail(
                "two instances with the same options have different fingerprints",
                "leave out what differs between instances: id(), a counter, a time, a temporary path",
            )
        trained = bench.load()
        with torch.no_grad():
            for parameter in trained.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        bench.attempt(lambda: bench.forward(trained, bench.prepare(trained)))
        if trained.fingerprint() != first:
            self.fail(
                "its fingerprint changes when it learns or is used, so a run could not be resumed",
                "hash frozen weights only, as the inherited method does; take nothing in that a pass leaves behind",
            )

    def test_fingerprint_follows_the_weights(self, bench: BackboneBench) -> None:
        """Other frozen weights, another fingerprint: a run must not go on with a backbone it was not trained on."""
        self.loaded(bench)
        if not isinstance(bench.second, Backbone):
            self.skip("it cannot be loaded twice; test_second_load_is_equal says why")
        second = bench.second
        before = bench.attempt(second.fingerprint)
        if not isinstance(before, str):
            self.skip("it has no fingerprint; test_fingerprint_is_stable says why")
        frozen = {name: p for name, p in second.model.named_parameters() if not p.requires_grad}
        names = list(frozen)
        for name in dict.fromkeys(names[:1] + names[len(names) // 2 :: max(1, len(names) // 2)] + names[-1:]):
            with torch.no_grad():
                kept = frozen[name].clone()
                frozen[name].add_(1)
                after = second.fingerprint()
                frozen[name].copy_(kept)
            if after == before:
                self.fail(
                    f"its fingerprint does not change when {name} changes",
                    "hash a sample of every frozen tensor in fingerprint(), as the inherited method does",
                )

    def test_a_folder_without_a_model_is_refused(self, bench: BackboneBench) -> None:
        """`weights` that is no model folder is an AssetError that names it; nothing is looked up by its name."""
        if not isinstance(getattr(self.loaded(bench), "options", None), BackboneOptions):
            self.skip("its options are no coatkit.BackboneOptions, so it is not known what takes a folder")
        empty = bench.folder / "no_model_here"
        empty.mkdir(exist_ok=True)
        remedy = "find the folder with coatkit.backbones.folder.weights_folder"
        found = bench.attempt(lambda: bench.load(weights=str(empty)))
        if not isinstance(found, Failed):
            self.fail("an empty folder as `weights` loads without a word", remedy)
        if not isinstance(found.error, AssetError) or str(empty) not in str(found.error):
            self.fail(f"an empty folder as `weights` is no AssetError that names it, but {found}", remedy)

    def test_preparer_holds_no_network(self, bench: BackboneBench) -> None:
        """Data workers get the preparer: with a network in it, each would hold the weights."""
        backbone = self.loaded(bench)
        for where, part in parts(backbone.preparer):
            if isinstance(part, nn.Module) and any(True for _ in part.parameters()):
                self.fail(
                    f"its preparer holds a network: {where}",
                    "give the preparer tokenizer, front end and settings only",
                )
