"""Text to token ids and back, from the checkpoint's tokenizer.json. The pieces of a Detokenizer are together
exactly the decoded whole, whatever tokens a character or a space is spread over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from common.errors import CheckpointError, RequestError

REPLACEMENT = "\ufffd"
# What a tokenizer with byte fallback calls a single byte; a run of them is decoded as a whole.
SINGLE_BYTE = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")


class Tokenizer:
    """The tokenizer of one checkpoint. Without a tokenizer.json it refuses text, and ids have no text."""

    def __init__(self, fast: FastTokenizer | None, settings: dict[str, Any], vocab_size: int) -> None:
        self._fast = fast
        self.vocab_size = vocab_size
        self.bos_token_id = self._find_bos(settings)
        added = {} if fast is None else fast.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token.content: token_id for token_id, token in added.items()}

    @classmethod
    def from_directory(cls, path: Path, vocab_size: int) -> Tokenizer:
        """Read `path`/tokenizer.json and tokenizer_config.json, where they exist.

        Raises:
            CheckpointError: one of them is damaged.
        """
        file, settings_file = Path(path) / "tokenizer.json", Path(path) / "tokenizer_config.json"
        settings: dict[str, Any] = {}
        try:
            if settings_file.is_file():
                settings = json.loads(settings_file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{settings_file} is no JSON file: {error}") from None
        if not isinstance(settings, dict):
            raise CheckpointError(f"{settings_file} holds {type(settings).__name__}, but must hold an object")
        if not file.is_file():
            return cls(None, settings, vocab_size)
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception for every damage
            raise CheckpointError(f"{file} is no tokenizer that can be read: {error}") from None
        fast.no_padding()
        fast.no_truncation()
        return cls(fast, settings, vocab_size)

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer.json."""
        return self._fast is not None

    def encode(self, text: str, field: str = "text", add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids; beginning-of-sequence comes first, once, where the settings say so.

        Raises:
            RequestError: the checkpoint has no tokenizer; `field` is named as the culprit.
        """
        if self._fast is None:
            raise self._no_tokenizer(field)
        ids: list[int] = self._fast.encode(
            text, add_special_tokens=add_special_tokens and self._own_specials
        ).ids
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def added_id(self, content: str) -> int | None:
        """The id of a token that stands beside the vocabulary of text, such as those of conversations."""
        return self._added.get(content)

    def encode_verbatim(self, text: str, field: str) -> list[int]:
        """Turn text into ids of ordinary tokens alone: what is spelled like a special token stays text.

        Raises:
            RequestError: the checkpoint has no tokenizer; `field` is named as the culprit.
        """
        if self._verbatim is None:
            raise self._no_tokenizer(field)
        ids: list[int] = self._verbatim.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _verbatim(self) -> FastTokenizer | None:
        """The same tokenizer without any added token, made when the first conversation comes.

        encode_special_tokens would not do: DeepSeek's <User> and <Assistant> are added, but not special.
        """
        if self._fast is None:
            return None
        return FastTokenizer.from_str(json.dumps(json.loads(self._fast.to_str()) | {"added_tokens": []}))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text. An id without an entry in tokenizer.json has no text."""
        return self._text(self.visible(token_ids, skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def visible(self, token_ids: Iterable[int], skip_special_tokens: bool) -> list[int]:
        """The ids that have text."""
        if self._fast is None:
            return []
        hidden = self._special if skip_special_tokens else frozenset()
        return [
            token for token in token_ids if token not in hidden and self._fast.id_to_token(token) is not None
        ]

    def is_single_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a byte-fallback run, whose text depends on the whole run."""
        token = None if self._fast is None else self._fast.id_to_token(token_id)
        return token is not None and SINGLE_BYTE.match(token) is not None

    @staticmethod
    def _no_tokenizer(field: str) -> RequestError:
        return RequestError(
            field, f"{field} is set, but the checkpoint has no tokenizer.json: send token_ids instead"
        )

    def _text(self, visible: Sequence[int]) -> str:
        if self._fast is None or not visible:
            return ""
        text: str = self._fast.decode(list(visible), skip_special_tokens=False)
        return text

    def _find_bos(self, settings: dict[str, Any]) -> int | None:
        """The token that add_bos_token puts first. Unset: the tokenizer's own post-processor decides."""
        wanted = settings.get("add_bos_token")
        self._own_specials = wanted is None
        if wanted is not True or self._fast is None:
            return None
        stated = settings.get("bos_token")
        content = stated.get("content") if isinstance(stated, dict) else stated
        bos = self._fast.token_to_id(content) if isinstance(content, str) else None
        if bos is None:
            raise CheckpointError(
                f"tokenizer_config.json sets add_bos_token, but its bos_token {content!r} "
                "is not in tokenizer.json"
            )
        return bos


class Detokenizer:
    """Turns the tokens of one answer into text as they come. What may still change is held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Decoders treat the first token of a text specially: what came before goes along.
        self._before: list[int] = []
        self._pending: list[int] = []
        self._num_sent = 0

    def add(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is certain now."""
        self._pending += self._tokenizer.visible(token_ids, self._skip_special_tokens)
        if not self._pending or self._tokenizer.is_single_byte(self._pending[-1]):
            return ""
        text = self._pending_text()
        # A trailing replacement character may be a character whose last bytes are still to come.
        certain = text.rstrip(REPLACEMENT)
        piece = certain[self._num_sent :]
        self._num_sent += len(piece)
        if len(certain) == len(text):
            self._before, self._pending, self._num_sent = self._pending, [], 0
        return piece

    def finish(self) -> str:
        """Return what was held back; the answer is complete."""
        return self._pending_text()[self._num_sent :]

    def _pending_text(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._before, skip_special_tokens=False)
        return decode(self._before + self._pending, skip_special_tokens=False)[len(before) :]
