"""The shape of a conversation: DeepSeek's, with special tokens around what the user and the assistant say."""

from __future__ import annotations

from collections.abc import Iterable

BOS = "<｜begin▁of▁sentence｜>"  # noqa: RUF001
EOS = "<｜end▁of▁sentence｜>"  # noqa: RUF001
PAD = "<｜▁pad▁｜>"  # noqa: RUF001
USER = "<｜User｜>"  # noqa: RUF001
ASSISTANT = "<｜Assistant｜>"  # noqa: RUF001
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)
"""In the order of their token ids, from 0."""
BOS_ID, EOS_ID = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{{{{ '{USER}' + message['content'] }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)

Segment = tuple[str, bool]
"""A piece of text, and whether the model learns to say it."""


def chat(turns: Iterable[tuple[str, str]], system: str = "") -> list[Segment]:
    """Return a conversation; the model learns the assistant's part, and to stop after it."""
    segments: list[Segment] = [(BOS + system, False)]
    for question, answer in turns:
        segments += [(f"{USER}{question}{ASSISTANT}", False), (f"{answer}{EOS}", True)]
    return segments


def plain(turns: Iterable[tuple[str, str]]) -> list[Segment]:
    """Return questions and answers without special tokens between them."""
    segments: list[Segment] = [(BOS, False)]
    for question, answer in turns:
        separator = "\n" if len(segments) > 1 else ""
        segments += [(f"{separator}Question: {question} Answer:", False), (f" {answer}", True)]
    return [*segments, (EOS, True)]


def prompt(question: str) -> str:
    """Return what the tokenizer is given for a question, but for the beginning of sentence, which it adds."""
    return f"{USER}{question}{ASSISTANT}"
