"""The weights of a layer up to its experts, as a device takes them that runs all of it at once.

Shapes: D hidden_size, H heads, C kv_lora_rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from common.int8_reference import PackedInt8


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weights up to its experts, all of attention's linears but kv_b_proj in W8A8_DYNAMIC.

    Attributes:
        input_norm: [D].
        q_a: q_a_proj and the weight of its norm, or None where queries are projected at once.
        q: q_proj or q_b_proj.
        kv_a: kv_a_proj_with_mqa.
        kv_a_norm: [C], and the bias [C] that follows it, or None.
        kv_b: [H * (nope + v), C].
        o: o_proj.
        post_norm: [D].
        gate: [E, D] float32 and e_score_correction_bias [E], or None where the layer has no experts.
        latent_eps: of the norms inside attention; the others have the config's.
        scale: what attention scores are multiplied with.
    """

    input_norm: Tensor
    q_a: tuple[PackedInt8, Tensor] | None
    q: PackedInt8
    kv_a: PackedInt8
    kv_a_norm: tuple[Tensor, Tensor | None]
    kv_b: Tensor
    o: PackedInt8
    post_norm: Tensor
    gate: tuple[Tensor, Tensor | None] | None
    latent_eps: float
    scale: float

    @property
    def packed(self) -> Sequence[PackedInt8]:
        """The linears in int8."""
        return (self.q, self.kv_a, self.o) if self.q_a is None else (self.q_a[0], self.q, self.kv_a, self.o)

    @property
    def floats(self) -> Sequence[Tensor]:
        """The weights in the model's dtype."""
        norms = (self.input_norm, self.post_norm, *(one for one in self.kv_a_norm if one is not None))
        return (*norms, self.kv_b) if self.q_a is None else (*norms, self.kv_b, self.q_a[1])
