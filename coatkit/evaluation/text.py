"""Texts made comparable before they are scored."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from coatkit.errors import PluginError

_GIGASPEECH = re.compile(r"<(?:COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT|SIL|MUSIC|NOISE|OTHER)>", re.IGNORECASE)


def plain(text: str) -> str:
    """Lower case, without ASCII punctuation, runs of white space made one space."""
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())


def without_tags(text: str) -> str:
    """A transcript without GigaSpeech's tags for punctuation (`<COMMA>`) and for what is no speech (`<MUSIC>`)."""
    return _GIGASPEECH.sub(" ", text)


@cache
def whisper_normalizer(language: str) -> Callable[[str], str]:
    """Whisper's own text normaliser: the English one for `en`, else the basic one.

    Raises:
        PluginError: If whisper-normalizer is not installed.
    """
    if language == "en":
        made = library("whisper_normalizer.english").EnglishTextNormalizer()
    else:
        made = library("whisper_normalizer.basic").BasicTextNormalizer()
    normalize: Callable[[str], str] = lambda text: str(made(without_tags(text))).strip()  # noqa: E731
    return normalize


def library(name: str, extra: str = "analysis") -> Any:
    """A library that only evaluation needs.

    Args:
        extra: The extra of coatkit that brings it.

    Raises:
        PluginError: If it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise PluginError(f"this needs {package} ({error}): pip install 'coatkit[{extra}]'") from None
