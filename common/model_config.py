"""What a checkpoint's config.json says about the model. Torch-free; fields keep their Hugging Face names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from common.errors import CheckpointError
from common.model_json import read_json_object
from common.quantization.description import DESCRIPTION_PATTERN, find_description

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "deepseekv2")
"""`deepseekv2` is what MindIE's converter writes, for V3 and R1 too."""

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
    },
}
"""What DeepSeek's own configuration classes assume where a directory is silent."""

ONLY_VALUES: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False, "rope_interleave": True}
"""Keys that may be absent, and the one value with which this model is computed."""

FP8_BLOCKS: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3"}
"""What quantization_config must say, where it says it, in DeepSeek's official FP8 checkpoints."""

INT8_KEYS = ("quantize", "mla_quantize", "mtp_quantize")
"""What msModelSlim adds to config.json. Which tensors are meant, only the description beside it says."""

DEFAULT_ORIGINAL_POSITIONS = 4096
"""What DeepSeek's modeling code takes for a missing original_max_position_embeddings."""

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class YarnScaling(_Facts):
    """YaRN: how rotary frequencies are stretched beyond the length the model was trained with.

    `mscale` and `mscale_all_dim` are DeepSeek's: their quotient scales cos and sin, the second one scales the
    softmax too. `attention_factor` and `truncate` are known to transformers alone.
    """

    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: FiniteFloat = 1.0
    mscale_all_dim: FiniteFloat = 0.0
    attention_factor: PositiveFloat | None = None
    truncate: bool = True


