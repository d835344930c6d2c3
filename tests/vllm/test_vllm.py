"""Exported runs in vLLM give the ids, answers and log-probabilities that coatkit's backbone gives with transformers.

`make test-vllm` runs this in vLLM's own environment, after tests/vllm/make.py has written the models and the right
answers into COATKIT_VLLM_WORK.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
LLM, SamplingParams = vllm.LLM, vllm.SamplingParams

WORK = Path(os.environ["COATKIT_VLLM_WORK"])
BACKBONES = {"mini": 1, "audio-flamingo-3": 1, "qwen2-audio": 3, "qwen2.5-omni": 3}
WAYS = {
    "prefix caching": {"enable_prefix_caching": True, "max_num_batched_tokens": 4096},
    "chunked prefill": {"enable_prefix_caching": False, "max_num_batched_tokens": 256, "enable_chunked_prefill": True},
}
"""In the second way prompts of over 256 tokens are read in pieces."""
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3)
TOLERANCE = 1e-4


class Served:
    """A backbone's exported run in an engine.

    Attributes:
        cases: What was asked of transformers, and what it answered.
    """

    def __init__(self, use: str, way: str) -> None:
        self.use, self.way, self.folder = use, way, WORK / use
        about = json.loads((self.folder / "cases.json").read_text())
        self.cases, self.versions = about["cases"], {k: about[k] for k in ("transformers", "torch")}
        self.llm = LLM(
            str(self.folder / "model"),
            dtype="float32",
            max_model_len=4096,
            enforce_eager=True,
            limit_mm_per_prompt={"audio": BACKBONES[use]},
            max_num_seqs=4,
            **WAYS[way],
        )
        self.tokenizer: Any = self.llm.get_tokenizer()

    def request(self, case: dict[str, Any], **template: Any) -> dict[str, Any]:
        text = self.tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=True, **template
        )
        sounds = [soundfile.read(self.folder / name, dtype="float32") for name in case["sounds"]]
        return {"prompt": text, **({"multi_modal_data": {"audio": sounds}} if sounds else {})}

    def ask(self, requests: list[dict[str, Any]], settings: Any = GREEDY) -> list[Any]:
        return self.llm.generate(requests, settings, use_tqdm=False)


@pytest.fixture(scope="module", params=[(use, way) for use in BACKBONES for way in WAYS], ids=", ".join)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    made = Served(*request.param)
    yield made
    made.llm.llm_engine.engine_core.shutdown()


def test_ids_answers_and_log_probabilities_are_those_of_transformers(served: Served) -> None:
    lines = []
    for case in served.cases:
        (out,) = served.ask([served.request(case)])
        assert list(out.prompt_token_ids) == case["prompt"], case["name"]
        assert list(out.outputs[0].token_ids) == case["answer"], case["name"]
        found = {str(token): one.logprob for token, one in out.outputs[0].logprobs[0].items()}
        furthest = max(abs(found[token] - value) for token, value in case["first"].items())
        assert furthest < TOLERANCE, case["name"]
        lines.append(
            {"case": case["name"], "prompt": len(case["prompt"]), "answer": len(case["answer"]), "d": furthest}
        )
    result = {"use": served.use, "way": served.way, "lines": lines, "vllm": vllm.__version__, **served.versions}
    (WORK / f"{served.use} {served.way}.result.json").write_text(json.dumps(result))


def test_at_once_is_as_one_by_one_and_again_is_as_before(served: Served) -> None:
    for _ in range(2):
        done = served.ask([served.request(case) for case in served.cases])
        for case, out in zip(served.cases, done, strict=True):
            assert list(out.prompt_token_ids) == case["prompt"], case["name"]
            assert list(out.outputs[0].token_ids) == case["answer"], case["name"]


def test_a_length_that_the_client_gives_changes_nothing(served: Served) -> None:
    for case in served.cases:
        if case["blocks"]:
            length = case["blocks"] if len(case["blocks"]) > 1 else case["blocks"][0]
            (out,) = served.ask([served.request(case, audio_think_len=length)])
            assert list(out.prompt_token_ids) == case["prompt"], case["name"]
            assert list(out.outputs[0].token_ids) == case["answer"], case["name"]


def test_what_is_wrong_is_refused_and_the_engine_lives(served: Served) -> None:
    case = served.cases[1]
    good = served.request(case)
    block = "<|audio_think_start|><|audio_think|><|audio_think_end|>"
    assert block in good["prompt"]
    wrong = {
        "a sound and no thinking block after it": {**good, "prompt": good["prompt"].replace(block, "")},
        "audio_think_len is 3, and": served.request(case, audio_think_len=3),
    }
    if served.use != "audio-flamingo-3":  # whose 600 s are more tokens than this engine takes
        longest = {"mini": 150, "qwen2-audio": 30, "qwen2.5-omni": 300}[served.use]
        samples, rate = good["multi_modal_data"]["audio"][0]
        long = samples.repeat(1 + int(longest * rate / len(samples)))[: longest * rate + 800]
        wrong["is too long: this model hears up to"] = {**good, "multi_modal_data": {"audio": [(long, rate)]}}
    for said, request in wrong.items():
        with pytest.raises(Exception, match=said):
            served.ask([request])
    (out,) = served.ask([good])
    assert list(out.outputs[0].token_ids) == case["answer"]


def test_a_start_on_a_gpu_finds_what_to_measure_memory_with(served: Served) -> None:
    """What vLLM's worker for GPUs runs before it serves, with no limits given; its worker for CPUs does not."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    config = served.llm.llm_engine.vllm_config
    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    assert budget.get_modality_with_max_tokens() == "audio"
    made = budget.processor.get_dummy_mm_inputs({"audio": 1})
    ids, block = made["prompt_token_ids"], "<|audio_think|>"
    (place,) = made["mm_placeholders"]["audio"]
    assert ids.count(served.tokenizer.get_vocab()[block]) == place.get_num_embeds()
    assert budget.mm_max_toks_per_item["audio"] >= min(place.get_num_embeds(), 4096)


def test_an_image_is_refused(served: Served) -> None:
    if served.use != "qwen2.5-omni":
        pytest.skip("only Qwen2.5-Omni could see one")
    from PIL import Image
    from vllm.exceptions import VLLMValidationError  # answered with a 400

    image = Image.new("RGB", (64, 64))
    request = {"prompt": "<|vision_bos|><|IMAGE|><|vision_eos|>", "multi_modal_data": {"image": image}}
    with pytest.raises(VLLMValidationError, match="At most 0 image"):
        served.ask([request])


def test_thinking_tokens_are_never_generated(served: Served) -> None:
    ids = served.tokenizer.get_vocab()
    never = [ids[token] for token in ("<|audio_think_start|>", "<|audio_think|>", "<|audio_think_end|>")]
    # Greedy: this vLLM cannot draw with a seed on a CPU.
    pushed = SamplingParams(temperature=0, max_tokens=40, logit_bias=dict.fromkeys(never, 100.0), ignore_eos=True)
    for out in served.ask([served.request(case) for case in served.cases[:3]], pushed):
        assert not set(out.outputs[0].token_ids) & set(never)
