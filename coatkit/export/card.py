"""The model card of an exported run: Markdown with the metadata a model hub reads."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

import yaml

from coatkit.files import from_json, read_text
from coatkit.infer import AudioThinker

_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "CC-BY-4.0": "cc-by-4.0", "BSD-3-Clause": "bsd-3-clause"}
"""SPDX identifiers by the names the hub uses; any other is `other`, with its name."""
_THINKING = """\
It thinks about a sound before it answers: between the question and the answer stands a block of
`{start}`, one `{think}` for {rate}, and `{end}`. The block is read in one prefill and costs no decoding. See
*Continuous Audio Thinking* (arXiv 2606.18273)."""
_NOTE = """\
Without `audio_think_len` the template writes one thinking token, for a server to expand: in plain transformers always
give it. A sound that is longer than the model hears is cut by the processor without a word.
"""
_TEMPLATE = """\
---
{metadata}---

# {name}

{warning}{what}

{thinking} Trained with coatkit {version}.

## How to ask it

```python
{snippet}```

{note}Answers are greedy; the block's tokens and the placeholder (`suppress_tokens`) are never to be generated.

## How it was trained

{training}

<details><summary>The whole spec</summary>

```yaml
{spec}```

</details>

## Data

{data}

## Results

{results}

## Licences

{licences}

