"""The adapter beside the stock thinker: the same numbers, positions no earlier call shifts, nothing misplaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from coatkit import DataError, Inputs
from coatkit.backbones.tiny import tiny_model
from coatkit.data.audio import Samples
from coatkit.testing.backbone_bench import a_row, calls, outputs
from coatkit.testing.sounds import tone
from coatkit_backbone_qwen2_5_omni.tiny import tiny_config, tiny_parts

RATE = 16_000
Load = Callable[..., Any]
Prepared = Callable[..., Inputs]


def sound(seconds: float, seed: int = 0) -> Samples:
    return tone(seconds, RATE, seed)


ROWS = [
    a_row("one", "<audio>Which animal is it?", "A dog."),
    a_row("text", "Capital of France?", "Paris."),
    a_row("two", "<audio>What?", "Rain.", "And <audio>?", "A bell."),
]
SOUNDS = [sound(0.4, 1), sound(3.337, 2), sound(0.07, 3)]


def test_loss_states_and_features_are_the_stock_models(prepared: Prepared, backbone: Any, stock: Any) -> None:
    """The stock model gets log-mel padded to 300 s, and has no hook; the block's rows start as its own new rows."""
    inputs = prepared(backbone, ROWS, SOUNDS)
    extractor = tiny_parts(torch.float32)[2]
    mel = extractor(SOUNDS, sampling_rate=RATE, padding="max_length", return_attention_mask=True, return_tensors="pt")
    assert mel["input_features"].shape == (3, 128, 30_000)
    assert inputs.tokens["input_features"].shape == (3, 128, 334)
    tokens = {
        **inputs.tokens,
        "input_features": mel["input_features"],
        "feature_attention_mask": mel["attention_mask"],
    }
    with torch.no_grad(), calls(stock.model.audio_tower.proj, lambda args, _: args[0]) as tower:
        ours = backbone.forward(inputs)
        theirs = stock(**tokens, labels=inputs.labels, output_hidden_states=True, use_cache=False)
        consumed = stock.model.audio_tower.proj(tower[0])
    torch.testing.assert_close(ours.ce_sum / ours.ce_count, theirs.loss, rtol=1e-5, atol=1e-5)
    states = theirs.hidden_states[-1][inputs.audio_row[:, None], inputs.think_index]
    torch.testing.assert_close(ours.thinking[inputs.think_mask], states[inputs.think_mask], rtol=0, atol=1e-5)
    inside = torch.arange(83) < ours.audio.lengths[:, None]
    assert ours.audio.lengths.tolist() == [10, 83, 2]
    # Padding never reaches the tower, so that leaving it out changes no bit.
    assert torch.equal(ours.audio.tower[inside], tower[0])
    assert torch.equal(ours.audio.consumed[inside], consumed)
    assert backbone.audio_dims == {"consumed": 64, "tower": 32}


def test_the_image_encoder_is_gone(backbone: Any, stock: Any) -> None:
    kept = {name for name, _ in stock.named_parameters() if not name.startswith("model.visual.")}
    assert len(kept) < len(list(stock.parameters()))
    ours = {name.replace(".base_layer", "") for name, _ in backbone.model.named_parameters()}
    assert {name for name in ours if "lora_" not in name and "thinking_rows" not in name} == kept


def test_adapters_are_on_the_language_model_only(backbone: Any) -> None:
    adapted = [n.removesuffix(".lora_A") for n, _ in backbone.model.named_modules() if n.endswith(".lora_A")]
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sorted(adapted) == sorted(f"model.language_model.layers.{i}.{name}" for i in (0, 1) for name in layers)


# A projector inside the tower


