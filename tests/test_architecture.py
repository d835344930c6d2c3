"""The shape of the core: imports run one way, files stay small, and no plugin is known by name."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "coatkit"

# From the bottom up: a module imports only from lines above its own, at import time or later.
LAYERS = """
errors files spikes manifest memory losses readout progress page sharding head_options backbones.options spec_data
data.budgets
spec zero data.lines data.formats.tables
hookspecs spec_reader protocols precision download weights data.rows checkpoint thinking store
data.containers data.formats.common
data.formats.columns
builtin plugins assets parallel align waveforms heads data.audio data.batches backbones.whisper backbones.quantize
data.formats.ms_swift data.formats.sharegpt data.formats.nemo data.formats.lhotse
data.formats.datasets data.formats.parquet backbones.counting trust spec_check
spec_file data.readers packing backbones.preparer backbones.adapters run_folder
data.filters data.steps backbones.chat journal recovery
data.pools backbones.publishing
data.mixture
data.sources
data.scan
model backbones.hf backbones.folder backbones.tiny
features gradients
build calibrate optimization run_record plan_rows worker
foreign
plan_costs extract data.survey verdict scaffold
plan data.page thought
streaming
trainer infer evaluation.text evaluation.choices evaluation.notes evaluation.suite evaluation.rubric
debug_nan evaluation.metrics evaluation.cot evaluation.judge_client analysis.plots analysis.agreement
evaluation.bootstrap evaluation.items analysis.latency analysis.report_read analysis.hear analysis.view_plots
serving
evaluation.likelihood evaluation.predictions evaluation.results evaluation.judge
analysis.latency_local analysis.report analysis.view
evaluation.generate evaluation.compare analysis.latency_server
evaluation.evaluate analysis.probe analysis.probe_states analysis.ablate_study analysis.ablate_table demo.guard
analysis.ablate_arms analysis.ablate_job analysis.probe_report demo.asking schema
analysis.ablate_processes analysis.ablate_runs demo.page explain doctor
analysis.ablate demo.server export.card export.hub
export.write
testing.suite testing.guard testing.sounds testing.checkpoints testing.pytest_plugin
testing.bench testing.fresh
testing.loading
testing.expert_base testing.backbone_bench
testing.expert_encoding testing.expert_loading testing.expert_loss testing.backbone_base
testing.backbone_loading testing.backbone_preparing testing.backbone_forward
testing.backbone_learning testing.backbone_generating testing.backbone_folder testing.backbone_sketch
testing.experts testing.backbones testing.heads
cli.ablate
cli.ask cli.cache cli.check cli.compare cli.data cli.eval cli.fetch cli.latency cli.mix cli.plan cli.plugins cli.train
cli.demo cli.doctor cli.explain cli.export cli.new cli.probe cli.report cli.schema cli.view
cli
__main__
"""
LAYER_OF = {name: level for level, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
# Their __init__ holds nothing, or names imported on first use.
PACKAGES = {"", "data", "data.formats", "backbones", "evaluation", "analysis", "demo", "export", "testing"}

# What the spec and the command line may cost at import time.
HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "soundfile", "soxr", "safetensors", "tensorboard"}
LIGHT = {
    *("errors", "manifest", "hookspecs", "plugins", "builtin", "spec", "spec_data", "spec_file", "spec_reader"),
    *("spec_check", "assets", "download", "files", "trust", "head_options", "backbones.options", "evaluation.suite"),
    *("analysis.ablate_study", "analysis.ablate_arms", "schema", "explain", "doctor", "verdict", "scaffold"),
}

MODULES = {
    ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(CORE.rglob("*.py"))
}


def imports(name: str, *, lazy: bool) -> set[str]:
    """Dotted names a module imports, leaving out those for type checkers and, unless `lazy`, those in functions."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from walk(child)

    return set(walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))))


