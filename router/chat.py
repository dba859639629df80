"""A conversation as a prompt: DeepSeek's chat template in code. A checkpoint's own, a program, is not run.

    bos [system] (User content Assistant content eos)* User content Assistant

What is written in a message never becomes one of the special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.errors import RequestError
from router.tokenizer import Tokenizer

FIELD = "chat.messages"
SYSTEM = "system"
TURNS = ("user", "assistant")
"""Whose turn it is, again and again, after the system text."""

BOS = "<｜begin▁of▁sentence｜>"  # noqa: RUF001
EOS = "<｜end▁of▁sentence｜>"  # noqa: RUF001
USER = "<｜User｜>"  # noqa: RUF001
ASSISTANT = "<｜Assistant｜>"  # noqa: RUF001


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


def encode_conversation(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Turn a conversation into the ids of a prompt whose continuation is the assistant's next turn.

    Raises:
        RequestError: no conversation, or a model without its special tokens; names the field.
    """
    check_conversation(messages)
    bos, eos, user, assistant = (_special_id(tokenizer, content) for content in (BOS, EOS, USER, ASSISTANT))
    ids = [bos]
    for index, message in enumerate(messages):
        content = tokenizer.encode_verbatim(message.content, _field(index, "content"))
        match message.role:
            case "user":
                ids += [user, *content]
            case "assistant":
                ids += [assistant, *content, eos]
            case _:
                ids += content
    return [*ids, assistant]


def check_conversation(messages: Sequence[Message]) -> None:
    """Check that user and assistant take turns, and that it is the assistant's turn next.

    Raises:
        RequestError: naming the first message that is wrong, and what should be there.
    """
    if not messages:
        raise RequestError(FIELD, "the conversation has no messages: it needs at least one of the user")
    has_system = messages[0].role == SYSTEM
    for index, message in enumerate(messages):
        _check_role(index, message.role, has_system)
        # An answer may be empty: the model may have ended it at once.
        if not message.content and message.role != "assistant":
            raise RequestError(
                _field(index, "content"), f"message {index}, of the {message.role}, is empty: say something"
            )
    if messages[-1].role != "user":
        raise RequestError(
            _field(len(messages) - 1, "role"),
            f"the last message is of the {messages[-1].role}, but must be of the user: the model answers it",
        )


def _check_role(index: int, role: str, has_system: bool) -> None:
    if role not in {SYSTEM, *TURNS}:
        raise RequestError(
            _field(index, "role"),
            f"the role of message {index} is {role!r}, but must be system, user or assistant",
        )
    if role == SYSTEM:
        if index:
            raise RequestError(
                _field(index, "role"), f"message {index} is a system message, but only the first may be one"
            )
        return
    expected = TURNS[(index - has_system) % 2]
    if role != expected:
        raise RequestError(
            _field(index, "role"),
            f"message {index} is of the {role}, but must be of the {expected}: user and assistant take turns "
            "from the user on",
        )


def _special_id(tokenizer: Tokenizer, content: str) -> int:
    token_id = tokenizer.added_id(content)
    if token_id is None:
        raise RequestError(
            "chat",
            f"chat is set, but the model's tokenizer has no token {content}: send text or token_ids instead",
        )
    return token_id


def _field(index: int, name: str) -> str:
    return f"{FIELD}[{index}].{name}"
