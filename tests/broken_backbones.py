"""A good backbone (the mini one, tiny and random), and many that are broken on purpose, each in one way.

`tests/test_backbone_conformance_suite.py` says which checks of the suite each fails.
"""

from __future__ import annotations

import contextlib
import os
import random
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from coatkit_backbone_mini.backbone import MiniBackbone, MiniPreparer
from coatkit_backbone_mini.loading import load_processor
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from coatkit import AssetError, Backbone, Inputs
from coatkit.backbones import whisper
from coatkit.data.rows import Message, Row
from coatkit.protocols import BackboneAudio, Sketch
from coatkit.spec import ThinkingSpec
from coatkit.thinking import IGNORE, TOKENS, gather


class Good(MiniBackbone):
    """Its tower can drop out, as large ones can; in evaluation mode nothing of that shows."""

    preparer_type: type[MiniPreparer] = MiniPreparer

    def build(self, dtype: torch.dtype) -> Any:
        model, preparer = super().build(dtype)
        model.model.audio_tower.dropout = 0.5
        preparer.__class__ = self.preparer_type
        return model, preparer


class Bare(Backbone):
    """Nothing but the protocol, by another backbone's hands: no attribute of the adapter is there."""

    def __init__(self, *, thinking: ThinkingSpec | None = None, weights: str = "random") -> None:
        self.inner = Good(thinking=thinking, weights=weights)

    def load(self, device: torch.device) -> None:
        self.inner.load(device)
        self.model, self.preparer = self.inner.model, self.inner.preparer
        self.hidden_size, self.audio_dims = self.inner.hidden_size, self.inner.audio_dims

    def forward(self, inputs: Any) -> Any:
        return self.inner.forward(inputs)

    def generate(self, inputs: Any, *, max_new_tokens: int = 64, **options: Any) -> list[str]:
        return self.inner.generate(inputs, max_new_tokens=max_new_tokens, **options)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return self.inner.parts()


# Loading


class CannotLoad(Good):
    def load(self, device: torch.device) -> None:
        raise OSError("no libsound.so")


class LoadsDiffer(Good):
    def build(self, dtype: torch.dtype) -> Any:
        model, preparer = super().build(dtype)
        drawn = random.Random().random()
        model.model.language_model.norm.weight.data.add_(drawn)
        return model, preparer


class SeedsGlobally(Good):
    def load(self, device: torch.device) -> None:
        random.seed(0)
        super().load(device)


class Careless(Good):
    """Downloads, writes at home, and takes its fingerprint from the process."""

    def load(self, device: torch.device) -> None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen("http://weights.example/mini.safetensors")
        Path("~/mini_was_here").expanduser().write_text("x")
        super().load(device)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {os.getpid()}"


class FingerprintIgnoresWeights(Good):
    def fingerprint(self) -> str:
        return "mini 1.0"


class FingerprintOfEverything(Good):
    def fingerprint(self) -> str:
        return str(sum(float(p.double().abs().sum()) for p in self.model.parameters()))


class FingerprintOfTheInstance(Good):
    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {id(self)}"


class FallsBackToRandom(Good):
    def build(self, dtype: torch.dtype) -> Any:
        try:
            return super().build(dtype)
        except AssetError:
            self.options = self.options.model_copy(update={"weights": "random"})
            return super().build(dtype)


class PreparerWithModel(Good):
    def build(self, dtype: torch.dtype) -> Any:
        model, preparer = super().build(dtype)
        preparer.model = model
        return model, preparer


class SketchOfAnotherSize(Good):
    def plan_config(self) -> Any:
        config = super().plan_config()
        config.text_config.num_hidden_layers += 1
        config.text_config.layer_types = None
        return config


class SketchWithoutAPart(Good):
    def parts(self) -> dict[str, list[nn.Parameter]]:
        found = super().parts()
        if self.stock.device.type == "meta":
            del found["lora"]
        return found


class SketchThatFreezesNothing(Good):
    def sketch(self) -> Sketch:
        return replace(super().sketch(), frozen={"lm": 1})


class SketchWithValues(Good):
    def sketch(self) -> Sketch:
        made = super().sketch()
        self.load(torch.device("cpu"))
        return made


class CannotSketch(Good):
    def plan_config(self) -> Any:
        return self.gone


class SketchesADict(Good):
    def sketch(self) -> Any:
        return vars(super().sketch())


class CostsTheSameForever(Good):
    def tower_flops(self, seconds: float) -> float:
        return 1e9


class LearnsBackwards(Good):
    def tower_backward(self, seconds: float) -> float:
        return 1e9 / seconds


# The model folder


class IgnoresTheFolder(Good):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "weights": "random"})


