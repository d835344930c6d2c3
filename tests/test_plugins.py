"""Plugins: found through real entry points, guarded while loading, and resolved by name, file or module."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coatkit import plugins
from coatkit.errors import PluginError
from coatkit.manifest import Asset, Manifest
from coatkit.plugins import Registry, all_manifests, registry

GOOD = """
from coatkit import Manifest, hookimpl

@hookimpl
def coatkit_manifests():
    return [Manifest(kind="{kind}", name="{name}", target="{target}", summary="a test's own")]
"""

Install = Callable[..., Registry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lay out an installed distribution on `sys.path` and scan again."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def add(distribution: str, source: str, *, version: str = "1.2", metadata: bool = True) -> Registry:
        module = distribution.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[coatkit]\n{module} = {module}\n")
        importlib.invalidate_caches()
        registry.cache_clear()
        return registry()

    yield add
    registry.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def good(kind: str = "expert", name: str = "fancy", target: str = "fancy_code:Fancy") -> str:
    return GOOD.format(kind=kind, name=name, target=target)


def broken_of(found: Registry, distribution: str) -> plugins.Broken:
    [broken] = [b for b in found.broken if b.distribution == distribution]
    return broken


def test_the_built_in_heads_come_through_an_entry_point() -> None:
    heads = {o.manifest.name: o for o in all_manifests() if o.manifest.kind == "head"}
    assert heads["transformer"].distribution == heads["linear"].distribution == "coatkit"
    assert not registry().broken


def test_an_installed_plugin_is_found_with_its_distribution(install: Install) -> None:
    found = install("coatkit-expert-fancy", good())
    offer = found.find("expert", "fancy")
    assert (offer.distribution, offer.version, offer.manifest.target) == (
        "coatkit-expert-fancy",
        "1.2",
        "fancy_code:Fancy",
    )
    assert "fancy_code" not in sys.modules


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('no libfancy.so')", "OSError: no libfancy.so"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import module_that_is_not_there", "ModuleNotFoundError: No module named 'module_that_is_not_there'"),
        ("x = (", "SyntaxError:"),
        ("", "PluginError: it offers no manifest: is coatkit_manifests() missing or unmarked by @hookimpl?"),
        ("def coatkit_manifests(): return []", "PluginError: it offers no manifest"),
        ("from coatkit import hookimpl\n@hookimpl\ndef coatkit_manifest(): ...", "PluginValidationError: unknown hook"),
        ("from coatkit import hookimpl\n@hookimpl\ndef coatkit_manifests(): return [1]", "gave a int, not a Manifest"),
        ("from coatkit import hookimpl\n@hookimpl\ndef coatkit_manifests(): return 1", "TypeError:"),
        ("from coatkit import hookimpl\n@hookimpl\ndef coatkit_manifests(): return None", "it offers no manifest"),
        ("from coatkit import hookimpl\n@hookimpl\ndef coatkit_manifests(): 1 / 0", "ZeroDivisionError"),
        (good(target="no_colon"), "must look like 'module:Name'"),
        (good(kind="expret"), "kind 'expret' is not one of expert, head, backbone"),
    ],
)
def test_a_broken_plugin_is_recorded_and_stops_no_other(install: Install, source: str, reason: str) -> None:
    install("coatkit-expert-fancy", good())
    found = install("coatkit-expert-broken", source, version="0.3")
    broken = broken_of(found, "coatkit-expert-broken")
    assert reason in broken.error
    assert (broken.version, broken.entry_point) == ("0.3", "coatkit_expert_broken = coatkit_expert_broken")
    assert found.find("expert", "fancy").distribution == "coatkit-expert-fancy"
    assert "transformer" in found.names("head")


def test_an_installation_without_metadata_stops_nothing(install: Install) -> None:
    found = install("coatkit-expert-damaged", good(), metadata=False)
    assert "transformer" in found.names("head")


def test_a_manifest_of_a_broken_list_is_not_offered(install: Install) -> None:
    half = good().replace('own")]', 'own"), "not a manifest"]')
    assert "fancy" not in install("coatkit-expert-half", half).names("expert")


def test_ctrl_c_while_scanning_is_passed_on(install: Install) -> None:
    with pytest.raises(KeyboardInterrupt):
        install("coatkit-expert-slow", "raise KeyboardInterrupt")


def test_two_plugins_of_one_name_are_both_named(install: Install) -> None:
    install("coatkit-expert-one", good(name="same"))
    found = install("coatkit-expert-two", good(name="same"), version="2.0")
    with pytest.raises(PluginError) as caught:
        found.find("expert", "same")
    assert "coatkit-expert-one 1.2" in str(caught.value)
    assert "coatkit-expert-two 2.0" in str(caught.value)
    assert found.names("expert").count("same") == 1


def test_a_name_is_taken_within_its_kind_only(install: Install) -> None:
    install("coatkit-expert-one", good(name="same"))
    found = install("coatkit-head-same", good(kind="head", name="same"))
    assert found.find("expert", "same").distribution == "coatkit-expert-one"
    assert found.find("head", "same").distribution == "coatkit-head-same"


def test_an_unknown_name_gets_the_nearest_the_package_and_what_failed(install: Install) -> None:
    install("coatkit-expert-fancy", good())
    found = install("coatkit-expert-fanny", "raise OSError('no libfancy.so')")
    with pytest.raises(PluginError) as caught:
        found.find("expert", "fanzy")
    text = str(caught.value)
    assert "no expert named 'fanzy' is installed" in text
    assert "did you mean 'fancy'?" in text
    assert "pip install coatkit-expert-fanzy" in text
    assert "coatkit-expert-fanny 1.2 failed to load: OSError: no libfancy.so" in text


def test_no_package_is_suggested_for_a_head(install: Install) -> None:
    with pytest.raises(PluginError) as caught:
        registry().find("head", "fanzy")
    assert "installed: linear, transformer" in str(caught.value)
    assert "pip install" not in str(caught.value)


# From a component to its class

EXPERT = """
from coatkit import Expert
import coatkit

