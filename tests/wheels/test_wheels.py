"""Every package built, and used from its wheel alone, in the order a user would install them. `make test-wheels`.

Environments hold the packages' wheels; what those require of others is seen through a folder of links to this
environment's packages, in which nothing of coatkit is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BUILDER = Path(os.environ.get("COATKIT_WHEELS", ROOT / ".wheels")) / "bin" / "python"
PACKAGES = {"coatkit": ROOT} | {path.name: path for path in sorted((ROOT / "plugins").iterdir()) if path.is_dir()}
PYTHONS = ("3.11", "3.12", "3.13")
LIGHT = ("click", "filelock", "huggingface_hub", "pluggy", "pydantic", "pyyaml")
"""What commands that load no torch need of other packages."""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1", **environment},
        timeout=900,
    )


def well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tracked(folder: Path) -> list[Path]:
    """The files of a package that git has or would take, without what other packages and environments leave there."""
    names = well(run("git", "ls-files", "-co", "--exclude-standard", "-z", ".", cwd=folder)).split("\0")
    return sorted({Path(name) for name in names if name and (folder / name).is_file()})


@dataclass
class Built:
    """A folder of wheels and source distributions."""

    folder: Path

    def wheel(self, package: str) -> Path:
        (found,) = self.folder.glob(f"{package.replace('-', '_')}-[0-9]*.whl")
        return found

    def sdist(self, package: str) -> Path:
        (found,) = self.folder.glob(f"{package.replace('-', '_')}-[0-9]*.tar.gz")
        return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """All packages, each built from a copy of what git has of it, its wheel from its source distribution."""
    assert BUILDER.exists(), "there is no environment to build with: make test-wheels"
    place = tmp_path_factory.mktemp("built")
    for name, folder in PACKAGES.items():
        copy = place / "source" / name
        for path in tracked(folder):
            if name != "coatkit" or path.parts[0] in ("coatkit", "tests") or len(path.parts) == 1:
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / path, copy / path)
        well(run(BUILDER, "-m", "build", "--no-isolation", "--outdir", place / "dist", copy, cwd=copy))
    shutil.rmtree(place / "source")
    return Built(place / "dist")


@pytest.fixture(scope="session")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This environment's packages but coatkit's, and none of the files that lead elsewhere."""
    place = tmp_path_factory.mktemp("links")
    for path in (path for entry in sys.path if entry.endswith("site-packages") for path in Path(entry).iterdir()):
        if not path.name.startswith(("coatkit", "__editable__", "pip")) and path.suffix != ".pth":
            (place / path.name).symlink_to(path)
    return place


