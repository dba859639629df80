"""Messages of int8 rows at ep_level 2 by the native kernels: each end's part of a layer in one call.

The bits are those of the kernels that are called one after another, in common/native/row_messages.cpp.
Shapes: T tokens, K experts per token, D hidden_size, W workers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common import compute_threads
from common.exchange import wire
from common.exchange.routing import LayerTable
from common.native_int8 import JoinedExperts
from common.native_library import PATHS, best_path, open_library

_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_HeaderWords = _SIZE * wire.HEADER_WORDS


class _SentLayer(ctypes.Structure):
    """SentLayer of the C++ file."""

    _fields_ = (
        *((name, _POINTER) for name in ("first_keys", "num_local")),
        *((name, _SIZE) for name in ("experts", "workers", "most_local", "top_k", "hidden_size")),
    )


class _HeldLayer(ctypes.Structure):
    """HeldLayer of the C++ file."""

    _fields_ = (("weights", _POINTER), ("experts", _SIZE))


class _Answers(ctypes.Structure):
    """Answers of the C++ file."""

    _fields_ = (
        *(("layers", _POINTER), ("num_layers", _SIZE), ("hidden_size", _SIZE), ("progress", _POINTER)),
        ("step", _HeaderWords),
    )


class RowWriter:
    """Writes the messages that bring the rows of a few tokens to the workers of a placement."""

    def __init__(
        self, tables: Mapping[int, LayerTable], num_experts_per_tok: int, hidden_size: int, num_workers: int
    ) -> None:
        """Know where the experts are: `tables` by layer_id. Raises ConfigError without the kernels."""
        library = open_library()
        self._write = library.rows_write
        self._write.argtypes = [
            *(_NUMBER, _NUMBER, _NUMBER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE),
            *[_POINTER] * 4,
        ]
        self._path = PATHS.index(best_path(library))
        self._tables = dict(tables)
        self._num_local = {one: (_SIZE * num_workers)(*table.num_local) for one, table in tables.items()}
        self._layers = {
            layer_id: _SentLayer(
                *(table.first_keys.data_ptr(), ctypes.addressof(self._num_local[layer_id])),
                *(len(table.first_keys), num_workers, table.most_local, num_experts_per_tok, hidden_size),
            )
            for layer_id, table in tables.items()
        }
        self._headers = (_HeaderWords * num_workers)()
        self._memory = (_POINTER * num_workers)()
        self._ends = (_SIZE * num_workers)()

    def begin(self, headers: Sequence[wire.Header]) -> None:
        """Take what is the same in all messages of a step to each worker."""
        words = b"".join(map(wire.packed, headers))
        ctypes.memmove(self._headers, words, len(words))

    def write(
        self,
        layer_id: int,
        micro_batch: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        memory: Sequence[Tensor],
    ) -> tuple[list[int], Tensor] | None:
        """Quantise the tokens [T, D] and write their rows for the chosen experts [T, K], with headers.

        Args:
            layer_id: of the experts.
            micro_batch: of the step.
            hidden_states: float32 or bfloat16 without gaps.
            topk_ids: int64 without gaps.
            memory: of each worker, with room for a message of all T * K rows.

        Returns:
            One past the last row of each worker, which gets no message where it has no rows, and the row of
            each slot [T, K]; None where an expert was chosen that no worker holds.
        """
        self._memory[:] = [one.data_ptr() for one in memory]
        position_of = torch.empty(topk_ids.shape, dtype=torch.int64)
        failure = self._write(
            *(self._path, compute_threads.count(), hidden_states.dtype is torch.bfloat16),
            *(ctypes.addressof(self._layers[layer_id]), layer_id, micro_batch, hidden_states.data_ptr()),
            *(topk_ids.data_ptr(), hidden_states.shape[0], self._headers, self._memory, self._ends),
            position_of.data_ptr(),
        )
        if failure == 1:
            raise MemoryError(f"no memory to send the rows of {hidden_states.shape[0]} tokens")
        return None if failure else (list(self._ends), position_of)


class RowAnswers:
    """Answers messages of rows from their receipt to their reply, for experts that one call runs."""

    def __init__(
        self, layers: Mapping[int, JoinedExperts], dtype: torch.dtype, hidden_size: int, progress: int
    ) -> None:
        """Raises ConfigError where the kernels were not built.

        Args:
            layers: the experts here, by layer_id; rows for others are not answered.
            dtype: of the rows that go home, float32 or bfloat16.
            hidden_size: D.
            progress: address of a 64-bit counter; it moves on before and after each computation.
        """
        library = open_library()
        self._count, self._answer = library.rows_count, library.rows_answer
        self._count.argtypes, self._count.restype = [_POINTER, _POINTER, _SIZE], _SIZE
        self._answer.argtypes = [*[_NUMBER] * 3, _POINTER, _POINTER, *[_SIZE] * 3, _POINTER]
        self._path = PATHS.index(best_path(library))
        self._is_bfloat16 = dtype is torch.bfloat16
        self._joined = dict(layers)
        self._layers = (_HeldLayer * (max(layers, default=-1) + 1))()
        for layer_id, joined in layers.items():
            self._layers[layer_id] = _HeldLayer(ctypes.addressof(joined.weights), joined.num_experts)
        self._answers = _Answers(
            ctypes.addressof(self._layers), len(self._layers), hidden_size, progress, _HeaderWords()
        )
        self._address = ctypes.addressof(self._answers)

    def begin(self, header: wire.Header) -> None:
        """Take the header of a step: from here on its rows are answered, and no others."""
        ctypes.memmove(self._answers.step, wire.packed(header), wire.HEADER_BYTES)

    def num_rows(self, message: Tensor) -> int | None:
        """How many rows a message has that `answer` takes; None where it is another, or not as it must be."""
        found: int = self._count(self._address, message.data_ptr(), message.numel())
        return None if found < 0 else found

    def answer(self, message: Tensor, num_rows: int, received_ns: int, reply: Tensor) -> bool:
        """Run the rows of a message through their experts, and write the whole reply.

        Args:
            message: `num_rows` has let it pass.
            num_rows: what that found.
            received_ns: when it came.
            reply: memory of a header and as many rows.

        Returns:
            Whether rows per expert sum to the rows, and the message is still what it was.

        Raises:
            MemoryError: there is no memory to compute them.
        """
        failure = self._answer(
            *(self._path, compute_threads.count(), self._is_bfloat16, self._address, message.data_ptr()),
            *(message.numel(), num_rows, received_ns, reply.data_ptr()),
        )
        if failure == 1:
            raise MemoryError("no memory to run rows through their experts: send fewer at once")
        return not failure
