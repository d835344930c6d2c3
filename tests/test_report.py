"""`coatkit report`: what stands on the page is what is in the run folders, and nothing of them runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coatkit.analysis.report import report
from coatkit.analysis.report_read import read_run
from coatkit.cli import cli
from coatkit.errors import RunError

EVIL = "<script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Path:
    project = new_project()
    run = project.train("gradients_every=2")
    folder: Path = run.folder
    task = {"metric": "choice", "score": 62.5, "low": 50.0, "high": 75.0, "rows": 8, "parse_failures": 1, "details": {}}
    (folder / "eval/heldout").mkdir(parents=True)
    (folder / "eval/heldout/results.json").write_text(json.dumps({"tasks": {"kind": task, EVIL: task}}))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "first"))


class Page(HTMLParser):
    """Tables by the heading they stand under, and every tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self._heading, self._within = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag
        if tag == "h2":
            self._heading = ""
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "h2":
            self._heading += data
        elif self._within in ("td", "th"):
            self.tables[self._heading][-1][-1] += data
        elif self._within not in ("script", "style"):
            self.words += data


def test_names_that_no_font_and_no_formula_can_hold(run: Path) -> None:
    names = ("\ud800", r"$\frac{$", "\x1b[2J", "n" * 5000)
    for file, key in (("metrics.jsonl", None), ("gradients.jsonl", "norms"), ("gradients.jsonl", "cosines")):
        lines = [json.loads(line) for line in (run / file).read_text().splitlines()]
        for line in lines:
            (line[key] if key else line).update(dict.fromkeys(names, 0.5))
        (run / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((run / "eval/heldout/results.json").read_text())
    results["tasks"] = dict.fromkeys(names, next(iter(results["tasks"].values())))
    (run / "eval/heldout/results.json").write_text(json.dumps(results))
    assert CliRunner().invoke(cli, ["report", str(run)], catch_exceptions=False).exit_code == 0
    told = [row[2] for row in Page(run / "report.html").tables["Evaluations"][1:]]
    assert told[:2] == ["?", r"$\frac{$"]


@pytest.mark.parametrize("wrong", ["[]", "3", "null", '"x"', '{"low": [], "high": "x", "details": 3}'])
def test_looks_and_scores_that_are_none_are_left_out(run: Path, wrong: str) -> None:
    (run / "gradients.jsonl").write_text(f'{{"step": 1, "norms": {wrong}}}\n{{"step": 2, "cosines": {wrong}}}\n')
    (run / "eval/heldout/results.json").write_text(f'{{"tasks": {{"kind": {wrong}}}}}')
    result = CliRunner().invoke(cli, ["report", str(run)], catch_exceptions=False)
    assert result.exit_code == 0
    told = Page(run / "report.html").words
    assert ("2 looks hold none" in told) == ("heldout/results.json holds no scores" in told) == (wrong[0] != "{")


def test_numbers_of_four_hundred_digits(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {10**400}, "loss": 1}}\n{{"step": 7, "loss": {10**400}, "seconds": {10**400}}}\n')
    assert CliRunner().invoke(cli, ["report", str(run)], catch_exceptions=False).exit_code == 0
    assert Page(run / "report.html").tables["Runs"][1][3] == "7"


def test_a_record_whose_list_is_none_is_refused(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "random_weights": 3}))
    with pytest.raises(RunError, match="random_weights is no list"):
        report([run], run / "report.html")


def test_one_run(run: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(run)], catch_exceptions=False)
    assert result.output.strip() == str(run / "report.html")
    page = Page(run / "report.html")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert page.tables["Runs"][1][:4] == ["first", "mini", "audio, level", "6"]
    assert page.tables["Runs"][1][6] == f"{last['loss']:.3f}"
    assert ["stages.1.weights.level", "2.0"] in page.tables["Spec"]
    assert page.tables["Evaluations"][1][1:6] == ["heldout", "kind", "choice", "8", "62.5"]
    pairs = {row[0] for row in page.tables["Which teachers pull apart"][1:]}
    assert pairs == {"ce and audio", "ce and level", "audio and level"}
    looks = [json.loads(line) for line in (run / "gradients.jsonl").read_text().splitlines()]
    cosines = [line["cosines"]["ce|audio"] for line in looks if "ce|audio" in line["cosines"]]
    (row,) = (row for row in page.tables["Which teachers pull apart"] if row[0] == "ce and audio")
    assert row[1] == f"{sum(cosines) / len(cosines):+.3f}"
    assert "random weights in backbone" in page.words
    assert [name for name, _ in page.tags].count("img") == 2  # the losses and the gradients


