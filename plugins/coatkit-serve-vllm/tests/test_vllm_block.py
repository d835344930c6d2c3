"""The block in a prompt of ids: what goes in, what comes out, what is refused. No vLLM here; see tests/vllm."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from coatkit_serve_vllm import MODELS
from coatkit_serve_vllm import block as block_module
from coatkit_serve_vllm.block import Block, Sound, expand

BLOCK = Block(start=900, think=901, end=902, per_audio_token=1.0, never=(900, 901, 902, 500))
FACTS: dict[str, Any] = {
    "format": 1,
    "thinking": {"start": "<s>", "think": "<t>", "end": "<e>", "placement": "x", "tokens_per_audio_token": 0.5},
    "audio": {"token": "<a>"},
}
IDS = {"<s>": 10, "<t>": 11, "<e>": 12, "<a>": 5}


def block(length: int) -> list[int]:
    return [900, *[901] * length, 902]


def test_a_block_gets_a_position_for_every_audio_token() -> None:
    ids = [1, *[500] * 4, 2, *block(1), 3]
    assert expand(ids, [Sound(1, 4, 4)], BLOCK) == ([1, *[500] * 4, 2, *block(4), 3], [1])


def test_what_the_client_wrote_itself_comes_out_the_same() -> None:
    bare = [1, *[500] * 4, 2, *block(1), 3]
    whole = [1, *[500] * 4, 2, *block(4), 3]
    assert expand(bare, [Sound(1, 4, 4)], BLOCK) == expand(whole, [Sound(1, 4, 4)], BLOCK)


def test_sounds_of_one_turn_share_a_block_and_later_ones_have_their_own() -> None:
    ids = [1, 500, 500, 2, 500, *block(1), 3, 500, 500, 500, 4, *block(1)]
    sounds = [Sound(9, 3, 3), Sound(1, 2, 2), Sound(4, 1, 1)]  # in no order
    out, starts = expand(ids, sounds, BLOCK)
    assert out == [1, 500, 500, 2, 500, *block(3), 3, 500, 500, 500, 4, *block(3)]
    assert starts == [11, 1, 4]
    assert all(out[start : start + s.length] == [500] * s.length for start, s in zip(starts, sounds, strict=True))


def test_markup_inside_a_sound_is_no_position() -> None:
    """Some models count the tokens around the placeholders to the sound."""
    out, _ = expand([7, 500, 500, 8, *block(1)], [Sound(0, 4, 2)], BLOCK)
    assert out == [7, 500, 500, 8, *block(2)]


def test_fewer_positions_are_rounded_for_each_sound_as_in_training() -> None:
    half = Block(900, 901, 902, 0.5, ())
    ids = [*[500] * 5, *[500] * 3, *[500], *block(1)]
    out, _ = expand(ids, [Sound(0, 5, 5), Sound(5, 3, 3), Sound(8, 1, 1)], half)
    assert out.count(901) == round(2.5) + round(1.5) + 1


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.5, 1.0, 1.5, 4.0])
def test_every_length_is_that_of_training(ratio: float) -> None:
    from coatkit.thinking import thinking_length

    served = Block(900, 901, 902, ratio, ())
    assert [served.length(n) for n in range(1, 2_000)] == [thinking_length(n, ratio) for n in range(1, 2_000)]


def test_text_alone_is_left_as_it_is() -> None:
    assert expand([1, 2, 3], [], BLOCK) == ([1, 2, 3], [])


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 500, 500, 3], "a sound and no thinking block after it"),
        ([*block(1), 500, 500], "a thinking block that no sound stands before"),
        ([500, 500, *block(1), 3, *block(1)], "a thinking block that no sound stands before"),
        ([500, 500, *block(3)], "audio_think_len is 3, and the sounds before the block have 2 positions"),
        ([500, 500, 900, 901, 3], "a thinking block without its end"),
        ([500, 500, 900, 902], "a thinking block without its end"),
        ([500, 500, 900], "a thinking block without its end"),
    ],
)
def test_what_is_wrong_is_refused(ids: list[int], said: str) -> None:
    at = ids.index(500)
    with pytest.raises(ValueError, match=said):
        expand(ids, [Sound(at, 2, 2)], BLOCK)


def test_the_side_file_is_read() -> None:
    assert Block.read(FACTS, IDS) == Block(10, 11, 12, 0.5, (10, 11, 12, 5))
    assert Block.read({**FACTS, "thinking": None}, IDS) is None


def test_another_format_or_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="format 2, but this plugin reads format 1"):
        Block.read({**FACTS, "format": 2}, IDS)
    with pytest.raises(ValueError, match="the tokenizer has no <t>"):
        Block.read(FACTS, {name: number for name, number in IDS.items() if name != "<t>"})


def test_the_entry_imports_neither_vllm_nor_torch() -> None:
    before = set(sys.modules)
    importlib.reload(importlib.import_module("coatkit_serve_vllm"))
    assert not {"vllm", "torch"} & (set(sys.modules) - before)
    assert {target.partition(":")[0].partition(".")[0] for target in MODELS.values()} == {"coatkit_serve_vllm"}


def test_what_export_writes_is_what_is_read() -> None:
    from coatkit.export.write import FORMAT

    assert FORMAT == block_module.FORMAT
