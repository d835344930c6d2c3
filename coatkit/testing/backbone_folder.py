"""Checks on the model folder that a backbone's option `weights` takes: it is read, and read strictly."""

from __future__ import annotations

import pytest

from coatkit.errors import AssetError
from coatkit.protocols import Backbone
from coatkit.testing.backbone_base import BackboneBase
from coatkit.testing.backbone_bench import BackboneBench
from coatkit.testing.bench import Failed
from coatkit.testing.checkpoints import EXTRA, SPOILS, Checkpoint

_REMEDY = "read it with coatkit.backbones.folder.read_model, which refuses what does not fit and names it"


class FolderChecks(BackboneBase):
    """A whole folder, and the same one damaged."""

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, bench: BackboneBench, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint | Failed | None:
        """The author's folder, or the one that the suite writes; None where nobody can write one."""
        folder = tmp_path_factory.mktemp("folder")
        path = cls().model_folder(folder)
        if path is None and not isinstance(bench.backbone, Failed):
            written = bench.attempt(lambda: bench.write_folder(folder))
            if isinstance(written, Failed):
                return written
            path = written
        return None if path is None else Checkpoint(path, like=".layers.")

    def test_model_folder_is_read(self, bench: BackboneBench, saved: Checkpoint | Failed | None) -> None:
        """`weights: FOLDER` gives the model in that folder, and no other."""
        folder = self._whole(bench, saved)
        one = bench.attempt(lambda: bench.load(weights=str(folder.path)))
        if isinstance(one, Failed):
            self.fail(f"a whole model folder does not load: {one}", "repair load() or model_folder()")
        folder.spoil("other")
        try:
            other = bench.attempt(lambda: bench.load(weights=str(folder.path)))
        finally:
            folder.mend()
        if not isinstance(other, Backbone) or other.fingerprint() == one.fingerprint():
            self.fail(
                f"with other values in {folder.tensor} of its model folder it is the same backbone",
                "read the model from the folder that `weights` names; see coatkit.backbones.folder.weights_folder",
            )

    @pytest.mark.parametrize("how", [*SPOILS, "gone"])
    def test_damaged_model_folder_is_refused(
        self, bench: BackboneBench, saved: Checkpoint | Failed | None, how: str
    ) -> None:
        """A tensor that is missing, unknown or of another shape, and a file cut short or gone, are an AssetError."""
        folder = self._whole(bench, saved)
        if folder.trouble:
            self.skip("its model folder does not load; test_model_folder_is_read says why")
        said = {
            "missing": f"{folder.tensor} is missing from the model folder",
            "unexpected": f"the model folder holds an unknown tensor {EXTRA} beside {folder.tensor}",
            "shape": f"{folder.tensor} has another shape in the model folder",
            "truncated": f"{folder.file.name} of the model folder is cut in half",
            "gone": f"the model folder has no {folder.file.name}",
        }[how]
        # An adapter may rename what is before the layer's own name.
        tensor = ".".join(folder.tensor.split(".")[-2:])
        wanted = {"missing": tensor, "unexpected": EXTRA, "shape": tensor}.get(how, "")
        folder.spoil(how)
        try:
            found = bench.attempt(lambda: bench.load(weights=str(folder.path)))
        finally:
            folder.mend()
        if not isinstance(found, Failed):
            self.fail(f"{said}, and it loads without a word", _REMEDY)
        if not isinstance(found.error, AssetError):
            self.fail(f"{said}, and the error is no coatkit.AssetError but {found}", _REMEDY)
        for name in (str(folder.path), wanted):
            if name not in str(found.error):
                self.fail(f"{said}, and the error does not name {name}: {found.error}", _REMEDY)

    def _whole(self, bench: BackboneBench, saved: Checkpoint | Failed | None) -> Checkpoint:
        """The folder; the check is left out where there is none, or the one the suite wrote cannot be read."""
        self.loaded(bench)
        why = "override model_folder() in this class to write one as this backbone reads it"
        if saved is None:
            self.skip(f"no model folder to read; {why}")
        if isinstance(saved, Failed):
            self.skip(f"no model folder could be written ({saved}); {why}")
        if saved.trouble is None:
            found = bench.attempt(lambda: bench.load(weights=str(saved.path)))
            saved.trouble = str(found) if isinstance(found, Failed) else ""
        if saved.trouble and type(self).model_folder is BackboneBase.model_folder:
            self.skip(f"the folder that transformers saves of its model does not load ({saved.trouble}); {why}")
        return saved