class Mine(Expert):
    sample_rate, frame_rate, dim = 16000, 50.0, 1
    def encode(self, audio): ...

class Plain: ...
class MyHead(coatkit.Head): ...
thing = 3
class Broken(Expert): ...
"""


def test_a_class_is_loaded_from_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "my experts.py").write_text(EXPERT)
    component = registry().resolve("expert", "./my experts.py:Mine", tmp_path)
    cls = component.load_class()
    assert cls.dim == 1
    assert registry().resolve("expert", "./my experts.py:Mine", tmp_path).load_class() is cls
    assert sys.modules[cls.__module__].__file__ == str(tmp_path / "my experts.py")  # pickling finds its module


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    classes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(EXPERT)
        classes.append(registry().resolve("expert", "./mine.py:Mine", tmp_path / name).load_class())
    assert classes[0] is not classes[1]


def test_a_class_is_loaded_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_package"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('resolving must not import')\n")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "code.py").write_text(EXPERT)
    monkeypatch.syspath_prepend(str(tmp_path))
    component = registry().resolve("expert", "their_package.deep.code:Mine", tmp_path)
    assert component.source_file() == package / "deep" / "code.py"
    with pytest.raises(PluginError, match="RuntimeError: resolving must not import"):
        component.load_class()
    (package / "__init__.py").write_text("")
    assert component.load_class().__name__ == "Mine"
    for name in [n for n in sys.modules if n.startswith("their_package")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("./mine.py:Plain", "is not a subclass of coatkit.Expert"),
        ("./mine.py:MyHead", "is not a subclass of coatkit.Expert"),
        ("./mine.py:thing", "is not a subclass of coatkit.Expert"),
    ],
)
def test_a_class_of_the_wrong_kind_is_refused(tmp_path: Path, use: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(EXPERT)
    with pytest.raises(PluginError) as caught:
        registry().resolve("expert", use, tmp_path).load_class()
    assert said in str(caught.value)
    assert use in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import numpy\nnumpy.no_such_thing\nclass Mine: ...", "AttributeError: module 'numpy' has no attribute"),
        ("import sys\nsys.exit(1)\nclass Mine: ...", "SystemExit: 1"),
        ("raise ValueError('odd')\nclass Mine: ...", "ValueError: odd"),
        ("class Mine: ...\ndel Mine", "there is no 'Mine' in "),
    ],
)
def test_a_file_that_fails_says_how(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    component = registry().resolve("expert", "./mine.py:Mine", tmp_path)
    with pytest.raises(PluginError) as caught:
        component.load_class()
    assert said in str(caught.value)
    assert str(caught.value).startswith("./mine.py:Mine: ")


def test_a_file_that_failed_may_be_repaired(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise ValueError('odd')\nclass Mine: ...")
    component = registry().resolve("expert", "./mine.py:Mine", tmp_path)
    with pytest.raises(PluginError, match="ValueError: odd"):
        component.load_class()
    (tmp_path / "mine.py").write_text(EXPERT)
    assert component.load_class().__name__ == "Mine"


def test_a_plugins_missing_class_and_options_model_are_named(install: Install, tmp_path: Path) -> None:
    source = GOOD.replace("summary=", 'options="fancy_code:NoOptions", summary=')
    (tmp_path / "site" / "fancy_code.py").write_text("")
    component = install(
        "coatkit-expert-fancy", source.format(kind="expert", name="fancy", target="fancy_code:Gone")
    ).resolve("expert", "fancy", tmp_path)
    with pytest.raises(PluginError, match="fancy: there is no 'Gone' in fancy_code"):
        component.load_class()
    with pytest.raises(PluginError, match="fancy: there is no 'NoOptions' in fancy_code"):
        component.options_model()


def test_a_failing_plugin_names_its_distribution(install: Install, tmp_path: Path) -> None:
    found = install("coatkit-expert-fancy", good(target="no_such_fancy_code:Fancy"))
    with pytest.raises(PluginError, match=r"importing no_such_fancy_code:Fancy \(from coatkit-expert-fancy\) failed"):
        found.resolve("expert", "fancy", tmp_path).load_class()


# Manifests


@pytest.mark.parametrize("reference", ["module", "a:b:c", ""])
def test_a_manifest_must_name_module_and_class(reference: str) -> None:
    with pytest.raises(ValueError, match="must look like 'module:Name'"):
        Manifest(kind="expert", name="x", target=reference)
    with pytest.raises(ValueError, match="must look like 'module:Name'"):
        Manifest(kind="expert", name="x", target="a:b", options=reference)


def test_manifests_are_hashable_and_equal_by_value() -> None:
    asset = Asset("w", "https://example.org/w")
    assert len({Manifest("head", "x", "a:B", assets=(asset,)), Manifest("head", "x", "a:B", assets=(asset,))}) == 1
