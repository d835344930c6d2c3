"""Laying out one row: placeholders expanded, blocks spliced in, labels on answers only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coatkit.thinking import IGNORE, Block, Text, ThinkingTokens, gather, index_of, lay_out, thinking_length

SOUND = 50
START, THINK, END = 90, 91, 92
TOKENS = ThinkingTokens(START, THINK, END)
TURN = [Text([1, SOUND, 2]), Block([0]), Text([7, 8], answer=True), Text([9])]


def test_one_position_for_each_audio_token() -> None:
    laid = lay_out(TURN, SOUND, [3], TOKENS, 1.0)
    assert laid.ids == [1, SOUND, SOUND, SOUND, 2, START, THINK, THINK, THINK, END, 7, 8, 9]
    assert laid.labels == [IGNORE] * 10 + [7, 8] + [IGNORE]
    assert laid.audio == [(1, 3)]
    assert laid.think == [(6, 3)]


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 3), (0.5, 6), (1.0, 12), (2.0, 24)])
def test_the_ratio_shortens_or_stretches_the_block(ratio: float, count: int) -> None:
    laid = lay_out(TURN, SOUND, [12], TOKENS, ratio)
    assert laid.think == [(15, count)]
    assert laid.ids[14:] == [START, *[THINK] * count, END, 7, 8, 9]
    assert len(laid.labels) == len(laid.ids)


@pytest.mark.parametrize(("tokens", "ratio", "count"), [(1, 0.25, 1), (3, 0.25, 1), (7, 0.5, 4), (10, 0.25, 2)])
def test_length_is_rounded_and_never_zero(tokens: int, ratio: float, count: int) -> None:
    assert thinking_length(tokens, ratio) == count


def test_several_sounds_share_a_block_in_order() -> None:
    pieces = [Text([SOUND, 1, SOUND]), Block([0, 1]), Text([7], answer=True)]
    laid = lay_out(pieces, SOUND, [2, 3], TOKENS, 1.0)
    assert laid.ids == [SOUND, SOUND, 1, SOUND, SOUND, SOUND, START, *[THINK] * 5, END, 7]
    assert laid.audio == [(0, 2), (3, 3)]
    assert laid.think == [(7, 2), (9, 3)]


def test_two_blocks_in_a_conversation() -> None:
    pieces = [Text([SOUND]), Block([0]), Text([7], answer=True), Text([SOUND]), Block([1]), Text([8], answer=True)]
    laid = lay_out(pieces, SOUND, [1, 2], TOKENS, 1.0)
    assert laid.ids == [SOUND, START, THINK, END, 7, SOUND, SOUND, START, THINK, THINK, END, 8]
    assert laid.think == [(2, 1), (8, 2)]
    assert [label for label in laid.labels if label != IGNORE] == [7, 8]


def test_text_alone_has_no_block() -> None:
    laid = lay_out([Text([1, 2]), Text([7], answer=True)], SOUND, [], TOKENS, 1.0)
    assert (laid.ids, laid.labels, laid.audio, laid.think) == ([1, 2, 7], [IGNORE, IGNORE, 7], [], [])


def test_off_leaves_the_block_out() -> None:
    laid = lay_out(TURN, SOUND, [3], None, 1.0)
    assert laid.ids == [1, SOUND, SOUND, SOUND, 2, 7, 8, 9]
    assert laid.audio == [(1, 3)]
    assert laid.think == [(0, 0)]


@pytest.mark.parametrize(
    ("placeholders", "sounds", "message"),
    [(2, 1, "more audio placeholders than the row's 1 sounds"), (1, 2, "1 audio placeholders for 2 sounds")],
)
def test_placeholders_must_match_the_sounds(placeholders: int, sounds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lay_out([Text([SOUND] * placeholders)], SOUND, [2] * sounds, TOKENS, 1.0)


@pytest.mark.parametrize("token", [START, THINK, END])
def test_a_thinking_token_in_the_text_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="holds one of the thinking tokens"):
        lay_out([Text([1, token])], SOUND, [], TOKENS, 1.0)


@given(st.lists(st.integers(1, 9), max_size=4), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_positions_point_at_their_tokens(counts: list[int], ratio: float) -> None:
    pieces = [Text([1, *[SOUND] * len(counts)]), Block(range(len(counts))), Text([7], answer=True)]
    laid = lay_out(pieces, SOUND, counts, TOKENS, ratio)
    assert len(laid.ids) == len(laid.labels)
    assert [n for _, n in laid.audio] == counts
    for spans, token in ((laid.audio, SOUND), (laid.think, THINK)):
        covered = [i for first, n in spans for i in range(first, first + n)]
        assert covered == [i for i, found in enumerate(laid.ids) if found == token]


def test_index_of_pads_with_zero() -> None:
    index, counts = index_of([(4, 2), (0, 0), (7, 3)])
    assert index.tolist() == [[4, 5, 0], [0, 0, 0], [7, 8, 9]]
    assert counts.tolist() == [2, 0, 3]


def test_index_of_nothing() -> None:
    index, counts = index_of([])
    assert index.shape == (0, 0)
    assert counts.shape == (0,)


def test_gather_takes_positions_of_rows() -> None:
    states = torch.arange(2 * 5).view(2, 5, 1)
    got = gather(states, torch.tensor([1, 0, 1]), torch.tensor([[0, 4], [2, 3], [1, 1]]))
    assert got[..., 0].tolist() == [[5, 9], [2, 3], [6, 6]]
