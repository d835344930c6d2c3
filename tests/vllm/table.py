"""Write what `make test-vllm` found into docs/serving.md.

python tests/vllm/table.py WORK PAGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- vllm: written by `make test-vllm` -->", "<!-- end of vllm -->"


def table(work: Path) -> str:
    found = [json.loads(path.read_text()) for path in sorted(work.glob("*.result.json"))]
    lines = [
        "| backbone | engine | cases | prompt tokens | same ids | same answers | log-probabilities apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda o: (o["use"], o["way"])):
        rows = one["lines"]
        prompts = [row["prompt"] for row in rows]
        furthest = max(row["d"] for row in rows)
        names = ", ".join(row["case"] for row in rows)
        lines.append(
            f"| {one['use']} | {one['way']} | {names} | {min(prompts)} to {max(prompts)} | {len(rows)} of {len(rows)} |"
            f" {len(rows)} of {len(rows)} | {furthest:.0e} |"
        )
    versions = found[0]
    lines += ["", f"vLLM {versions['vllm']} on a CPU against transformers {versions['transformers']}, float32."]
    return "\n".join(lines)


def main(work: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table(work)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
