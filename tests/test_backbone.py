"""The transformers adapter on the tiny mini backbone, beside the stock model without any of our hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coatkit_backbone_mini.loading import load_model
from coatkit_backbone_mini.tiny import tiny_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coatkit import AudioBatch, DataError, HFBackbone, Inputs, load_backbone
from coatkit.backbones.whisper import valid_frames, windowed_features
from coatkit.data.rows import Row
from coatkit.errors import PluginError
from coatkit.thinking import IGNORE

RATE = 16_000
MakeRow = Callable[..., Row]
MakeSound = Callable[..., np.ndarray]
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its layers made louder, for at a random start every prompt has the same answer."""
    path = tiny_folder(tmp_path_factory.mktemp("stock") / "tiny")
    weights = load_file(path / "model.safetensors")
    louder = {n: 5 * w for n, w in weights.items() if ".layers." in n and n.endswith("proj.weight")}
    save_file(weights | louder, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    def make(**options: Any) -> Any:
        backbone = load_backbone("mini", weights=str(folder), device="cpu", **options)
        assert isinstance(backbone, HFBackbone)
        return backbone

    return make


@pytest.fixture
def backbone(load: Load) -> Any:
    return load()


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    """transformers' own model with the same weights."""
    return load_model(folder, torch.float32)


@pytest.fixture
def rows(row: MakeRow) -> list[Row]:
    """A row with one sound, one of text alone, and one with two sounds in two turns."""
    return [
        row("<audio>Which animal is it?", "A dog.", sounds=1, name="one"),
        row("Capital of France?", "Paris.", name="text"),
        row("<audio>What?", "Rain.", "And <audio>?", "A bell.", sounds=2, name="two"),
    ]


@pytest.fixture
def audio(sound: MakeSound) -> AudioBatch:
    return AudioBatch.from_arrays([sound(0.4, 1), sound(0.15, 2), sound(0.9, 3)], RATE)


def losses(backbone: Any, inputs: Inputs) -> Tensor:
    """A loss everything that can learn has a part in."""
    out = backbone.forward(inputs)
    return out.ce_sum / out.ce_count + (out.thinking[inputs.think_mask] ** 2).mean()


def stir(backbone: Any) -> None:
    """Give the adapters an effect: they start at zero."""
    torch.manual_seed(5)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


class Calls:
    """Arguments of a module's calls, while it is watched."""

    def __init__(self, module: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.seen: list[Any] = []
        self.handle = module.register_forward_pre_hook(
            lambda module, args, kwargs: self.seen.append(look(args, kwargs)), with_kwargs=True
        )


# The audio front end


@pytest.mark.parametrize("seconds", [0.05, 0.333, 3.337, 29.995, 31.0])
def test_short_windows_give_what_full_ones_give(backbone: Any, stock: Any, sound: MakeSound, seconds: float) -> None:
    batch = AudioBatch.from_arrays([sound(seconds), sound(0.5)], RATE)
    mel, counts = windowed_features(backbone.preparer.extractor, batch)
    short, mask = mel["input_features"], mel["input_features_mask"]
    assert short.shape[-1] <= 3000
    # Past its end a stock window holds the log-mel of silence, which is the smallest value of the window.
    silence = short.amin((1, 2), keepdim=True).expand(-1, 80, 3000 - short.shape[-1])
    full, full_mask = torch.cat([short, silence], -1), nn.functional.pad(mask, (0, 3000 - mask.shape[-1]))
    with torch.no_grad():
        ours = backbone.tower(short, input_features_mask=mask).last_hidden_state
        theirs = stock.model.audio_tower(full, input_features_mask=full_mask).last_hidden_state
    expected = valid_frames(theirs, full_mask)
    assert expected.shape[0] == sum(counts)
    torch.testing.assert_close(valid_frames(ours, mask), expected, rtol=0, atol=1e-4)


def test_positions_are_whole_again_after_an_exception(backbone: Any, stock: Any) -> None:
    with pytest.raises(RuntimeError):
        backbone.tower(torch.zeros(1, 3, 100), input_features_mask=torch.ones(1, 100))
    ours, theirs = backbone.tower.embed_positions.weight, stock.model.audio_tower.embed_positions.weight
    assert torch.equal(ours, theirs)
    assert ours.shape == (1500, 32)


def test_audio_features_are_the_stock_models(backbone: Any, stock: Any, rows: list[Row], audio: AudioBatch) -> None:
    inputs = backbone.preparer.prepare(rows, audio, train=True)
    heard = backbone.forward(inputs).audio
    with torch.no_grad():
        short = inputs.tokens["input_features"]
        mel = torch.cat([short, short.amin((1, 2), keepdim=True).expand(-1, 80, 3000 - short.shape[-1])], -1)
        mask = nn.functional.pad(inputs.tokens["input_features_mask"], (0, 3000 - short.shape[-1]))
        expected = stock.get_audio_features(mel, mask)
    assert heard.lengths.tolist() == [10, 4, 22]
    assert heard.frame_rate == 25.0
    inside = torch.arange(22) < heard.lengths[:, None]
    torch.testing.assert_close(heard.consumed[inside], expected.pooler_output, rtol=0, atol=1e-4)
    torch.testing.assert_close(heard.tower[inside], valid_frames(expected.last_hidden_state, mask), rtol=0, atol=1e-4)
    assert (heard.consumed[~inside] == 0).all()
    assert (heard.tower[~inside] == 0).all()
    assert not heard.consumed.requires_grad
    assert (heard.consumed.shape[-1], heard.tower.shape[-1]) == (64, 32)
    assert backbone.audio_dims == {"consumed": 64, "tower": 32}


# The language model


def test_hidden_states_and_loss_are_the_stock_models(
    backbone: Any, stock: Any, rows: list[Row], audio: AudioBatch
) -> None:
    """The block's rows start as the mean embedding, which is what the stock model's own new rows are."""
    inputs = backbone.preparer.prepare(rows, audio, train=True)
    out = backbone.forward(inputs)
    with torch.no_grad():
        expected = stock_forward(stock, inputs, labels=inputs.labels, output_hidden_states=True)
    assert out.ce_count == int((inputs.labels[:, 1:] != IGNORE).sum())
    torch.testing.assert_close(out.ce_sum / out.ce_count, expected.loss, rtol=1e-5, atol=1e-5)
    states = expected.hidden_states[-1][inputs.audio_row[:, None], inputs.think_index]
    torch.testing.assert_close(out.thinking[inputs.think_mask], states[inputs.think_mask], rtol=0, atol=1e-5)


def test_without_a_block_the_loss_is_plain_fine_tuning(
    load: Load, stock: Any, rows: list[Row], audio: AudioBatch
) -> None:
    backbone = load(thinking="off")
    inputs = backbone.preparer.prepare(rows, audio, train=True)
    start = backbone.preparer.tokens.start
    assert not ((inputs.tokens["input_ids"] >= start) & (inputs.tokens["input_ids"] < start + 3)).any()
    out = backbone.forward(inputs)
    assert out.thinking is None
    assert "tokens" not in backbone.parts()
    with torch.no_grad():
        expected = stock_forward(stock, inputs, labels=inputs.labels)
    torch.testing.assert_close(out.ce_sum / out.ce_count, expected.loss, rtol=1e-5, atol=1e-5)


def stock_forward(stock: Any, inputs: Inputs, **options: Any) -> Any:
    """The stock model needs full windows."""
    tokens = dict(inputs.tokens)
    if "input_features" in tokens:
        short = tokens["input_features"]
        rest = 3000 - short.shape[-1]
        tokens["input_features"] = torch.cat([short, short.amin((1, 2), keepdim=True).expand(-1, 80, rest)], -1)
        tokens["input_features_mask"] = nn.functional.pad(tokens["input_features_mask"], (0, rest))
    return stock(**tokens, use_cache=False, **options)


def test_training_projects_answers_only(backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    inputs = backbone.preparer.prepare(rows, audio, train=True)
    calls = Calls(backbone.stock.lm_head, lambda args, _: args[0].shape[:-1].numel())
    out = backbone.forward(inputs)
    assert calls.seen == [0, out.ce_count]  # transformers' own call is narrowed to nothing
    assert inputs.tokens["input_ids"].numel() > 10 * sum(calls.seen)


def test_text_alone_has_neither_states_nor_audio(backbone: Any, rows: list[Row]) -> None:
    out = backbone.forward(backbone.preparer.prepare(rows[1:2], None, train=True))
    assert out.thinking is None
    assert out.audio is None
    assert out.ce_count == len("Paris.") + 1


def test_a_padded_batch_equals_its_rows(backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    stir(backbone)
    together = backbone.forward(backbone.preparer.prepare(rows, audio, train=True))
    alone, states, at = 0.0, [], 0
    for one in rows:
        mine = slice(at, at + len(one.audios))
        at = mine.stop
        own = AudioBatch(audio.samples[mine], audio.lengths[mine], RATE) if one.audios else None
        inputs = backbone.preparer.prepare([one], own, train=True)
        out = backbone.forward(inputs)
        alone += out.ce_sum.item()
        if out.thinking is not None:
            states += [s[m] for s, m in zip(out.thinking, inputs.think_mask, strict=True)]
    assert together.ce_sum.item() == pytest.approx(alone, rel=1e-5)
    for i, expected in enumerate(states):
        torch.testing.assert_close(together.thinking[i, : len(expected)], expected, rtol=1e-4, atol=1e-5)


# What learns


def test_adapters_are_on_the_language_model_only(backbone: Any) -> None:
    adapted = [n.removesuffix(".lora_A") for n, _ in backbone.model.named_modules() if n.endswith(".lora_A")]
    assert sorted(adapted) == sorted(f"model.language_model.layers.{i}.{name}" for i in (0, 1) for name in LINEARS)


def test_adapter_targets_can_be_chosen(load: Load) -> None:
    found = load(lora={"rank": 2, "targets": ["q_proj", "v_proj"]})
    adapted = {
        n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in found.model.named_parameters() if "lora_A" in n
    }
    assert adapted == {"q_proj", "v_proj"}
    ranks = {p.shape[0] for n, p in found.model.named_parameters() if "lora_A" in n}
    assert ranks == {2}


def test_adapter_targets_that_fit_nothing_are_refused(load: Load) -> None:
    with pytest.raises(PluginError, match=r"lora.targets \['query'\] fit no layer"):
        load(lora={"targets": ["query"]})


def step(backbone: Any, inputs: Inputs, count: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor before and after some optimizer steps."""
    before = {name: value.detach().clone() for name, value in backbone.model.state_dict().items()}
    backbone.model.train()
    learn = [p for parameters in backbone.parts().values() for p in parameters]
    optimizer = torch.optim.AdamW(learn, lr=1e-2, weight_decay=0.1)
    for _ in range(count):
        losses(backbone, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, dict(backbone.model.state_dict())


def test_of_the_embeddings_only_the_thinking_rows_learn(backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    before, after = step(backbone, backbone.preparer.prepare(rows, audio, train=True))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "lora_" not in name and "multi_modal_projector" not in name} == {
        "thinking_rows.rows"
    }
    assert all((before["thinking_rows.rows"] != after["thinking_rows.rows"]).any(-1))
    assert sum("lora_A" in name for name in changed) == sum("lora_B" in name for name in changed) == 14
    embedding = "model.language_model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])


EVERYTHING = {"lora", "tokens", "projector"}


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({}, EVERYTHING),
        ({"projector": "none"}, EVERYTHING - {"projector"}),
        ({"tokens": "none"}, EVERYTHING - {"tokens"}),
        ({"lm": "none"}, EVERYTHING - {"lora"}),
        ({"lm": "none", "tokens": "none", "projector": "none"}, set()),
        ({"lm": "full"}, {"lm", "tokens", "projector"}),
        ({"tower": "full"}, EVERYTHING | {"tower"}),
        ({"tokens": "all"}, EVERYTHING),
    ],
)
def test_train_chooses_what_learns(
    load: Load, train: dict[str, str], parts: set[str], rows: list[Row], audio: AudioBatch
) -> None:
    backbone = load(train=train)
    found = backbone.parts()
    assert set(found) == parts
    by_name = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert len(by_name) == sum(len(parameters) for parameters in found.values())
    assert any("embed_tokens" in name for name in by_name) == (train.get("tokens") == "all")
    assert any("lm_head" in name for name in by_name) == (train.get("lm") == "full")
    assert not any("embed_positions" in name for name in by_name)
    if "lm" in parts and train.get("lm") == "full":
        layers = {n for n, _ in backbone.model.named_parameters() if n.startswith("model.language_model.layers")}
        assert layers <= by_name
    if parts:
        before, after = step(backbone, backbone.preparer.prepare(rows, audio, train=True), 2)
        assert {name for name in before if not torch.equal(before[name], after[name])} <= by_name


def test_each_thinking_token_has_a_row_of_its_own(backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    backbone.thinking_rows.rows.data = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 64).clone()
    inputs = backbone.preparer.prepare(rows, audio, train=True)
    calls = Calls(backbone.language_model, lambda _, kwargs: kwargs["inputs_embeds"])
    losses(backbone, inputs).backward()
    assert all((backbone.thinking_rows.rows.grad != 0).any(-1))
    ids, (embeds,) = inputs.tokens["input_ids"], calls.seen
    for value, token in zip((1.0, 2.0, 3.0), backbone.preparer.tokens.ids, strict=True):
        assert (embeds[ids == token] == value).all()
    text = ~torch.isin(ids, torch.tensor([*backbone.preparer.tokens.ids, backbone.preparer.audio_token]))
    assert torch.equal(embeds[text], backbone.model.get_input_embeddings().weight[ids[text]])


def test_the_mean_of_the_embeddings_is_where_thinking_rows_start(backbone: Any) -> None:
    mean = backbone.model.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(backbone.thinking_rows.rows, mean.expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tower", ["none", "full"])
def test_only_a_tower_that_learns_is_in_training_mode(load: Load, tower: str) -> None:
    backbone = load(train={"tower": tower})
    backbone.model.train()
    assert backbone.language_model.training
    assert backbone.tower.training == (tower == "full")
    backbone.model.eval()
    assert not backbone.language_model.training


@pytest.mark.parametrize("train", [{}, {"tower": "full"}], ids=["frozen", "learning"])
def test_checkpointing_changes_no_gradient_and_leaves_the_tower_alone(
    load: Load, rows: list[Row], audio: AudioBatch, train: dict[str, str]
) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        backbone = load(gradient_checkpointing=checkpointing, train=train)
        stir(backbone)
        backbone.model.train()
        inputs = backbone.preparer.prepare(rows, audio, train=True)
        tower = Calls(backbone.tower.layers[0].fc1, lambda *_: "tower")
        layer = Calls(backbone.language_model.layers[0].mlp, lambda *_: "layer")
        losses(backbone, inputs).backward()
        assert len(tower.seen) == 1
        assert len(layer.seen) == 1 + checkpointing
        gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_no_graph_outlives_a_pass(backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    backbone.forward(backbone.preparer.prepare(rows, audio, train=True))
    assert (backbone._hidden, backbone._embeds, backbone._tower) == (None, None, None)


# bfloat16


def test_bfloat16_trains_and_answers(load: Load, rows: list[Row], audio: AudioBatch) -> None:
    backbone = load(dtype="bfloat16")
    kinds = {p.dtype for parameters in backbone.parts().values() for p in parameters}
    assert kinds == {torch.float32}
    assert backbone.language_model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert backbone.tower.conv1.weight.dtype == torch.bfloat16
    inputs = backbone.preparer.prepare(rows, audio, train=True)
    exact = load()
    first, expected = losses(backbone, inputs).item(), losses(exact, inputs).item()
    assert first == pytest.approx(expected, rel=0.02)
    _, after = step(backbone, inputs, 3)
    assert all(value.isfinite().all() for value in after.values())
    assert losses(backbone, inputs) < first
    assert len(backbone.generate(backbone.preparer.prepare(rows, audio, train=False), max_new_tokens=3)) == 3


# Answering


@pytest.fixture
def ids(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What `generate` puts out as ids, prompts included; text leaves special tokens out."""
    seen: list[Tensor] = []
    generate = backbone.stock.generate
    monkeypatch.setattr(backbone.stock, "generate", lambda **options: seen.append(generate(**options)) or seen[-1])
    return seen


def greedy(stock: Any, inputs: Inputs, forbidden: list[int], count: int) -> list[int]:
    """The most likely continuation of one prompt, with the whole of it computed again for every token."""
    tokens = dict(inputs.tokens)
    prompt = tokens["input_ids"].shape[1]
    for _ in range(count):
        with torch.no_grad():
            logits = stock_forward(stock, Inputs(**{**vars(inputs), "tokens": tokens})).logits[0, -1]
        logits[forbidden] = -torch.inf
        tokens["input_ids"] = torch.cat([tokens["input_ids"], logits.argmax().view(1, 1)], 1)
        tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
    return tokens["input_ids"][0, prompt:].tolist()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_prompt_and_block_are_one_prefill(
    backbone: Any, stock: Any, ids: list[Tensor], rows: list[Row], audio: AudioBatch, which: int
) -> None:
    mine = [slice(0, 1), slice(0, 0), slice(1, 3)][which]
    own = AudioBatch(audio.samples[mine], audio.lengths[mine], RATE) if mine.stop else None
    inputs = backbone.preparer.prepare([rows[which]], own, train=False)
    backbone.model.eval()
    decoder = Calls(backbone.language_model, lambda _, kwargs: kwargs["inputs_embeds"].shape[1])
    tower = Calls(backbone.tower, lambda *_: "tower")
    head = Calls(backbone.stock.lm_head, lambda args, _: args[0].shape[1])
    text = backbone.generate(inputs, max_new_tokens=8)
    length = inputs.tokens["input_ids"].shape[1]
    answer = ids[0][0, length:].tolist()
    assert decoder.seen == [length] + [1] * (len(answer) - 1)
    assert head.seen[1:] == [1] * (len(answer) - 1)
    assert len(tower.seen) == (own is not None)
    forbidden = [*backbone.preparer.tokens.ids, backbone.preparer.audio_token]
    assert answer == greedy(stock, inputs, forbidden, 8)
    assert text == [backbone.preparer.tokenizer.decode(answer, skip_special_tokens=True).strip()]


def test_prefill_projects_one_position(backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    inputs = backbone.preparer.prepare(rows, audio, train=False)
    outputs: list[tuple[int, ...]] = []
    backbone.stock.lm_head.register_forward_hook(lambda module, args, output: outputs.append(tuple(output.shape)))
    backbone.model.eval()
    backbone.generate(inputs, max_new_tokens=1)
    assert [shape[:2] for shape in outputs] == [(3, 1)]


def test_neither_block_nor_placeholder_is_ever_answered(
    backbone: Any, ids: list[Tensor], rows: list[Row], audio: AudioBatch
) -> None:
    inputs = backbone.preparer.prepare(rows, audio, train=False)
    forbidden = torch.tensor([*backbone.preparer.tokens.ids, backbone.preparer.audio_token])
    backbone.stock.lm_head.register_forward_hook(
        lambda module, args, output: output.index_add(-1, forbidden, output.new_full((*output.shape[:-1], 4), 1e4))
    )
    backbone.model.eval()
    backbone.generate(inputs, max_new_tokens=6)
    answered = ids[0][:, inputs.tokens["input_ids"].shape[1] :]
    assert answered.shape == (3, 6)
    assert not torch.isin(answered, forbidden).any()


def test_left_padded_prompts_are_answered_as_if_alone(
    backbone: Any, row: MakeRow, rows: list[Row], audio: AudioBatch
) -> None:
    stir(backbone)
    backbone.model.eval()
    prompts = [*rows, row("Why?", "Because.")]
    together = backbone.generate(backbone.preparer.prepare(prompts, audio, train=False), max_new_tokens=10)
    alone, at = [], 0
    for one in prompts:
        mine = slice(at, at + len(one.audios))
        at = mine.stop
        own = AudioBatch(audio.samples[mine], audio.lengths[mine], RATE) if one.audios else None
        alone += backbone.generate(backbone.preparer.prepare([one], own, train=False), max_new_tokens=10)
    assert together == alone
    assert len(set(together)) == 4  # the prompts matter at all


def test_an_answer_ends_with_its_turn(backbone: Any, ids: list[Tensor], rows: list[Row]) -> None:
    end = backbone.preparer.tokenizer.eos_token_id
    backbone.stock.lm_head.register_forward_hook(
        lambda module, args, output: output.index_add(-1, torch.tensor([end]), torch.full_like(output[..., :1], 1e4))
    )
    inputs = backbone.preparer.prepare(rows[1:2], None, train=False)
    assert backbone.generate(inputs, max_new_tokens=6) == [""]
    assert ids[0].shape[1] == inputs.tokens["input_ids"].shape[1] + 1


# What does not fit


@pytest.fixture
def mismatched(backbone: Any, rows: list[Row], audio: AudioBatch) -> Inputs:
    return backbone.preparer.prepare(rows, audio, train=True)


def test_fewer_features_than_placeholders_are_refused(backbone: Any, mismatched: Inputs) -> None:
    """transformers' Audio Flamingo 3 refuses by itself; the adapter must not hide it."""
    mismatched.tokens["input_features_mask"][0, 4:] = 0
    with pytest.raises(ValueError, match="do not match"):
        backbone.forward(mismatched)


def test_a_model_that_does_not_count_is_not_relied_on(backbone: Any, mismatched: Inputs) -> None:
    mismatched.audio_lengths[2] -= 1
    for use in (backbone.forward, backbone.generate):
        with pytest.raises(DataError, match="36 placeholders for 35 audio tokens in rows one, text, two"):
            use(mismatched)
    backbone.tower_frames, frames = (lambda output, tokens: frames(output, tokens)[:-1]), backbone.tower_frames
    mismatched.audio_lengths[2] += 1
    try:
        with pytest.raises(DataError, match="gave 35 frames for 36 placeholders in rows one, text, two"):
            backbone.forward(mismatched)
    finally:
        del backbone.tower_frames


def test_a_local_folder_serves_as_weights(tmp_path: Path, backbone: Any, rows: list[Row], audio: AudioBatch) -> None:
    folder = tiny_folder(tmp_path / "mine", seed=1)
    mine = load_backbone("mini", weights=str(folder), device="cpu")
    inputs = mine.preparer.prepare(rows, audio, train=True)
    assert mine.forward(inputs).ce_sum != backbone.forward(inputs).ce_sum