@dataclass
class Environment:
    """An environment that starts without coatkit."""

    folder: Path
    built: Built

    def pip(self, *arguments: object) -> str:
        return well(run(self.folder / "bin/python", "-m", "pip", *arguments, cwd=self.folder))

    def install(self, *packages: str) -> str:
        """From the wheels alone: no index is asked."""
        return self.pip("install", "--no-index", "--find-links", self.built.folder, *packages)

    def uninstall(self, package: str) -> None:
        self.pip("uninstall", "--yes", package)

    def python(self, code: str) -> str:
        return well(run(self.folder / "bin/python", "-c", code, cwd=self.folder)).strip()

    def coatkit(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run(self.folder / "bin/coatkit", *arguments, cwd=self.folder)


def fresh(python: str | Path, folder: Path, built: Built, links: Path | None) -> Environment:
    well(run(python, "-m", "venv", folder, cwd=folder.parent))
    made = Environment(folder, built)
    if links is not None:
        made.pip(
            "uninstall", "--quiet", "--yes", "setuptools"
        )  # venv's own is too old for torch; there is one in links
        site = made.python("import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(site) / "beside.pth").write_text(f"{links}\n")
    return made


# What is in the packages


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        return file.read(name).decode()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_holds_the_package_and_nothing_else(name: str, built: Built) -> None:
    source = "" if name == "coatkit" else "src/"
    wanted = {
        path.as_posix().removeprefix(source)
        for path in tracked(PACKAGES[name])
        if path.as_posix().startswith(f"{source}{name.replace('-', '_')}/")
    }
    with zipfile.ZipFile(built.wheel(name)) as file:
        held = {n for n in file.namelist() if not n.endswith("/")}
    info = f"{name.replace('-', '_')}-"
    assert {n for n in held if not n.startswith(info)} == wanted
    assert any(n.endswith("/py.typed") for n in held)
    assert any(re.search(r"\.dist-info/licenses/LICENSE$", n) for n in held)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_source_distribution_has_the_licence_and_the_readme(name: str, built: Built) -> None:
    with tarfile.open(built.sdist(name)) as file:
        held = {n.partition("/")[2] for n in file.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= held
    assert not {n for n in held if n.startswith(("build/", ".venv", "examples/", "plugins/"))}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_metadata_says_what_it_runs_on(name: str, built: Built) -> None:
    told = metadata(built.wheel(name))
    assert "Requires-Python: >=3.11" in told
    assert "License-Expression: Apache-2.0" in told
    for version in PYTHONS:
        assert f"Classifier: Programming Language :: Python :: {version}" in told
    assert "Description-Content-Type: text/markdown" in told


def test_the_extra_of_the_paper_names_packages_that_are_built(built: Built) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert len(extras["paper"]) == 9
    for package in extras["paper"]:
        assert built.wheel(package)


# Installing and removing, in the order a user would


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, built: Built, links: Path) -> Environment:
    return fresh(sys.executable, tmp_path_factory.mktemp("env") / "user", built, links)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    random = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(4):
            soundfile.write(folder / f"{i}.wav", 0.1 * random.normal(size=16000).astype(np.float32), 16000)
            talk = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "Noise."}]
            file.write(json.dumps({"id": str(i), "audio": f"{i}.wav", "messages": talk}) + "\n")
    spec = {
        "name": "wheels",
        "backbone": {"use": "mini", "weights": "random", "lora": {"rank": 2}},
        "experts": {"mert": {"weights": "random", "layers": 1}},
        "head": {"use": "linear"},
        "data": {"train": "rows.jsonl"},
        "stages": [{"name": "one", "steps": 2, "lr": 1.0e-3, "batch": {"rows": 2}, "weights": {"mert": 1.0}}],
        "output": "run",
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "suite.yml").write_text("tasks: [{name: a, data: rows.jsonl, metric: exact, max_new_tokens: 4}]\n")
    return folder


def test_one_after_the_other(environment: Environment, project: Path) -> None:
    """One test, since each step starts from what the one before left."""
    spec, folder = project / "spec.yaml", project / "run"

    # The core alone: it is the wheel's, it has its heads, and it says what to install.
    environment.install("coatkit")
    place = environment.python("import coatkit; print(coatkit.__file__)")
    assert Path(place).is_relative_to(environment.folder)
    assert [line.split()[:2] for line in well(environment.coatkit("plugins")).splitlines()[1:]] == [
        ["head", "linear"],
        ["head", "transformer"],
    ]
    assert well(environment.coatkit("schema")).startswith("{")
    alone = environment.coatkit("check", spec)
    assert alone.returncode == 2
    assert "pip install coatkit-expert-mert" in alone.stderr
    assert "pip install coatkit-backbone-mini" in alone.stderr

    # A plugin that comes later is found.
    environment.install("coatkit-backbone-mini")
    environment.install("coatkit-expert-mert")
    listed = well(environment.coatkit("plugins"))
    assert re.search(r"expert +mert .*coatkit-expert-mert 0\.1\.0", listed)
    where = environment.python("import coatkit_expert_mert; print(coatkit_expert_mert.__file__)")
    assert Path(where).is_relative_to(environment.folder)
    assert "experts.mert: mert (coatkit-expert-mert 0.1.0)" in well(environment.coatkit("check", spec))
    well(environment.coatkit("train", spec))
    ask = ("ask", folder, project / "0.wav", "What?", "--max-new-tokens", 4)
    answered = well(environment.coatkit(*ask))

    # Without the expert: answers need its heads, not its teacher, so the run is used as before.
    environment.uninstall("coatkit-expert-mert")
    assert "mert" not in well(environment.coatkit("plugins"))
    assert well(environment.coatkit(*ask)) == answered
    well(environment.coatkit("eval", folder, "--data", project / "suite.yml"))
    well(environment.coatkit("report", folder, "--out", project / "report.html"))
    # What does need it names it, its version and how to get it.
    remedy = (
        "this run was made with coatkit-expert-mert 0.1.0; install it again: pip install coatkit-expert-mert==0.1.0"
    )
    for command in (("check", folder / "spec.yaml"), ("train", spec, "--resume")):
        done = environment.coatkit(*command)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "no expert named 'mert' is installed" in done.stderr
        assert command[0] == "train" or remedy in done.stderr
    seen = environment.coatkit("view", folder, project / "0.wav", "--out", project / "view.html")
    assert "Traceback" not in seen.stderr
    assert seen.returncode == 2
    assert remedy in seen.stderr

    # Without the backbone nothing can answer; what was written can still be read.
    environment.uninstall("coatkit-backbone-mini")
    done = environment.coatkit(*ask)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "made with coatkit-backbone-mini 0.1.0; install it again: pip install coatkit-backbone-mini==" in done.stderr
    well(environment.coatkit("report", folder, "--out", project / "report2.html"))

    # And with both again, all is as it was.
    environment.install("coatkit-backbone-mini", "coatkit-expert-mert")
    assert well(environment.coatkit(*ask)) == answered