@pytest.mark.parametrize(
    ("train", "projector", "tower"),
    [
        ({}, False, False),
        ({"projector": "full"}, True, False),
        ({"tower": "full"}, False, True),
        ({"projector": "full", "tower": "full"}, True, True),
    ],
)
def test_tower_and_its_projector_learn_apart(
    prepared: Prepared, load: Load, train: dict[str, str], projector: bool, tower: bool
) -> None:
    backbone = load(train=train)
    names = {id(p): name for name, p in backbone.model.named_parameters()}
    parts = {part: {names[id(p)] for p in found} for part, found in backbone.parts().items()}
    proj = {"model.audio_tower.proj.weight", "model.audio_tower.proj.bias"}
    # No pass uses the two rows of this embedding.
    unused = {"model.audio_tower.audio_bos_eos_token.weight"}
    rest = {n for n in names.values() if n.startswith("model.audio_tower.")} - proj - unused
    assert parts.get("projector", set()) == (proj if projector else set())
    assert parts.get("tower", set()) == (rest if tower else set())
    out = backbone.forward(prepared(backbone, ROWS, SOUNDS))
    assert not out.audio.tower.requires_grad
    assert not out.audio.consumed.requires_grad
    out.ce_sum.backward()
    moved = {
        n for n, p in backbone.model.named_parameters() if n.startswith("model.audio_tower.") and p.grad is not None
    }
    assert moved == (proj if projector else set()) | (rest if tower else set())
    backbone.model.train()
    assert backbone.tower.training == tower


# Positions


def positions_of(backbone: Any, run: Callable[[], object]) -> list[torch.Tensor]:
    """Position ids that each pass through the decoder gets, [3, B, T]: what `generate` puts before them is left out."""
    with calls(backbone.language_model, lambda _, kwargs: kwargs["position_ids"].clone()) as seen:
        run()
    return [ids[-3:] for ids in seen]


def test_positions_count_through_sound_block_and_answer(prepared: Prepared, backbone: Any) -> None:
    """One by one in all three directions, from each row's first token; the same in one pass and when generating."""
    train, asked = (prepared(backbone, ROWS, SOUNDS, train=train) for train in (True, False))
    with torch.no_grad():
        (whole,) = positions_of(backbone, lambda: backbone.forward(train))
        steps = positions_of(backbone, lambda: backbone.generate(asked, max_new_tokens=4, min_new_tokens=4))
    for i in range(len(ROWS)):
        count = int(train.tokens["attention_mask"][i].sum())
        assert torch.equal(whole[:, i, :count], torch.arange(count).expand(3, -1))
        prompt = int(asked.tokens["attention_mask"][i].sum())
        assert torch.equal(steps[0][:, i, -prompt:], torch.arange(prompt).expand(3, -1))
        for k, step in enumerate(steps[1:]):
            assert step[:, i].flatten().tolist() == [prompt + k] * 3
    assert len(steps) == 4


def test_no_call_shifts_the_positions_of_the_next(prepared: Prepared, backbone: Any, load: Load) -> None:
    """The model keeps `rope_deltas` of its last call, here made wrong, for another number of rows too."""
    inputs = prepared(backbone, ROWS, SOUNDS)
    batches = [(ROWS, SOUNDS), (ROWS[:1], SOUNDS[:1]), (ROWS[1:2], []), (ROWS[1:], SOUNDS[1:])]
    asked = [prepared(backbone, rows, sounds, train=False) for rows, sounds in batches]

    def states(found: Any, which: int) -> list[torch.Tensor]:
        """What the decoder gives in each step of an answer."""
        with outputs(found.language_model) as seen:
            found.generate(asked[which], max_new_tokens=5, min_new_tokens=5)
        return list(seen)

    def loss(found: Any) -> float:
        with torch.no_grad():
            return float(found.forward(inputs).ce_sum)

    def fresh() -> Any:
        found = load()
        found.model.eval()
        return found

    wanted, expected = [states(fresh(), which) for which in range(len(batches))], loss(fresh())
    for deltas in (None, torch.full((3, 1), 100), torch.full((1, 1), 7)):
        backbone.stock.model.rope_deltas = deltas
        assert loss(backbone) == expected
        backbone.stock.model.rope_deltas = deltas
        for which, steps in enumerate(wanted):
            found = states(backbone, which)
            assert len(found) == len(steps) == 5
            assert all(torch.equal(one, other) for one, other in zip(found, steps, strict=True))
            assert loss(backbone) == expected


