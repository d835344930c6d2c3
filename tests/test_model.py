"""Backbone, heads and experts together: every loss term of a batch, and what gets a gradient from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coatkit import AudioBatch
from coatkit.build import build
from coatkit.data.rows import JsonlRows, Row
from coatkit.data.steps import Batch, load_batch
from coatkit.errors import PluginError
from coatkit.losses import masked_mse
from coatkit.model import CoatModel, Losses

ALL = ["audio", "level"]

WATCHING = """
import torch
from coatkit import Expert, Features

class Watching(Expert):
    sample_rate, frame_rate, dim = 11_025, 10.0, 3

    def __init__(self):
        self.net = torch.nn.Linear(1, 3)
        self.seen = []

    def encode(self, audio):
        self.seen.append(
            (audio.sample_rate, audio.lengths.tolist(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        )
        frames = -(-audio.lengths * 10 // audio.sample_rate)
        level = audio.samples.abs().mean(1)[:, None, None].expand(-1, int(frames.max()), 1)
        return Features(self.net(level), frames, self.frame_rate)

    def loss(self, predicted, target, mask):
        self.seen.append((predicted.dtype, target.dtype, target.requires_grad, torch.is_autocast_enabled("cpu")))
        return {"mse": ((predicted - target)[mask] ** 2).mean(), "size": predicted[mask].abs().mean()}
"""


def rows_of(project: Any) -> list[Row]:
    project.write()
    return JsonlRows(project.folder / "train.jsonl")[:]


def batch(model: CoatModel, rows: Sequence[Row]) -> Batch:
    rates = {expert.sample_rate for expert in model.experts.values()}
    return load_batch(rows, model.backbone.preparer, rates, 120.0, train=True)


@pytest.fixture
def model(project: Any) -> CoatModel:
    return build(project.load(), "cpu")


def total(losses: Losses) -> Tensor:
    return sum(losses.sums.values(), torch.zeros(()))


def test_terms_are_sums_over_what_is_counted(model: CoatModel, project: Any) -> None:
    rows = [row for row in rows_of(project) if row.id in ("r03", "t1", "r09")]
    made = batch(model, rows)
    losses = model(made, ALL)
    inputs = made.inputs
    positions = inputs.think_lengths.tolist()
    assert list(losses.sums) == ["ce", "audio.mse", "level.mse"]
    out = model.backbone.forward(inputs)
    assert out.ce_count == sum(len(row.messages[1].content) + 1 for row in rows)
    assert out.audio is not None
    assert out.thinking is not None
    assert torch.equal(losses.sums["ce"], out.ce_sum)
    # What the language model heard is, at one position per audio token, the very target.
    predicted = model.heads["audio"](out.thinking, inputs.think_mask)
    expected = masked_mse(predicted, out.audio.consumed, inputs.think_mask) * sum(positions)
    torch.testing.assert_close(losses.sums["audio.mse"], expected)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 4, 4], [1] * 9])
def test_splitting_a_batch_changes_no_total(model: CoatModel, project: Any, sizes: list[int]) -> None:
    rows = rows_of(project)
    rows = [rows[i] for i in (0, 16, 15, 3, 8, 17, 2, 14, 5)]
    whole = model(batch(model, rows), ALL)
    total(whole).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sums: dict[str, Tensor] = {}
    for size in sizes:
        part, rows = rows[:size], rows[size:]
        losses = model(batch(model, part), ALL)
        total(losses).backward()
        for name, value in losses.sums.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach()
    assert set(sums) == set(whole.sums)
    for name, value in sums.items():
        torch.testing.assert_close(value, whole.sums[name].detach(), rtol=1e-5, atol=1e-5)
    for name, expected in gradients.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, expected, rtol=0, atol=1e-5 * scale)


def test_inactive_heads_are_not_run(model: CoatModel, project: Any) -> None:
    calls: list[str] = []
    for name, head in model.heads.items():
        head.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses = model(batch(model, rows_of(project)[:3]), ["level"])
    total(losses).backward()
    assert calls == ["level"]
    assert list(losses.sums) == ["ce", "level.mse"]
    assert all(p.grad is None for p in model.heads["audio"].parameters())
    assert all(p.grad is not None for p in model.heads["level"].parameters())
    assert all(p.grad is not None for parameters in model.backbone.parts().values() for p in parameters)


def test_a_batch_of_text_has_cross_entropy_only(model: CoatModel, project: Any) -> None:
    made = batch(model, [row for row in rows_of(project) if not row.audios])
    assert made.audio == {}
    losses = model(made, ALL)
    assert list(losses.sums) == ["ce"]
    total(losses).backward()
    assert all(p.grad is None for p in model.heads.parameters())


def test_where_processes_wait_for_each_other_everything_gets_a_gradient(model: CoatModel, project: Any) -> None:
    text = batch(model, [row for row in rows_of(project) if not row.audios])
    for made in (None, text):
        losses = model(made, ALL, together=True)
        (losses.nothing + total(losses)).backward()
        assert losses.nothing.item() == 0
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, p in learning.items() if p.grad is None] == []
        assert not any(p.grad.any() for name, p in learning.items() if name.startswith("heads."))
        assert made is text or not any(p.grad.any() for p in learning.values())
        model.zero_grad()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_frozen_exact_and_hear_their_own_rate(project: Any, dtype: str) -> None:
    (project.folder / "watching.py").write_text(WATCHING)
    project.spec["experts"]["watching"] = {"use": "./watching.py:Watching"}
    project.spec["stages"][1]["weights"]["watching"] = 1.0
    project.spec["backbone"]["dtype"] = dtype
    model = build(project.load(), "cpu")
    rows = rows_of(project)[:2]
    made = batch(model, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        losses = model(made, ["level", "watching"])
    total(losses).backward()
    expert: Any = model.experts["watching"]
    heard, loss = expert.seen
    # Clips of 0.1 and 0.125 s.
    assert heard == (11_025, pytest.approx([1102.5, 1378.1], abs=1), False, False)
    assert loss == (torch.float32, torch.float32, False, False)
    assert list(losses.sums) == ["ce", "level.mse", "watching.mse", "watching.size"]
    frozen = {id(p) for p in expert.net.parameters()}
    assert all(p.grad is None for p in expert.net.parameters())
    assert not frozen & {id(p) for p in model.parameters()}
    assert not frozen & {id(p) for parameters in model.parts().values() for p in parameters}


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_another_number_of_thinking_positions_trains(project: Any, ratio: float) -> None:
    project.spec["thinking"] = {"tokens_per_audio_token": ratio}
    model = build(project.load(), "cpu")
    made = batch(model, rows_of(project)[8:12])
    tokens, positions = made.inputs.audio_lengths, made.inputs.think_lengths
    assert positions.tolist() == [round(n * ratio) for n in tokens.tolist()]
    learn = [p for ps in model.parts().values() for p in ps]
    optimizer = torch.optim.AdamW(learn, lr=3e-3)
    seen: list[dict[str, float]] = []
    for _ in range(6):
        losses = model(made, ALL)
        seen.append({name: value.item() for name, value in losses.sums.items()})
        total(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(seen[-1][name] < seen[0][name] for name in seen[0])


def wrong(project: Any, encode: str) -> CoatModel:
    (project.folder / "wrong.py").write_text(
        "import torch\nfrom coatkit import Expert, Features\n\n"
        "class Wrong(Expert):\n    sample_rate, frame_rate, dim = 16_000, 50.0, 3\n"
        f"    def encode(self, audio):\n        n = len(audio)\n        {encode}\n"
    )
    project.spec["experts"] = {"mine": {"use": "./wrong.py:Wrong"}}
    project.spec["stages"] = [{**project.spec["stages"][0], "weights": {"mine": 1.0}}]
    return build(project.load(), "cpu")


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        ("return Features(torch.zeros(n, 4, 1), torch.full((n,), 4), 50.0)", r"values \(2, 4, 1\); expected .*dim 3"),
        ("return Features(torch.zeros(1, 4, 3), torch.full((n,), 4), 50.0)", r"values \(1, 4, 3\); expected \[2"),
        ("return Features(torch.zeros(4, 3), torch.full((n,), 4), 50.0)", r"values \(4, 3\)"),
        ("return Features(torch.zeros(n, 4, 3), torch.full((n,), 5), 50.0)", r"lengths \[5, 5\] for 2 sounds of 4"),
        ("return Features(torch.zeros(n, 4, 3), torch.tensor([4]), 50.0)", r"lengths \[4\]"),
        ("return Features(torch.zeros(n, 4, 3), torch.full((n,), 4), 40.0)", "declares 50.0"),
        (
            "return Features(torch.zeros(n, 4, 3), torch.tensor([4, 0]), 50.0)",
            r"cover 0\.00 s of a sound of .*hears_all",
        ),
        ("return torch.zeros(n, 4, 3)", "must give Features, not Tensor"),
        ("raise RuntimeError('out of tune')", r"wrong\.py:8: RuntimeError: out of tune"),
    ],
)
def test_a_wrong_expert_is_named_with_its_rows(project: Any, encode: str, message: str) -> None:
    model = wrong(project, encode)
    with pytest.raises(PluginError, match=message) as caught:
        model(batch(model, rows_of(project)[:2]), ["mine"])
    assert "expert 'mine'" in str(caught.value)
    assert "rows r00, r01" in str(caught.value)


@pytest.mark.parametrize("name", ["ce", "type", "keys", "forward"])
def test_a_name_needed_inside_is_refused(project: Any, name: str) -> None:
    project.spec["experts"] = {name: {"use": "audio"}}
    project.spec["stages"] = [{**project.spec["stages"][0], "weights": {name: 1.0}}]
    with pytest.raises(PluginError, match=rf"experts\.{name}: this name is needed inside coatkit"):
        build(project.load(), "cpu")


def test_arrays_of_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="int16; expected float samples"):
        AudioBatch.from_arrays([np.array([1000, -2000], np.int16)], 16_000)


def test_heads_compute_in_the_backbones_type(project: Any) -> None:
    """Products of a bfloat16 backbone's heads are bfloat16; what learns and what the loss sees is float32."""
    project.spec["backbone"]["dtype"] = "bfloat16"
    model = build(project.load(), "cpu")
    rows = JsonlRows(project.folder / "train.jsonl")[10:13]
    batch = load_batch(rows, model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
    seen = set()
    model.heads["level"].out.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    loss = model.experts["level"].loss
    model.experts["level"].loss = lambda predicted, *rest: seen.add(predicted.dtype) or loss(predicted, *rest)  # type: ignore
    sum(model(batch, ["audio", "level"]).sums.values()).backward()
    assert seen == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}
