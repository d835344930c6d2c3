"""Answer every row of a manifest with vLLM's own engine, in this process or spread by Ray Data.

    python batch.py MODEL rows.jsonl answers.jsonl                     # one engine, all rows at once
    python batch.py MODEL rows.jsonl answers.jsonl --ray --workers 4   # Ray Data: as many engines

MODEL is what `coatkit export RUN --to MODEL --merge` wrote; vLLM and coatkit-serve-vllm are installed, coatkit need
not be. A row of rows.jsonl is a coatkit row: `messages`, whose last one from the assistant is left out, with an
`<audio>` tag for each sound, and `audio`, a path or a list of paths beside the manifest. A line of answers.jsonl is the
row's `id` and the `answer`, or the `error` of a row that cannot be asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile


def rows_of(manifest: Path) -> Iterator[dict[str, Any]]:
    """Rows with an id, a conversation in parts and the paths of its sounds."""
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        messages = row["messages"]
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        named = row.get("audio") or []
        yield {
            "id": row.get("id", f"line {number}"),
            "messages": [{"role": m["role"], "content": in_parts(m["content"])} for m in messages],
            "sounds": [str(manifest.parent / name) for name in ([named] if isinstance(named, str) else named)],
        }


def in_parts(text: str) -> list[dict[str, str]]:
    first, *rest = text.split("<audio>")
    parts = [{"type": "text", "text": first}]
    for after in rest:
        parts += [{"type": "audio"}, {"type": "text", "text": after}]
    return [part for part in parts if part.get("text") != ""]


class Engine:
    """One vLLM engine, to be called with a batch of rows.

    Args:
        options: Of `vllm.LLM`.
    """

    def __init__(self, model: str, max_new_tokens: int, **options: Any) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(model, **options)
        self.template: Any = self.llm.get_tokenizer().apply_chat_template
        self.settings = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def answer(self, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
        """An answer or an error for each row, in their order; vLLM batches them as it sees fit."""
        asked, found = [], {}
        for row in rows:
            try:
                sounds = [mono(path) for path in row["sounds"]]
                text = self.template(row["messages"], tokenize=False, add_generation_prompt=True)
                asked.append((row["id"], {"prompt": text, "multi_modal_data": {"audio": sounds}} if sounds else text))
            except (OSError, soundfile.LibsndfileError) as error:
                found[row["id"]] = {"id": row["id"], "error": str(error)}
        for name, answer in zip([name for name, _ in asked], self._generated([p for _, p in asked]), strict=True):
            found[name] = {"id": name, **answer}
        return [found[row["id"]] for row in rows]

    def _generated(self, prompts: list[Any]) -> list[dict[str, str]]:
        """Answers; one by one where vLLM refuses a prompt, e.g. a sound that is too long: it refuses all with it."""
        try:
            outs = self.llm.generate(prompts, self.settings) if prompts else []
            return [{"answer": out.outputs[0].text.strip()} for out in outs]
        except ValueError as error:
            if len(prompts) == 1:
                return [{"error": str(error)}]
            return [one for prompt in prompts for one in self._generated([prompt])]

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """For Ray Data's `map_batches`: rows and answers as columns of JSON."""
        return {"line": [json.dumps(one) for one in self.answer([json.loads(row) for row in batch["row"]])]}


def mono(path: str) -> tuple[Any, int]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return samples.mean(1), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--options", type=json.loads, default={}, help='of vllm.LLM, e.g. {"dtype": "bfloat16"}')
    parser.add_argument("--ray", action="store_true", help="spread over Ray's workers")
    parser.add_argument("--workers", type=int, default=1, help="with --ray: engines")
    parser.add_argument("--gpus", type=float, default=0, help="with --ray: of each engine")
    given = parser.parse_args()
    rows = list(rows_of(given.manifest))
    if not given.ray:
        answers = Engine(given.model, given.max_new_tokens, **given.options).answer(rows)
        lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    else:
        import ray

        done = ray.data.from_items([{"row": json.dumps(row)} for row in rows]).map_batches(
            Engine,
            fn_constructor_args=(given.model, given.max_new_tokens),
            fn_constructor_kwargs=given.options,
            batch_size=64,
            concurrency=given.workers,
            num_gpus=given.gpus,
        )
        lines = [row["line"] for row in done.take_all()]
    given.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} rows: {given.out}")


if __name__ == "__main__":
    main()
