"""What one would write without coatkit: the stock model in transformers' Trainer, a padding collator, full logits and
all hidden states, and the experts inside the step.

It is the yardstick of benchmarks/train_step.py, and a second opinion on coatkit's loss and gradients
(tests/test_plain.py): same losses, written the straightforward way. It takes coatkit's preparer, heads and experts, so
that what is compared is the training step and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from coatkit.align import align
from coatkit.data.rows import Row
from coatkit.data.steps import Batch, load_batch
from coatkit.model import CoatModel
from coatkit.protocols import AudioBatch, BackboneAudio, Inputs


class Plain(nn.Module):
    """The stock model with peft's LoRA and trained token rows, heads, and every loss in `forward`.

    Args:
        model: coatkit's, whose starting values are taken over, so that both can be compared.
        weights: Loss weight of each active expert.
    """

    def __init__(self, model: CoatModel, weights: Mapping[str, float]) -> None:
        super().__init__()
        backbone: Any = model.backbone
        self.preparer, self.weights = backbone.preparer, dict(weights)
        self.frames = backbone.tower_frames
        stock, _ = backbone.build(torch.float32)
        tokens = list(self.preparer.tokens.ids)
        stock.get_input_embeddings().weight.data[tokens] = backbone.thinking_rows.rows.detach()
        lora = backbone.options.lora
        names = "|".join(re.escape(name) for name in lora.targets)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=rf"{re.escape(backbone.language_model_path)}\.layers\.\d+\.(.*\.)?({names})",
            trainable_token_indices={"embed_tokens": tokens},
        )
        self.net = get_peft_model(stock, config)
        ours = dict(backbone.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.net.get_base_model().named_parameters():
                if name in ours and "lora_" in name:
                    parameter.copy_(ours[name])
        for name, parameter in self.net.get_base_model().named_parameters():
            if name in ours and ours[name].requires_grad:
                parameter.requires_grad_(True)  # a projector that learns
        tower = self.net.get_base_model().get_submodule(backbone.tower_output_path or backbone.tower_path)
        tower.register_forward_hook(self._see_tower)
        self.heads = model.heads
        self._experts = (model.experts,)

    def forward(self, tokens: dict[str, Tensor], labels: Tensor, **rest: Any) -> dict[str, Tensor]:
        out = self.net(**tokens, labels=labels, output_hidden_states=True, use_cache=False)
        loss, terms = out.loss, {"ce": out.loss}
        audio, row, index, lengths = (rest[key] for key in ("audio", "audio_row", "think_index", "think_lengths"))
        if index.numel():
            thinking = out.hidden_states[-1][row[:, None], index]
            mask = torch.arange(index.shape[1]) < lengths[:, None]
            for name, weight in self.weights.items():
                expert = self._experts[0][name]
                sounds = audio[expert.sample_rate]
                if expert.uses_backbone:
                    sounds.backbone = self._heard(tokens, rest["audio_lengths"])
                with torch.no_grad():
                    target = align(expert.encode(sounds), lengths, self.preparer.thinking_rate, expert.upsampling)
                for term, value in expert.loss(self.heads[name](thinking, mask), target, mask).items():
                    terms[f"{name}.{term}"] = value
                    loss = loss + weight * value
        return {"loss": loss, **{f"term {name}": value.detach() for name, value in terms.items()}}

    def _see_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tower = output if isinstance(output, Tensor) else output.last_hidden_state

    def _heard(self, tokens: dict[str, Tensor], lengths: Tensor) -> BackboneAudio:
        flat = self.frames(self.tower.detach(), tokens)
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        frames = torch.zeros(*inside.shape, flat.shape[-1])
        frames[inside] = flat
        return BackboneAudio(frames, frames, lengths, self.preparer.frame_rate)


class RowSet(Dataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def arguments_of(batch: Batch) -> dict[str, Any]:
    """What `Plain.forward` takes."""
    inputs: Inputs = batch.inputs
    audio: dict[int, AudioBatch] = batch.audio
    return {
        "tokens": inputs.tokens,
        "labels": inputs.labels,
        "audio": audio,
        "audio_row": inputs.audio_row,
        "audio_lengths": inputs.audio_lengths,
        "think_index": inputs.think_index,
        "think_lengths": inputs.think_lengths,
    }


def trainer(plain: Plain, rows: Sequence[Row], batch_rows: int, steps: int, folder: Path) -> Trainer:
    """transformers' Trainer over shuffled batches of a fixed number of rows, padded to the longest."""
    rates = {expert.sample_rate for name, expert in plain._experts[0].items() if name in plain.weights}

    def collate(rows: list[Row]) -> dict[str, Any]:
        return arguments_of(load_batch(rows, plain.preparer, rates, 120.0, train=True))

    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_rows,
        learning_rate=1e-4,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    return Trainer(model=plain, args=arguments, data_collator=collate, train_dataset=RowSet(rows))
