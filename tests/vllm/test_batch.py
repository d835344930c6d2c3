"""examples/batch/batch.py: every row answered, or told why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "COATKIT_VLLM_WORK" not in os.environ:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)
FOLDER = Path(os.environ["COATKIT_VLLM_WORK"]) / "mini"
SCRIPT = Path(__file__).parents[2] / "examples/batch/batch.py"


def test_every_row_has_an_answer_or_an_error(tmp_path: Path) -> None:
    cases = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())["cases"]}
    lines = (FOLDER / "train.jsonl").read_text().splitlines()
    rows = [{"id": f"r{i}", **json.loads(line)} for i, line in enumerate(lines)]
    rows.insert(2, {"id": "gone", "messages": rows[0]["messages"], "audio": "none.wav"})
    rows.append({"id": "text", "messages": [{"role": "user", "content": "What is 1 plus 2?"}]})
    manifest = FOLDER / "batch.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dtype": "float32", "max_model_len": 4096, "enforce_eager": True, "max_num_seqs": 4}
    command = [sys.executable, str(SCRIPT), str(FOLDER / "model"), str(manifest), str(tmp_path / "out.jsonl")]
    command += ["--max-new-tokens", "24", "--options", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["id"] for one in found] == ["r0", "r1", "gone", "r2", "r3", "text"]
    assert "none.wav" in found[2]["error"]
    assert all(one["answer"] for one in found if one["id"] != "gone")
    assert len(cases["1.3 s"]["answer"]) > 1
    assert found[1]["answer"] == "it is number 1"