def core_imports(name: str) -> set[str]:
    """Modules of coatkit that a module imports, at import time or later."""
    found = set()
    for dotted in imports(name, lazy=True):
        if dotted.partition(".")[0] == "coatkit":
            inner = dotted.removeprefix("coatkit").removeprefix(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def code_lines(path: Path) -> int:
    """Lines without blank ones, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    words = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    ]
    lines = {line for token in words for line in range(token.start[0], token.end[0] + 1)}
    lines.discard(source.count("\n") + 1)  # the end marker
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) - PACKAGES == set(LAYER_OF)


@pytest.mark.parametrize("name", sorted(set(LAYER_OF)))
def test_imports_run_one_way(name: str) -> None:
    for other in core_imports(name) - {"", name}:
        assert LAYER_OF[other] < LAYER_OF[name], f"coatkit.{name} imports coatkit.{other}"


def test_packages_import_nothing_of_the_core() -> None:
    assert not core_imports("data") | core_imports("backbones")
    assert not core_imports("") - {""}, "coatkit/__init__.py must import on first use only"
    assert not core_imports("testing"), "coatkit/testing/__init__.py must import on first use only"


@pytest.mark.parametrize("name", sorted(name for name in LAYER_OF if not name.startswith("testing.")))
def test_the_kit_for_authors_stays_outside_the_core(name: str) -> None:
    assert not {other for other in core_imports(name) if other.partition(".")[0] == "testing"}
    assert "pytest" not in {dotted.partition(".")[0] for dotted in imports(name, lazy=True)}


@pytest.mark.parametrize("name", ["testing.guard", "testing.fresh"])
def test_what_looks_at_entry_modules_imports_no_torch(name: str) -> None:
    assert not {dotted.partition(".")[0] for dotted in imports(name, lazy=False)} & {*HEAVY, "pytest"}


def test_the_core_knows_no_plugin() -> None:
    for name, path in MODULES.items():
        assert not {dotted for dotted in imports(name, lazy=True) if dotted.startswith("coatkit_")}, name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for folder in (ROOT / "plugins").iterdir():
                    assert folder.name.replace("-", "_") not in node.value, f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_what_checks_a_spec_imports_no_torch(name: str) -> None:
    assert not {dotted.partition(".")[0] for dotted in imports(name, lazy=False)} & HEAVY
    # Nor through another module; `plugins` meets the protocols only when a class is loaded.
    light = {other for other in core_imports(name) if other} - ({"protocols"} if name == "plugins" else set())
    assert light <= LIGHT


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("cli")))
def test_commands_import_click_and_the_standard_library_alone(name: str) -> None:
    allowed = {"__future__", "click", "collections", "difflib", "importlib", "os", "pathlib", "sys", "typing"}
    assert {dotted.partition(".")[0] for dotted in imports(name, lazy=False)} <= allowed


@pytest.mark.parametrize(
    "name", [*sorted(n for n in LAYER_OF if n.startswith("data.")), "align", "thinking", "losses", "heads"]
)
def test_parts_do_not_reach_up_to_the_trainer(name: str) -> None:
    reached, todo = set(), [name]
    while todo:
        new = core_imports(todo.pop()) - reached
        reached |= new
        todo += new
    assert not {n for n in reached if n in ("trainer", "infer", "build", "model") or n.startswith("cli")}


def test_manifests_need_the_standard_library_alone() -> None:
    assert {dotted.partition(".")[0] for dotted in imports("manifest", lazy=True)} <= {
        "__future__",
        "dataclasses",
        "typing",
    }


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


# What stands beside the method: commands, planning, drawing and looking at data, readers of foreign formats, other
# interpreters and launchers, the feature store, passes that measure losses, fetching weights, what guards a run and
# says what is wrong, using and exporting a run, evaluation, analysis and demo, and the kit for authors. The rest is
# what a reader of the method goes through.
ASIDE = ("testing", "cli", "plan", "evaluation", "data.formats", "data.lines", "data.containers", "data.mixture")
ASIDE += (
    "data.pools",
    "data.budgets",
    "data.filters",
    "data.survey",
    "data.page",
    "page",
    "extract",
    "foreign",
    "worker",
)
ASIDE += ("zero", "backbones.quantize", "download", "store", "features", "thought", "analysis", "demo")
ASIDE += ("export", "backbones.chat", "backbones.publishing", "infer", "serving", "streaming", "calibrate", "gradients")
ASIDE += ("assets", "trust", "doctor", "journal", "recovery", "spikes", "schema", "explain", "verdict", "scaffold")
ASIDE += ("debug_nan", "spec_check")


def test_the_core_is_small() -> None:
    core = [path for name, path in MODULES.items() if not name.startswith(ASIDE)]
    assert sum(code_lines(path) for path in core) < 4600


def test_what_counts_as_code(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    lines = ['"""Doc.', "", 'More."""', "", "# note", 'x = """a', "", 'b"""  # note', "", "", "def f():", '    "doc"']
    path.write_text("\n".join([*lines, "    return (", "        x", "    )", ""]))
    assert code_lines(path) == 3 + 1 + 3  # x, def, return


def test_public_names_are_the_ones_announced() -> None:
    import coatkit

    hinted = {
        alias.asname
        for node in ast.walk(ast.parse(MODULES[""].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("coatkit.")
        for alias in node.names
    }
    assert hinted == set(coatkit.__all__) - {"__version__"}
    assert all(getattr(coatkit, name) is not None for name in coatkit.__all__)
    assert set(dir(coatkit)) == set(coatkit.__all__)
    with pytest.raises(AttributeError, match=r"public names: .*Expert"):
        coatkit.Expart  # noqa: B018


# Beside the public names: what a plugin that evaluates may import, to score as `coatkit eval` does.
SCORING = ("coatkit.evaluation", "coatkit.data.audio")


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*/src/**/*.py")), ids=lambda path: path.name)
def test_plugins_import_public_names_only(path: Path) -> None:
    import coatkit

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "coatkit":
            if node.module == "coatkit":
                assert {alias.name for alias in node.names} <= set(coatkit.__all__), f"{path}:{node.lineno}"
            else:
                allowed = SCORING if "coatkit-eval-" in str(path) else "coatkit.backbones"
                assert (node.module or "").startswith(allowed), f"{path}:{node.lineno}"
