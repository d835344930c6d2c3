"""A chat template that writes the thinking block itself, so that using an exported model needs none of our code.

It takes `audio_think_len`: the thinking positions of the block, L_a of its sounds together, or a list with a number for
each block where the conversation has several. Without it every block has one thinking token, as a sound has one
placeholder, for a server to expand. A conversation without sound has no block.
"""

from __future__ import annotations

from coatkit.backbones.preparer import HFPreparer
from coatkit.data.rows import AUDIO_TAG
from coatkit.thinking import TOKENS

# The stock template is kept whole, as a macro, and asked for the conversation up to each answer, without and with the
# header of the answer: what it adds from one to the next is where a block can stand, whatever the template looks like.
_TEMPLATE = """\
{%% macro _stock(messages, add_generation_prompt) %%}%(stock)s{%% endmacro %%}
{%%- macro _rest(text, start) -%%}
{%%- if not text.startswith(start) -%%}
{{- raise_exception("the chat template rewrites earlier turns, so that no thinking block can be placed") -}}
{%%- endif -%%}
{{- text[start | length:] -}}
{%%- endmacro -%%}
%(flat)s
{%%- set ns = namespace(done="", blocks=0) -%%}
{%%- if audio_think_len is not defined or audio_think_len is none -%%}
{%%- set lengths = none -%%}
{%%- elif audio_think_len is number -%%}
{%%- set lengths = [audio_think_len] -%%}
{%%- elif audio_think_len is string or audio_think_len is not iterable -%%}
{{- raise_exception("audio_think_len must be a whole number, or a list of them") -}}
{%%- else -%%}
{%%- set lengths = audio_think_len -%%}
{%%- endif -%%}
{%%- macro _block() -%%}
{%%- if lengths is not none and ns.blocks >= lengths | length -%%}
{{- raise_exception("audio_think_len has " ~ (lengths | length) ~ " numbers, and the conversation more blocks") -}}
{%%- endif -%%}
{%%- set length = 1 if lengths is none else lengths[ns.blocks] | int -%%}
{%%- if lengths is not none and length != lengths[ns.blocks] -%%}
{{- raise_exception("audio_think_len must be a whole number, or a list of them") -}}
{%%- endif -%%}
{%%- if length < 1 -%%}{{- raise_exception("audio_think_len must be 1 or more") -}}{%%- endif -%%}
{%%- set ns.blocks = ns.blocks + 1 -%%}
{{- "%(start)s" ~ "%(think)s" * length ~ "%(end)s" -}}
{%%- endmacro -%%}
{%%- for i in range(messages | length + 1) -%%}
{%%- set answered = i < messages | length and messages[i]["role"] == "assistant" -%%}
{%%- set opening = i == messages | length and add_generation_prompt -%%}
{%%- if answered or opening -%%}
{%%- set before = _stock(messages[:i], false) if i else "" -%%}
{%%- set header = _stock(messages[:i], true) if i else "" -%%}
{%%- set asked = _rest(before, ns.done) -%%}
{{- asked -}}
%(before_header)s
{{- _rest(header, before) -}}
%(response_prefix)s
{%%- set ns.done = header -%%}
{%%- if answered -%%}
{%%- set full = _stock(messages[:i + 1], false) -%%}
{{- _rest(full, header) -}}
{%%- set ns.done = full -%%}
{%%- endif -%%}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if not add_generation_prompt and messages -%%}
{{- _rest(_stock(messages, false), ns.done) -}}
{%%- endif -%%}
{%%- if lengths is not none and ns.blocks < lengths | length -%%}
{{- raise_exception("audio_think_len has " ~ (lengths | length) ~ " numbers for " ~ ns.blocks ~ " blocks") -}}
{%%- endif -%%}
"""

_BLOCK = '{%%- if "%s" in asked -%%}{{- _block() -}}{%%- endif -%%}'

# For templates that take a message's content as text: a list of parts becomes that text.
_FLAT = """\
{%%- set flat = namespace(messages=[]) -%%}
{%%- for message in messages -%%}
{%%- if message["content"] is string -%%}
{%%- set flat.messages = flat.messages + [message] -%%}
{%%- else -%%}
{%%- set text = namespace(all="") -%%}
{%%- for content in message["content"] -%%}
{%%- if content["type"] == "text" -%%}
{%%- set text.all = text.all ~ content["text"] -%%}
{%%- elif content["type"] in ("audio", "audio_url", "input_audio") -%%}
{%%- set text.all = text.all ~ "%(markup)s" -%%}
{%%- else -%%}
{{- raise_exception("a message has a part of type " ~ content["type"] ~ "; text and audio are understood") -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- set flat.messages = flat.messages + [dict(message, content=text.all)] -%%}
{%%- endif -%%}
{%%- endfor -%%}
{%%- set messages = flat.messages -%%}"""


def thinking_template(preparer: HFPreparer) -> str:
    """The chat template of a preparer's tokenizer, with the thinking block of its settings in it.

    Messages are as the stock template takes them; contents may be texts, with the model's own markup for a sound, or
    lists of parts of type `text` and `audio`. The stock template itself where there is no block.

    Args:
        preparer: Its tokenizer's template must only ever add to a conversation that grows, as training asks too.
    """
    stock: str = preparer.tokenizer.chat_template
    if preparer.thinking is None:
        return stock
    placeholder = preparer.tokenizer.convert_ids_to_tokens(preparer.audio_token)
    places = {"before_header": "", "response_prefix": ""}
    places[preparer.thinking.placement] = _BLOCK % placeholder
    own_parts = not isinstance(preparer.content(AUDIO_TAG), str)
    start, think, end = TOKENS
    return _TEMPLATE % {
        "stock": stock.removesuffix("\n"),  # as the end of a template, it would not be written
        "flat": "" if own_parts else _FLAT % {"markup": preparer.audio_markup},
        "start": start,
        "think": think,
        "end": end,
        **places,
    }