def test_two_runs_show_what_differs(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "second"))
    spec = other / "spec.yaml"
    spec.write_text(spec.read_text().replace("rank: 4", "rank: 2"))
    page = Page(report([run, other], tmp_path / "both.html"))
    assert page.tables["What differs in the specs"] == [
        ["key", "first", "second"],
        ["backbone.lora.rank", "4", "2"],
    ]
    assert [row[0] for row in page.tables["Runs"][1:]] == ["first", "second"]
    spec.write_text((run / "spec.yaml").read_text())
    assert "Nothing." in Page(report([run, other], tmp_path / "both.html")).words


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "elsewhere" / "first"))
    page = Page(report([run, other], tmp_path / "both.html"))
    assert [row[0] for row in page.tables["Runs"][1:]] == [f"{tmp_path.name}/first", "elsewhere/first"]
    with pytest.raises(RunError, match="a run is given twice"):
        report([run, tmp_path / "elsewhere/../first"], tmp_path / "both.html")


def test_the_page_loads_and_runs_nothing(run: Path) -> None:
    source = report([run], run / "report.html").read_text()
    assert EVIL not in source
    page = Page(run / "report.html")
    assert [name for name, _ in page.tags].count("script") == 1  # the page's own
    for _, attributes in page.tags:
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:")
    assert EVIL in page.tables["Evaluations"][2]


def test_what_is_damaged_is_told_and_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("{broken\n[1]\n" + json.dumps({"step": 7, "loss": None}) + '\n{"step": 8, "lo')
    (run / "eval/heldout/results.json").write_text("{")
    (run / "latency").mkdir()
    (run / "latency/latency.png").write_bytes(b"\x89PNG")
    told = read_run(run, "first")
    assert told.steps == 7
    assert told.evaluations == {}
    assert any(re.match(r"metrics\.jsonl: 2 lines cannot be read", note) for note in told.notes)
    assert any(note.startswith("heldout/results.json cannot be read") for note in told.notes)
    page = Page(report([run], run / "report.html"))
    assert "metrics.jsonl: 2 lines cannot be read" in page.words
    assert "None yet: coatkit eval" in page.words


def test_a_link_that_leads_out_of_the_run_is_not_shown(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("a secret of this machine")
    (tmp_path / "mine.png").write_bytes(b"\x89PNG of mine")
    for folder in ("latency", "view/a", "view/b"):
        (run / folder).mkdir(parents=True)
    (run / "latency/latency.png").symlink_to(tmp_path / "mine.png")
    (run / "view/a/view.png").write_bytes(b"\x89PNG of theirs")
    (run / "view/a/view.md").symlink_to(tmp_path / "mine.md")
    (run / "view/b/view.png").symlink_to("../a/view.png")
    told = read_run(run, "first")
    assert [(name, picture) for name, picture, _ in told.pictures] == [("view/b/view", b"\x89PNG of theirs")]
    assert [note for note in told.notes if "leads out of the run" in note] == [
        "latency/latency.png: a link leads out of the run; it is not shown",
        "view/a/view.png: a link leads out of the run; it is not shown",
    ]
    assert "secret" not in report([run], run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_has_not_begun(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "gradients.jsonl").unlink()
    assert "No step has been taken yet." in Page(report([run], run / "report.html")).words


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        report([tmp_path], tmp_path / "report.html")


def test_a_place_that_cannot_be_written(run: Path) -> None:
    with pytest.raises(RunError, match=r"spec\.yaml/report\.html: cannot be written"):
        report([run], run / "spec.yaml" / "report.html")