class ModelConfig(_Facts):
    """A DeepSeek-V2, V2-Lite, V3 or R1 model, as its config.json describes it."""

    model_type: str
    family: Literal["v2", "v3"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    n_routed_experts: PositiveInt
    n_shared_experts: Count | None = None
    num_experts_per_tok: PositiveInt
    first_k_dense_replace: Count = 0
    moe_layer_freq: PositiveInt = 1
    routed_scaling_factor: FiniteFloat = 1.0
    scoring_func: Literal["softmax", "sigmoid"]
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    norm_topk_prob: bool
    n_group: PositiveInt | None = None
    topk_group: PositiveInt | None = None
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    attention_bias: bool = False
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: Count = 0
    dtype: str = "float32"
    weight_block_size: tuple[PositiveInt, PositiveInt] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | tuple[TokenId, ...] | None = None

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read `path`/config.json.

        Raises:
            CheckpointError: the file is missing, is not JSON, describes another model or contradicts itself.
        """
        file = Path(path) / "config.json"
        raw = read_json_object(file)
        try:
            facts = _normalized(raw, file) | {"weight_block_size": _weight_block_size(raw, file)}
            return cls.model_validate(facts)
        except ValidationError as error:
            raise CheckpointError(_sentence(file, error)) from None

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """The layers that have routed experts."""
        return tuple(
            layer_id
            for layer_id in range(self.first_k_dense_replace, self.num_hidden_layers)
            if layer_id % self.moe_layer_freq == 0
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, with and without position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def dtype_name(self) -> str:
        """The dtype the checkpoint says it was saved in: "bfloat16", "float32", "float16"."""
        return self.dtype

    @property
    def num_groups(self) -> int:
        """Groups the routed experts are cut into for choosing; 1 where the gate knows no groups."""
        return 1 if self.topk_method == "greedy" or self.n_group is None else self.n_group

    @property
    def num_kept_groups(self) -> int:
        """Groups a token may choose its experts from."""
        return 1 if self.topk_method == "greedy" or self.topk_group is None else self.topk_group

    def eos_token_ids(self, path: Path) -> tuple[int, ...]:
        """The ids that end an answer: those of `path`/generation_config.json, else those of config.json."""
        file = Path(path) / "generation_config.json"
        value: object = self.eos_token_id
        if file.is_file():
            stated = read_json_object(file).get("eos_token_id")
            value = self.eos_token_id if stated is None else stated
        if value is None:
            return ()
        ids: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
        if any(
            isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 for token_id in ids
        ):
            raise CheckpointError(
                f"{file}: eos_token_id is {value!r}, but it must be a token id or a list of token ids"
            )
        return tuple(dict.fromkeys(ids))

    @model_validator(mode="after")
    def _check_consistency(self) -> ModelConfig:
        """Name the first pair of keys that cannot both be true."""
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}, but it must be even: "
                f"dimensions are rotated in pairs"
            )
        if not self.moe_layer_ids:
            raise ValueError(
                f"first_k_dense_replace is {self.first_k_dense_replace} and moe_layer_freq is "
                f"{self.moe_layer_freq}, "
                f"but one of the {self.num_hidden_layers} layers must have routed experts"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, "
                f"but it must not exceed n_routed_experts, {self.n_routed_experts}"
            )
        if self.topk_method != "greedy":
            self._check_groups()
        return self

    def _check_groups(self) -> None:
        if self.n_group is None or self.topk_group is None:
            raise ValueError(
                f"n_group is {self.n_group} and topk_group is {self.topk_group}, "
                f"but topk_method {self.topk_method} needs both"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_group is {self.n_group}, but it must divide n_routed_experts, {self.n_routed_experts}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group is {self.topk_group}, but it must not exceed n_group, {self.n_group}"
            )
        available = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > available:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but topk_group {self.topk_group} of "
                f"n_group {self.n_group} leaves only {available} experts to choose from"
            )


def _normalized(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Bring both layouts of config.json to one, with the defaults of the model's family."""
    family = _family(raw, file)
    for key, only in ONLY_VALUES.items():
        if raw.get(key) is not None and raw[key] != only:
            raise CheckpointError(f"{file}: {key} is {raw[key]!r}, but only {only!r} is supported")
    # transformers saves null for what it has no value for; to the reader that is the same as absent.
    facts = FAMILY_DEFAULTS[family] | {key: value for key, value in raw.items() if value is not None}
    facts["family"] = family
    facts["dtype"] = _first(raw, "dtype", "torch_dtype", default="float32")
    facts["num_nextn_predict_layers"] = _first(raw, "num_nextn_predict_layers", "num_mtp_layers", default=0)
    if isinstance(facts.get("eos_token_id"), list):
        facts["eos_token_id"] = tuple(facts["eos_token_id"])
    return facts | _rope(raw, file)


def _weight_block_size(raw: dict[str, Any], file: Path) -> object:
    """Read the size of the blocks of an FP8 checkpoint; in a W8A8 one the description says everything."""
    if find_description(file.parent) is not None:
        return None
    for key in INT8_KEYS:
        if raw.get(key):
            raise CheckpointError(
                f"{file}: {key} is {raw[key]!r}, but no {DESCRIPTION_PATTERN} is beside it: copy it from "
                f"where the checkpoint was quantized"
            )
    stated = raw.get("quantization_config") or {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: quantization_config is {stated!r}, but it must be an object")
    if not stated:
        return None
    for key, only in FP8_BLOCKS.items():
        if stated.get(key, only if key != "quant_method" else None) != only:
            raise CheckpointError(
                f"{file}: quantization_config.{key} is {stated.get(key)!r}, but only {only!r} is supported"
            )
    block_size = stated.get("weight_block_size")
    if not isinstance(block_size, list):
        raise CheckpointError(
            f"{file}: quantization_config.weight_block_size is {block_size!r}, but FP8 weights are only "
            f"supported in blocks of [rows, columns]"
        )
    return tuple(block_size)


def _first(raw: dict[str, Any], *keys: str, default: object) -> object:
    return next((raw[key] for key in keys if raw.get(key) is not None), default)


def _family(raw: dict[str, Any], file: Path) -> str:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{file}: model_type is {model_type!r}, but only {', '.join(MODEL_TYPES)} are supported"
        )
    if model_type == "deepseekv2":
        is_v3 = raw.get("topk_method") == "noaux_tc" or "DeepseekV3ForCausalLM" in (
            raw.get("architectures") or ()
        )
        return "v3" if is_v3 else "v2"
    return "v3" if model_type == "deepseek_v3" else "v2"


def _rope(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Read rope_scaling (published checkpoints) or rope_parameters (saved by transformers 5)."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    stated = raw.get(key) or {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: {key} is {stated!r}, but it must be an object or null")
    parameters = {name: value for name, value in stated.items() if value is not None}
    theta = parameters.get("rope_theta", _first(raw, "rope_theta", default=10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise CheckpointError(
            f"{file}: the type in {key} is {kind!r}, but only yarn and default are supported"
        )
    published = key == "rope_scaling"
    length = DEFAULT_ORIGINAL_POSITIONS if published else raw.get("max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": {"original_max_position_embeddings": length} | parameters}


def _sentence(file: Path, error: ValidationError) -> str:
    """Say the first thing that is wrong: file, key, value, rule."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return f"{file}: {first['ctx']['error']}"
    if first["loc"][0] == "eos_token_id":
        return (
            f"{file}: eos_token_id has {first['input']!r}, but it must be a token id or a list of token ids"
        )
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{file}: {key} is missing, but the model needs it"
    rule = first["msg"].replace("Input should be", "but it must be", 1)
    return f"{file}: {key} is {first['input']!r}, {rule}"