class TakesWhatFits(Good):
    """As `from_pretrained` does, whose report nobody reads."""

    def build(self, dtype: torch.dtype) -> Any:
        if self.options.weights == "random":
            return super().build(dtype)
        model = self.model_class.from_pretrained(self.options.weights, dtype=dtype, ignore_mismatched_sizes=True)
        whisper.allow_short_windows(model.model.audio_tower)
        return model, MiniPreparer(*load_processor(Path(self.options.weights)), self.thinking)


class SaysNothingOfTheFolder(Good):
    def build(self, dtype: torch.dtype) -> Any:
        try:
            return super().build(dtype)
        except AssetError:
            raise AssetError("the weights are damaged") from None


# Preparing


class AlwaysAfterTheHeader(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def _pieces(self, row: Row, train: bool) -> Any:
            kept, self.thinking = self.thinking, self.thinking and ThinkingSpec()
            try:
                return super()._pieces(row, train)
            finally:
                self.thinking = kept


class AnswersWithoutABlock(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            kept, self.thinking = self.thinking, self.thinking if train else None
            try:
                return super().prepare(rows, audio, train=train)
            finally:
                self.thinking = kept


class BlockWithoutSettings(Good):
    """Thinks with `thinking: off` too, and at one rate only."""

    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            self.thinking, self.thinking_rate = ThinkingSpec(), 25.0
            return super().prepare(rows, audio, train=train)


class LabelsOnThePrompt(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            inputs = super().prepare(rows, audio, train=train)
            if train:
                ids, mask = inputs.tokens["input_ids"], inputs.tokens["attention_mask"]
                inputs.labels = torch.where(mask.bool(), ids, IGNORE)
            return inputs


class AnswersWithoutEnd(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            inputs = super().prepare(rows, audio, train=train)
            if train:
                inputs.labels[inputs.labels == self.tokenizer.eos_token_id] = IGNORE
            return inputs


class NoMask(Good):
    """Padding is attended to."""

    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            inputs = super().prepare(rows, audio, train=train)
            inputs.tokens["attention_mask"] = torch.ones_like(inputs.tokens["attention_mask"])
            return inputs


class PositionsBeforePadding(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            inputs = super().prepare(rows, audio, train=train)
            if not train:
                first = (inputs.tokens["attention_mask"] == 0).sum(1)[inputs.audio_row]
                inputs.audio_index = (inputs.audio_index - first[:, None]).clamp(min=0)
            return inputs


class ReordersSounds(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            inputs = super().prepare(rows, audio, train=train)
            if inputs.think_lengths.numel() == 3 and inputs.audio_row[0] == inputs.audio_row[2]:
                inputs.think_index, inputs.think_lengths = inputs.think_index.flip(0), inputs.think_lengths.flip(0)
            return inputs


class RemovesForeignTokens(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            def clean(text: str) -> str:
                for token in (*TOKENS, "<sound>"):
                    text = text.replace(token, "")
                return text

            rows = [
                Row(row.id, tuple(Message(m.role, clean(m.content)) for m in row.messages), row.audios, row.where)
                for row in rows
            ]
            return super().prepare(rows, audio, train=train)


class TakesEndlessRows(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            try:
                self.max_tokens = None
                return super().prepare(rows, audio, train=train)
            finally:
                del self.max_tokens


class ScalesItsInput(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            if audio is not None:
                audio.samples /= 2
            return super().prepare(rows, audio, train=train)


class RemembersRows(Good):
    calls = 0

    class preparer_type(MiniPreparer):  # noqa: N801
        def audio_features(self, audio: Any) -> Any:
            features, counts = super().audio_features(audio)
            RemembersRows.calls += 1
            return {**features, "input_features": features["input_features"] + RemembersRows.calls}, counts


class PreparerWithAHook(Good):
    def build(self, dtype: torch.dtype) -> Any:
        model, preparer = super().build(dtype)
        preparer.clean = lambda text: text
        return model, preparer


class CannotPrepare(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def prepare(self, rows: Any, audio: Any, *, train: bool) -> Any:
            return self.gone


# One pass


class OneTokenMore(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def audio_tokens(self, samples: int) -> int:
            return super().audio_tokens(samples) + 1


class OtherRounding(Good):
    """One token fewer than the tower gives, for some lengths."""

    class preparer_type(MiniPreparer):  # noqa: N801
        def audio_tokens(self, samples: int) -> int:
            return samples // 640

        def audio_features(self, audio: Any) -> Any:
            features, _ = super().audio_features(audio)
            return features, [self.audio_tokens(n) for n in audio.lengths.tolist()]


class CutsLongSounds(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def audio_tokens(self, samples: int) -> int:
            return whisper.audio_tokens(min(samples, whisper.WINDOW))

        def audio_features(self, audio: Any) -> Any:
            audio.samples = audio.samples[:, : whisper.WINDOW]
            audio.lengths = audio.lengths.clamp(max=whisper.WINDOW)
            return super().audio_features(audio)


class BareShortSounds(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def audio_features(self, audio: Any) -> Any:
            features, counts = super().audio_features(audio)
            if 0 in counts:
                raise IndexError("tuple index out of range")
            return features, counts


class SecretlyDeafBeyondASecond(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def cannot_hear(self, seconds: float) -> str:
            return " " if seconds > 1 else super().cannot_hear(seconds)


class Deaf(Good):
    class preparer_type(MiniPreparer):  # noqa: N801
        def audio_features(self, audio: Any) -> Any:
            features, counts = super().audio_features(audio)
            return {**features, "input_features": torch.zeros_like(features["input_features"])}, counts


class WrongTowerWidth(Good):
    def _tower_width(self) -> int:
        return 384


class TargetWithGradient(Good):
    def forward(self, inputs: Any) -> Any:
        output = super().forward(inputs)
        if output.audio is not None and output.ce_sum.requires_grad:
            output.audio.consumed = output.audio.consumed + 0 * output.ce_sum
        return output


class CountsItsPasses(Good):
    passes = 0

    def forward(self, inputs: Any) -> Any:
        self.passes += 1
        output = super().forward(inputs)
        output.ce_sum = output.ce_sum * (1 + self.passes / 100)
        return output


class RowsSeeEachOther(Good):
    """What a row holds reaches the others, those of text alone too."""

    def load(self, device: torch.device) -> None:
        super().load(device)

        def mix(module: Any, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(0, keepdim=True)
            return output

        self.language_model.register_forward_hook(mix)


class TextRowsHearSounds(Good):
    """Rows without a sound cost less beside rows with one."""

    def forward(self, inputs: Any) -> Any:
        output = super().forward(inputs)
        if inputs.labels is not None and inputs.audio_row.numel():
            silent = torch.ones(len(inputs.labels), dtype=torch.bool)
            silent[inputs.audio_row] = False
            output.ce_sum = output.ce_sum - 0.01 * (inputs.labels[silent, 1:] != IGNORE).sum()
        return output


class TowerWithPadding(Good):
    """The target of a sound depends on how long the batch's longest is."""

    def tower_frames(self, output: Any, tokens: dict[str, Tensor]) -> Tensor:
        found = super().tower_frames(output, tokens)
        return found + output.shape[1]


class NormalisesConsumed(Good):
    def forward(self, inputs: Any) -> Any:
        output = super().forward(inputs)
        if output.audio is not None:
            output.audio = BackboneAudio(
                F.normalize(output.audio.consumed, dim=-1), output.audio.tower, output.audio.lengths, 25.0
            )
        return output


class StatesOneTooEarly(Good):
    def forward(self, inputs: Any) -> Any:
        found: list[Tensor] = []
        handle = self.language_model.register_forward_hook(lambda m, a, o: found.append(o.last_hidden_state))
        output = super().forward(inputs)
        handle.remove()
        if output.thinking is not None:
            output.thinking = gather(found[0], inputs.audio_row, (inputs.think_index - 1).clamp(min=0))
        return output


class LossOfTheSameToken(Good):
    def _cross_entropy(self, hidden: Tensor, labels: Tensor | None) -> Any:
        shifted = None if labels is None else F.pad(labels, (1, 0), value=IGNORE)[:, :-1]
        total, _ = super()._cross_entropy(hidden, shifted)
        return total, 0 if labels is None else int((labels[:, 1:] != IGNORE).sum())


class TowerRunsTwice(Good):
    def forward(self, inputs: Any) -> Any:
        if "input_features" in inputs.tokens:
            self.tower(inputs.tokens["input_features"], input_features_mask=inputs.tokens["input_features_mask"])
        return super().forward(inputs)


class CountsNoPlaceholders(Good):
    """Neither it nor its model looks."""

    def _check_placeholders(self, inputs: Inputs) -> None: ...

    def load(self, device: torch.device) -> None:
        super().load(device)

        def where(model: Any, input_ids: Any, inputs_embeds: Any, audio_features: Any) -> Any:
            return (input_ids == self.preparer.audio_token)[..., None].expand_as(inputs_embeds)

        self.stock.model.get_placeholder_mask = MethodType(where, self.stock.model)


class UnitsOfTheTower(Good):
    def units(self) -> list[nn.Module]:
        return [*super().units(), *self.tower.layers]


# Learning


class ForgetsAPart(Good):
    def parts(self) -> dict[str, list[nn.Parameter]]:
        found = super().parts()
        found.pop("projector", None)
        return found


class LearnsWithoutUse(Good):
    """Positions that no pass of a trimmed tower uses alone, and that nothing trains."""

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.model.unused = nn.Parameter(torch.ones(3))


class AdaptersOnTheTower(Good):
    def _choose_what_learns(self, embedding: Any, first_token: int) -> None:
        super()._choose_what_learns(embedding, first_token)
        # As a bare list of names would do, which fits layers of the tower too.
        inject_adapter_in_model(LoraConfig(r=16, target_modules=self.options.lora.targets), self.tower)


class EmbeddingMoves(Good):
    def forward(self, inputs: Any) -> Any:
        if self.model.training:
            self.stock.get_input_embeddings().weight.data.mul_(0.99)
        return super().forward(inputs)


class EmbeddingLearns(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        self.stock.get_input_embeddings().weight.requires_grad_(True)


class OneRowForAll(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        inner = self.thinking_rows.replace
        first = self.thinking_rows.first
        self.thinking_rows.replace = lambda ids, embedded: inner(  # type: ignore[method-assign]
            torch.where((ids >= first) & (ids < first + 3), first, ids), embedded
        )


class TowerInTrainingMode(Good):
    def _train_mode(self, mode: bool = True) -> nn.Module:
        return nn.Module.train(self.model, mode)


class IgnoresCheckpointing(Good):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "gradient_checkpointing": False})


class CheckpointsTheTower(Good):
    """A second look at the sounds in the backward pass."""

    def forward(self, inputs: Any) -> Any:
        if self.options.gradient_checkpointing and "input_features" in inputs.tokens:
            self.tower(inputs.tokens["input_features"], input_features_mask=inputs.tokens["input_features_mask"])
        return super().forward(inputs)


class CheckpointsFromTheTop(Good):
    """The switch for the whole model reaches the tower's layers; with a tower that learns, they run again."""

    def load(self, device: torch.device) -> None:
        super().load(device)
        if self.options.gradient_checkpointing:
            self.stock.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class IgnoresTrain(Good):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "train": {}})


class LearnsInBfloat16(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        if self.options.dtype == "bfloat16":
            self.model.to(torch.bfloat16)


class SecretAverage(Good):
    """A running mean that outputs depend on and that no checkpoint keeps."""

    mean = 0.0

    def forward(self, inputs: Any) -> Any:
        output = super().forward(inputs)
        if self.model.training:
            self.mean += float(output.ce_sum.detach()) / 100
        output.ce_sum = output.ce_sum + self.mean
        return output


class AdaptersWithAnExtra(Good):
    """What a hook adds to adapters is not merged."""

    def load(self, device: torch.device) -> None:
        super().load(device)
        for name, module in self.model.named_modules():
            if name.endswith("lora_B.default"):
                module.register_forward_hook(lambda m, args, output: 1.5 * output)


class RefusesTied(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        if self.stock.get_input_embeddings().weight is self.stock.get_output_embeddings().weight:
            raise ValueError("tied embeddings are not supported")


# Answering


class AnswersToNothing(Good):
    def generate(self, inputs: Any, **options: Any) -> Any:
        return super().generate(inputs, **options)[0]


class ForgetsTheBlock(Good):
    def generate(self, inputs: Any, **options: Any) -> list[str]:
        ours = torch.isin(inputs.tokens["input_ids"], torch.tensor(self.preparer.tokens.ids))
        inputs.tokens["attention_mask"][ours] = 0
        return super().generate(inputs, **options)


class PenalisesRepetition(Good):
    """What the weights' own generation config may ask for."""

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.stock.generation_config.repetition_penalty = 3.0


class AnswersWithThePrompt(Good):
    def generate(self, inputs: Any, **options: Any) -> list[str]:
        return ["user\n" + text for text in super().generate(inputs, **options)]


class MayAnswerTheBlock(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        generate = self.stock.generate
        self.stock.generate = lambda **options: generate(**{**options, "suppress_tokens": None})


class WithoutCache(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        self.stock.generation_config.use_cache = False


class NeverEnds(Good):
    def load(self, device: torch.device) -> None:
        super().load(device)
        self.stock.generation_config.eos_token_id = self.preparer.tokenizer.pad_token_id


class KeepsTheLastPrompt(Good):
    offset = 0.0

    def generate(self, inputs: Any, **options: Any) -> list[str]:
        self.offset += 1.0
        return super().generate(inputs, **options)

    def forward(self, inputs: Any) -> Any:
        output = super().forward(inputs)
        output.ce_sum = output.ce_sum + self.offset
        return output


class LeavesTrainingOn(Good):
    def generate(self, inputs: Any, **options: Any) -> list[str]:
        found = super().generate(inputs, **options)
        self.language_model.train()
        return found
