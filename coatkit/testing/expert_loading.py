"""Checks on how an expert comes into being: what it reaches for, what it is made of, and its identity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coatkit.errors import AssetError
from coatkit.testing.bench import Bench, Failed, parameters, parts
from coatkit.testing.checkpoints import EXTRA, SPOILS, Checkpoint
from coatkit.testing.expert_base import ExpertBase
from coatkit.testing.fresh import Found, look
from coatkit.testing.loading import SharedLoadingChecks


class LoadingChecks(SharedLoadingChecks, ExpertBase):
    """Loading, here and in a new interpreter; the manifest; frozen weights; fingerprint; checkpoints."""

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Found:
        """The expert in a new interpreter, once for all checks."""
        loads = not isinstance(bench.expert, Failed) and not bench.uses_backbone
        options = bench.options if loads else None
        folder = tmp_path_factory.mktemp("elsewhere")
        return look(bench.light_modules, cls.name, options, torch.get_num_threads(), folder)

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint | None:
        """The author's checkpoint, if there is one."""
        path = cls().checkpoint(tmp_path_factory.mktemp("checkpoint"))
        return None if path is None else Checkpoint(path, cls.checkpoint_tensor)

    def test_loads(self, bench: Bench) -> None:
        """`coatkit.load_expert` makes it from its options."""
        if bench.lacks_backbone:
            self.skip("it reads a backbone's features; override backbone() in this class to give one")
        if isinstance(bench.expert, Failed):
            self.fail(
                f"it could not be loaded: {bench.expert}",
                "repair load(), or give `options` it can be loaded with here, such as weights: random",
            )

    def test_works_in_a_fresh_process(self, bench: Bench, elsewhere: Found) -> None:
        """A new interpreter loads it, encodes with it, and finds the same fingerprint: `--resume` needs that."""
        expert = self.loaded(bench)
        if bench.uses_backbone:
            self.skip("it needs a backbone, which a new process does not have")
        if elsewhere.error:
            self.fail(
                f"a new Python process with an empty home and no network could not use it: {elsewhere.error}",
                "let it need nothing that another module or an earlier run has left behind",
            )
        if elsewhere.fingerprint != expert.fingerprint():
            self.fail(
                "its fingerprint is another one in a new process",
                "leave out of fingerprint() what changes from run to run: hash(), id(), the order of a set, a time, a"
                " temporary path; draw random weights from a generator of their own",
            )

    def test_manifest_is_true(self, bench: Bench) -> None:
        """What `coatkit plugins` prints of it is what it is."""
        expert, manifest = self.loaded(bench), bench.component.manifest
        if manifest is None:
            self.skip("it is no installed plugin, so it has no manifest")
        for name in ("sample_rate", "frame_rate", "dim"):
            said, true = getattr(manifest, name), getattr(expert, name)
            if said is not None and abs(said - true) > 1e-6 * abs(true):
                self.fail(
                    f"its manifest says {name} {said:g}, the loaded expert {true:g}",
                    f"set {name} in the manifest to {true!r}, or leave it out where it depends on options",
                )

    def test_weights_are_frozen(self, bench: Bench) -> None:
        """No parameter asks for gradient."""
        free = [name for name, tensor in parameters(self.loaded(bench)).items() if tensor.requires_grad]
        if free:
            self.fail(
                f"{len(free)} of its tensors require gradient, {free[0]} first",
                "call .requires_grad_(False) on its modules in load",
            )

    def test_modules_are_in_eval_mode(self, bench: Bench) -> None:
        """Dropout and batch norms behave as in use, not as in training."""
        for where, part in parts(self.loaded(bench)):
            if isinstance(part, nn.Module):
                for name, module in part.named_modules():
                    if module.training:
                        place = f"{where}.{name}" if name else where
                        self.fail(f"{place} is in training mode", "call .eval() on its modules in load")

    def test_second_load_is_equal(self, bench: Bench) -> None:
        """Two instances with the same options give the same bits."""
        self.loaded(bench)
        second = bench.second
        if isinstance(second, Failed):
            self.fail(
                f"it loads once and not twice: {second}", "leave nothing behind in load that a second one trips over"
            )
        alone = self.alone(bench)[0]
        features = bench.attempt(lambda: bench.encode(second, bench.arrays[0]))
        if isinstance(features, Failed):
            self.fail(f"a second instance cannot encode: {features}", "share nothing between instances")
        if not torch.equal(features.values, alone.values) or not torch.equal(features.lengths, alone.lengths):
            self.fail(
                "a second instance with the same options gives other features",
                "fill every tensor from the weights; draw random ones from a generator with a fixed seed",
            )

    def test_fingerprint_is_stable(self, bench: Bench) -> None:
        """The same before and after encoding, and for two instances: it keys stored features and ties a run to them."""
        self.plain(bench)
        expert = self.loaded(bench)
        first = bench.attempt(expert.fingerprint)
        if not isinstance(first, str) or not first:
            self.fail(f"fingerprint() gave {first}", "give a string, as the inherited method does")
        bench.attempt(lambda: bench.encode(expert, *bench.arrays))
        if expert.fingerprint() != first:
            self.fail(
                "its fingerprint changes when it encodes",
                "keep what encode caches out of fingerprint(), for instance in an object of its own",
            )
        if self.second(bench).fingerprint() != first:
            self.fail(
                "two instances with the same options have different fingerprints",
                "leave out what differs between instances: id(), a counter, a time, a temporary path",
            )

    def test_fingerprint_follows_the_weights(self, bench: Bench) -> None:
        """Other weights, another fingerprint: else stored features of the old ones would be used."""
        second = self.second(bench)
        before = bench.attempt(second.fingerprint)
        if not isinstance(before, str):
            self.skip("it has no fingerprint; test_fingerprint_is_stable says why")
        if self.other_options is not None:
            if bench.load(**self.other_options).fingerprint() == before:
                self.fail(
                    f"its fingerprint is the same with {dict(self.other_options)}",
                    "hash weights and settings in fingerprint(), as the inherited method does",
                )
            return
        tensors = bench.weights
        if not tensors:
            self.skip("it holds no tensors; where weights lie elsewhere, set other_options")
        names = list(tensors)
        for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
            with torch.no_grad():
                kept = tensors[name].clone()
                tensors[name].add_(1)
                after = second.fingerprint()
                tensors[name].copy_(kept)
            if after == before:
                self.fail(
                    f"its fingerprint does not change when {name} changes",
                    "hash every tensor in fingerprint(); the inherited method does for modules and tensors that are"
                    " attributes. Where it is taken from the weights file, set other_options to other weights",
                )

    def test_checkpoint_loads(self, bench: Bench, saved: Checkpoint | None) -> None:
        """The author's checkpoint is read as it is; without that, refusing spoiled ones means nothing."""
        if trouble := self._trouble(bench, self._whole(bench, saved)):
            self.fail(f"its own checkpoint does not load: {trouble}", "repair load() or checkpoint()")

    @pytest.mark.parametrize("how", SPOILS)
    def test_damaged_checkpoint_is_refused(self, bench: Bench, saved: Checkpoint | None, how: str) -> None:
        """A tensor that is missing, unknown or of another shape, and a file cut short, are named in an AssetError."""
        checkpoint = self._whole(bench, saved)
        if self._trouble(bench, checkpoint):
            self.skip("its own checkpoint does not load; test_checkpoint_loads says why")
        wanted = {"unexpected": EXTRA, "truncated": checkpoint.file.name}.get(how)
        wanted = wanted or self.checkpoint_says or checkpoint.tensor
        said = {
            "missing": f"{checkpoint.tensor} is missing from the checkpoint",
            "unexpected": f"the checkpoint holds an unknown tensor {EXTRA} beside {checkpoint.tensor}",
            "shape": f"{checkpoint.tensor} has another shape in the checkpoint",
            "truncated": "the checkpoint is cut in half",
        }[how]
        remedy = "read it with coatkit.read_weights and fill the network with coatkit.fill_weights, which name misfits"
        checkpoint.spoil(how)
        try:
            found = bench.attempt(lambda: bench.load(**{self.weights_option: str(checkpoint.path)}))
        finally:
            checkpoint.mend()
        if not isinstance(found, Failed):
            self.fail(f"{said}, and it loads without a word", remedy)
        if not isinstance(found.error, AssetError):
            self.fail(f"{said}, and the error is no coatkit.AssetError but {found}", remedy)
        if wanted not in str(found.error):
            self.fail(
                f"{said}, and the error does not name {wanted}: {found.error}",
                "name it; where the expert renames tensors, set checkpoint_says to the name its message uses",
            )

    def _whole(self, bench: Bench, saved: Checkpoint | None) -> Checkpoint:
        if bench.lacks_backbone:
            self.skip("it reads a backbone's features; override backbone() in this class to give one")
        if saved is None:
            self.skip("no checkpoint to read; override checkpoint(folder) in this class to write one")
        return saved

    def _trouble(self, bench: Bench, checkpoint: Checkpoint) -> str:
        if checkpoint.trouble is None:
            found = bench.attempt(lambda: bench.load(**{self.weights_option: str(checkpoint.path)}))
            checkpoint.trouble = str(found) if isinstance(found, Failed) else ""
        return checkpoint.trouble