def test_the_extra_of_the_paper_installs_from_wheels(
    tmp_path_factory: pytest.TempPathFactory, built: Built, links: Path
) -> None:
    made = fresh(sys.executable, tmp_path_factory.mktemp("env") / "paper", built, links)
    made.install("coatkit[paper]")
    listed = {tuple(line.split()[:2]) for line in well(made.coatkit("plugins")).splitlines()[1:]}
    assert {("expert", n) for n in ("audio", "basic-pitch", "emotion2vec", "mert", "panns", "spidr")} <= listed
    assert {("backbone", n) for n in ("audio-flamingo-3", "qwen2-audio", "qwen2.5-omni")} <= listed
    # The files beside the code came along.
    assert "basic-pitch" in well(made.coatkit("explain", "experts.basic-pitch.aux_weight"))


@pytest.mark.parametrize("extra", ["analysis", "demo"])
def test_the_other_extras_resolve(
    extra: str, tmp_path_factory: pytest.TempPathFactory, built: Built, links: Path
) -> None:
    made = fresh(sys.executable, tmp_path_factory.mktemp("env") / extra, built, links)
    said = made.pip("install", "--dry-run", "--find-links", built.folder, f"coatkit[{extra}]")
    assert re.search(r"Would install .*coatkit-0\.1\.0", said)
    for conflict in ("torch-", "transformers-", "numpy-"):
        assert f" {conflict}" not in said.partition("Would install")[2], (
            "the extra wants another one than the tests have"
        )


# The Pythons that are here


def pythons() -> list[tuple[str, str]]:
    """Version and interpreter of each that is here; named in COATKIT_PYTHONS, on the path, or in pyenv's folder."""
    found = {".".join(map(str, sys.version_info[:2])): sys.executable}
    named = os.environ.get("COATKIT_PYTHONS", "").split(os.pathsep)
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python"))
    for place in [*named, *(shutil.which(f"python{v}") for v in PYTHONS), *map(str, kept)]:
        if place:
            asked = subprocess.run(
                [place, "-c", "import sys, ssl, ctypes; print('%d.%d' % sys.version_info[:2])"],
                capture_output=True,
                text=True,
            )
            if asked.returncode == 0 and (version := asked.stdout.strip()) in PYTHONS:
                found.setdefault(version, place)
    return sorted(found.items())


@pytest.mark.parametrize(("version", "python"), pythons(), ids=lambda value: value if value[0] == "3" else "")
def test_it_installs_and_checks_specs_on(
    version: str, python: str, tmp_path_factory: pytest.TempPathFactory, built: Built, project: Path
) -> None:
    """All packages' code compiles, and what needs no torch runs; torch for several Pythons is not fetched here."""
    made = fresh(python, tmp_path_factory.mktemp("env") / version, built, None)
    wheels = [built.wheel(name) for name in PACKAGES]
    made.pip("install", "--quiet", *LIGHT)
    made.pip("install", "--quiet", "--no-index", "--no-deps", *wheels)
    assert made.python("import sys; print('%d.%d' % sys.version_info[:2])") == version
    site = made.python("import sysconfig; print(sysconfig.get_path('purelib'))")
    folders = [Path(site) / name.replace("-", "_") for name in PACKAGES]
    well(run(made.folder / "bin/python", "-W", "error", "-m", "compileall", "-q", "-f", *folders, cwd=made.folder))
    assert "experts.mert: mert" in well(made.coatkit("check", project / "spec.yaml"))
    listed = made.coatkit("plugins")
    assert "failed" not in listed.stderr
    assert json.loads(well(made.coatkit("schema")))["title"] == "coatkit spec"
    assert "default: 0.5" in well(made.coatkit("explain", "experts.basic-pitch.aux_weight"))
