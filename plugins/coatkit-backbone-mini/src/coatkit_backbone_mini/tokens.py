"""The tokenizer's special tokens and chat template, the same for real and for tiny weights."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SOUND = "<sound>"
THINK_START = "<|audio_think_start|>"
THINK = "<|audio_think|>"
THINK_END = "<|audio_think_end|>"
ADDED = (SOUND, THINK_START, THINK, THINK_END)
"""Tokens neither model brings: the audio placeholder of Audio Flamingo 3, and those of a thinking block, in order."""

# SmolLM2's template (ChatML and its default system prompt). A content is a string, or a list of parts as processors
# and servers pass them, where a part of type `audio` stands for its placeholder.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ '<sound>' }}{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give SmolLM2's tokenizer (or one made like it) the added tokens, roles of its own tokens, and the template.

    The added tokens get the next free ids, one after the other.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED], special_tokens=True)
    tokenizer.bos_token = TURN_START
    tokenizer.eos_token = TURN_END
    tokenizer.pad_token = PAD
    tokenizer.unk_token = PAD
    tokenizer.chat_template = CHAT_TEMPLATE