# Placeholders


def misplaced(inputs: Inputs, audio: int, how: str) -> Inputs:
    """Inputs whose placeholders do not fit their sounds."""
    ids, first = inputs.tokens["input_ids"], int(inputs.audio_index[0, 0])
    if how in ("fewer", "moved"):
        ids[0, first] = ids[0, first - 2]
    if how in ("more", "moved"):
        ids[1, -4] = audio
    if how == "shorter mel":
        inputs.tokens["feature_attention_mask"][0, -40:] = 0
        inputs.tokens["feature_attention_mask"][1, 10:] = 0
    if how == "no mel":
        del inputs.tokens["input_features"], inputs.tokens["feature_attention_mask"]
    return inputs


@pytest.mark.parametrize("how", ["fewer", "moved"])
def test_the_stock_model_misplaces_features_without_a_word(
    prepared: Prepared, backbone: Any, stock: Any, how: str
) -> None:
    """The trap: the second sound's placeholders get features of the first."""
    inputs = prepared(backbone, ROWS, SOUNDS)
    plain = {k: v.clone() for k, v in inputs.tokens.items()}
    spoilt = misplaced(inputs, backbone.preparer.audio_token, how).tokens
    with torch.no_grad(), calls(stock.model.language_model, lambda _, kwargs: kwargs["inputs_embeds"]) as seen:
        stock(**plain, use_cache=False)
        stock(**spoilt, use_cache=False)
    first = int(inputs.audio_index[0, 0])
    # The first feature was that of the first placeholder, and now stands at the second.
    assert torch.equal(seen[1][0, first + 1], seen[0][0, first])
    assert not torch.equal(seen[1][0, first + 1], seen[0][0, first + 1])


@pytest.mark.parametrize("run", ["forward", "generate"])
@pytest.mark.parametrize("how", ["fewer", "more", "moved", "shorter mel", "no mel"])
def test_misplaced_features_are_refused(prepared: Prepared, backbone: Any, run: str, how: str) -> None:
    inputs = misplaced(prepared(backbone, ROWS, SOUNDS, train=run == "forward"), backbone.preparer.audio_token, how)
    with (
        calls(backbone.tower, lambda *_: 1) as towers,
        pytest.raises(DataError, match=r"rows one, text, two: .*for sounds of \[10, 83, 2\] in rows \[0, 2, 2\]"),
    ):
        getattr(backbone, run)(inputs)
    assert not towers


# Embeddings and cost


def test_embeddings_are_tied_where_the_thinkers_own_setting_says_so() -> None:
    """Not where that of its language model does, whose default is to tie."""
    for own, text in ((False, False), (False, True), (True, True)):
        config = tiny_config()
        config.tie_word_embeddings, config.text_config.tie_word_embeddings = own, text
        model = tiny_model(Qwen2_5OmniThinkerForConditionalGeneration, config)
        ends = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (ends[0].data_ptr() == ends[1].data_ptr()) == own


@pytest.mark.parametrize("seconds", [2.0, 10.0, 34.0])
def test_operations_of_the_tower_are_counted(prepared: Prepared, backbone: Any, seconds: float) -> None:
    """In whole blocks: the convolutions pad the last one."""
    inputs = prepared(backbone, [a_row("a", "<audio>?", "!")], [sound(seconds)])
    mel, mask = inputs.tokens["input_features"], inputs.tokens["feature_attention_mask"]
    # Attention in the way that the counter can see.
    with torch.no_grad(), FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        backbone.stock.get_audio_features(mel, mask)
    assert backbone.tower_flops(seconds) == pytest.approx(counted.get_total_flops(), rel=0.02)