Other files: `coatkit.json` (the block's settings), `coatkit/heads.safetensors` (the heads that were distilled from the
experts; for analysis, not needed to answer).
"""


def card(model: AudioThinker, facts: dict[str, Any]) -> str:
    """README.md of an export.

    Args:
        facts: What `coatkit.export.write.describe` gives.
    """
    assert model.run is not None
    spec, record = model.run.read_spec(), model.run.read_record()
    block = facts["thinking"]
    per_token = None if block is None else float(block["tokens_per_audio_token"])
    rate = "each audio token" if per_token == 1 else f"every {1 / (per_token or 1):g} audio tokens"
    random = facts["random_weights"]
    warning = (
        f"**Random weights in {', '.join(random)}: this model knows nothing; it is a test.**\n\n" if random else ""
    )
    kind = "A whole model" if facts["merged"] else "A PEFT adapter (LoRA and the three token rows)"
    return _TEMPLATE.format(
        metadata=_metadata(facts, record),
        name=facts["name"] or "A coatkit run",
        warning=warning,
        what=f"{kind}, after {facts['step']} steps of coatkit's backbone `{without_paths(facts['backbone'])}`"
        f" (`{without_paths(facts['base_model'])}`).",
        thinking=_THINKING.format(rate=rate, **block) if block else "It was trained without a thinking block.",
        note=_NOTE if block else "",
        version=facts["coatkit"],
        snippet=snippet(facts),
        training=_training(spec, facts),
        spec=yaml.safe_dump(
            without_paths({k: v for k, v in spec.items() if k != "output"}), sort_keys=False, allow_unicode=True
        ),
        data=_data(record),
        results=_results(model.run.path),
        licences=_licences(record),
    )


def snippet(facts: dict[str, Any]) -> str:
    """Python that asks the exported model with plain transformers; its first lines name what is to be asked."""
    block, audio = facts["thinking"], facts["audio"]
    ratio = block["tokens_per_audio_token"] if block else 1
    positions = "heard" if ratio == 1 else f"max(1, round(heard * {ratio:g}))"
    if facts["merged"]:
        load = f"model = {facts['model_class']}.from_pretrained(folder).eval()\n"
        more = ""
    else:
        load = (
            f"model = {facts['model_class']}.from_pretrained({facts['base_model']!r})\n"
            "if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:\n"
            "    model.resize_token_embeddings(len(processor.tokenizer))\n"
            "model = PeftModel.from_pretrained(model, folder).eval()\n"
        )
        more = f", suppress_tokens={facts['suppress_tokens']}"
    length = (
        "heard = int((ask()['input_ids'] == processor.audio_token_id).sum())  # audio tokens, 25 a second\n"
        f"inputs = ask(audio_think_len={positions})\n"
        if block
        else "inputs = ask()\n"
    )
    peft = "" if facts["merged"] else "from peft import PeftModel\n"
    return (
        f"import soundfile\n{peft}from transformers import AutoProcessor, {facts['model_class']}\n\n"
        'folder, sound = ".", "sound.wav"\nquestion = "What is heard?"\n'
        f"processor = AutoProcessor.from_pretrained(folder)\n{load}"
        f"samples, rate = soundfile.read(sound, dtype='float32')  # mono, {audio['sample_rate']} Hz\n\n\n"
        "def ask(**block):\n"
        '    parts = [{"type": "audio"}, {"type": "text", "text": question}]\n'
        '    text = processor.apply_chat_template([{"role": "user", "content": parts}],'
        " add_generation_prompt=True, **block)\n"
        "    found = processor(text=[text], audio=[samples], sampling_rate=rate, return_tensors='pt')\n"
        "    return found.to(model.device, model.dtype)\n\n\n"
        f"{length}"
        f"ids = model.generate(**inputs, do_sample=False, max_new_tokens=64{more})\n"
        "answer = ids[0, inputs['input_ids'].shape[1] :]\n"
        "print(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())\n"
    )


def _metadata(facts: dict[str, Any], record: dict[str, Any]) -> str:
    licence = record["components"]["backbone"].get("weights_licence", "unknown")
    fields: dict[str, Any] = {
        "library_name": "transformers" if facts["merged"] else "peft",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["audio", "coatkit", "continuous-audio-thinking"],
        "license": _LICENCES.get(licence, "other"),
    }
    if fields["license"] == "other":
        fields["license_name"] = licence
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", facts["base_model"]) and not Path(facts["base_model"]).exists():
        fields["base_model"] = facts["base_model"]
    return yaml.safe_dump(fields, sort_keys=False)


def _training(spec: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = ["| stage | steps | experts and their weights |", "|---|---|---|"]
    for stage in spec.get("stages", []):
        weights = ", ".join(f"{k} {v:g}" for k, v in (stage.get("weights") or {}).items()) or "none"
        lines.append(f"| {stage['name']} | {stage['steps']} | {weights} |")
    experts = ", ".join(facts["heads"]) or "none"
    return "\n".join([f"Experts: {experts}. Cross-entropy on the answers in every stage.\n", *lines])


def _data(record: dict[str, Any]) -> str:
    lines = ["| file | rows | hours of sound |", "|---|---|---|"]
    for path, about in record["data"].items():
        rows = about["rows"] - about.get("bad_rows", 0) - about.get("left_out", 0)
        lines.append(f"| `{PurePath(path).name}` | {rows} | {about['hours']:.2f} |")
    return "\n".join(lines)


def _results(run: Path) -> str:
    lines = ["| evaluation | task | metric | score | 95 % interval | rows |", "|---|---|---|---|---|---|"]
    for file in sorted(run.glob("eval/*/results.json")):
        try:
            tasks = from_json(read_text(file))["tasks"]
            for name, task in tasks.items():
                low, high = task["low"], task["high"]
                interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
                lines.append(
                    f"| {file.parent.name} | {name} | {task['metric']} | {task['score']:.3f} | {interval} |"
                    f" {task['rows']} |"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            lines.append(f"| {file.parent.name} | cannot be read | | | | |")
    return "\n".join(lines) if len(lines) > 2 else "None were made (`coatkit eval`)."


def _licences(record: dict[str, Any]) -> str:
    lines = ["| part | package | licence of its weights |", "|---|---|---|"]
    for place, about in record["components"].items():
        if not place.startswith("heads."):
            package = f"{without_paths(about['from'])} {about['version']}".strip()
            lines.append(f"| {place} `{about['use']}` | {package} | {about.get('weights_licence', 'unknown')} |")
    return "\n".join(lines)


def without_paths(value: Any) -> Any:
    """A value with file names in place of absolute paths in it: where somebody keeps files is not for others."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value
