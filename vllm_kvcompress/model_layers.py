"""The attention layers of a model, as its transformers config tells of them.

Nothing of vLLM or transformers is imported: configs are only asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.config import KVCompressConfigError

FULL, WINDOWED, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# As vLLM asks for them, in this order.
_KV_HEAD_KEYS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind that have a KV cache of their own, on one tensor-parallel rank.

    Attributes:
        num_layers: how many; 0 if the model has none.
        num_kv_heads, head_size: of each.
        num_queries_per_kv: query heads of each KV head.
    """

    num_layers: int = 0
    num_kv_heads: int = 0
    head_size: int = 0
    num_queries_per_kv: int = 0

    @property
    def token_elements(self) -> int:
        """Numbers in one token's keys of one layer; its values have as many."""
        return self.num_kv_heads * self.head_size


@dataclass(frozen=True)
class ModelLayers:
    """Layers with a KV cache of their own, on one tensor-parallel rank.

    Attributes:
        full: those with full attention.
        windowed: those with a sliding window, in a model that has both.
        num_sharing: layers without a cache, which read that of an earlier one.
    """

    full: LayerKind
    windowed: LayerKind
    num_sharing: int

    @property
    def windowed_per_block(self) -> int:
        """Most windowed layers that share blocks: as many as fit what the full ones need."""
        if not self.windowed.num_layers:
            return 0
        full_elements = self.full.num_layers * self.full.token_elements
        return max(1, full_elements // self.windowed.token_elements)

    def check_groups(self) -> None:
        """Refuse how vLLM would group these layers over one pool of blocks.

        Where all need as much memory per token, groups have as many layers as the rarer kind, or as
        the other if that has less than half more. Else full-attention layers are one group.

        Raises:
            KVCompressConfigError: if full-attention layers are not one group, or it is padded.
        """
        num_full, num_windowed = self.full.num_layers, self.windowed.num_layers
        if not num_windowed:
            return
        fewest, most = sorted((num_full, num_windowed))
        group_size = most if 2 * most < 3 * fewest else fewest
        if self.full.token_elements != self.windowed.token_elements:
            is_padded = self.windowed.token_elements > num_full * self.full.token_elements
            group_size = num_full + is_padded
        if num_full != group_size:
            how = "several groups" if num_full > group_size else "a group that it pads"
            raise KVCompressConfigError(
                "KV compression does not support models whose layers with full attention vLLM "
                f"puts into {how}: {num_full} of them beside {num_windowed} with a sliding window"
            )


def read_layers(text_config: Any, num_ranks: int = 1, is_sharing: bool = True) -> ModelLayers:
    """The attention layers of a model.

    Args:
        text_config: transformers' config of the language model.
        num_ranks: tensor-parallel ranks that the KV heads are split over, or copied to if they are
            fewer.
        is_sharing: whether layers share caches where the config says so.

    Raises:
        KVCompressConfigError: if the config does not say how many there are, they cannot be split,
            or heads of layers of the same kind differ.
    """
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if not num_layers:
        raise KVCompressConfigError("the model's config does not say how many layers there are")
    num_sharing = (getattr(text_config, "num_kv_shared_layers", None) or 0) if is_sharing else 0
    own = range(num_layers - num_sharing)
    windowed: list[int] = []
    if all(mixed_layers(text_config)):
        windowed = [i for i in own if text_config.layer_types[i] == WINDOWED]
    full = [i for i in own if i not in windowed]
    return ModelLayers(
        full=_kind(text_config, full, num_ranks),
        windowed=_kind(text_config, windowed, num_ranks),
        num_sharing=num_sharing,
    )


def mixed_layers(text_config: Any) -> tuple[int, int]:
    """Layers with full attention and with a window, in a model that has both; else 0, 0."""
    layer_types = list(getattr(text_config, "layer_types", None) or ())
    counts = layer_types.count(FULL), layer_types.count(WINDOWED)
    has_window = getattr(text_config, "sliding_window", None) is not None
    return counts if has_window and all(counts) else (0, 0)


def has_alibi(text_config: Any) -> bool:
    """Whether attention is biased by distance, which needs every key's position in the cache."""
    attention = getattr(text_config, "attn_config", None)
    return bool(
        text_config.model_type == "bloom"
        or getattr(text_config, "alibi", False)
        or getattr(attention, "alibi", False)
    )


def has_quantized_cache(config: Any) -> bool:
    """Whether the checkpoint asks for a quantized KV cache."""
    quantization = getattr(config, "quantization_config", None) or {}
    return isinstance(quantization, dict) and bool(quantization.get("kv_cache_scheme"))


def _kind(text_config: Any, layers: list[int], num_ranks: int) -> LayerKind:
    """Layers of some indices, which must be alike."""
    is_per_layer = getattr(text_config, "is_heterogeneous", False)
    configs = [text_config.per_layer_config[i] if is_per_layer else text_config for i in layers]
    heads = {_heads(config, num_ranks) for config in configs[: None if is_per_layer else 1]}
    if len(heads) > 1:
        found = ", ".join(f"{count} of size {size}" for count, size, _ in sorted(heads))
        raise KVCompressConfigError(
            f"KV compression needs the same KV heads in every layer of a kind; found {found}"
        )
    return LayerKind(len(layers), *heads.pop()) if heads else LayerKind()


def _heads(config: Any, num_ranks: int) -> tuple[int, int, int]:
    """KV heads, their size, and query heads for each."""
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_kv_heads = _local_kv_heads(num_heads, _num_kv_heads(config), num_ranks)
    return num_kv_heads, head_size, num_heads // num_ranks // num_kv_heads


def _num_kv_heads(config: Any) -> int:
    is_falcon = config.model_type == "falcon"
    if is_falcon and config.multi_query and not config.new_decoder_architecture:
        # Its num_kv_heads is then not in use.
        return 1
    attention = getattr(config, "attn_config", None)
    found = [getattr(config, key, None) for key in _KV_HEAD_KEYS]
    found.append(getattr(attention, "kv_n_heads", None))
    return next(filter(None, found), config.num_attention_heads)


def _local_kv_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> int:
    if num_heads % num_ranks:
        raise KVCompressConfigError(
            f"{num_heads} attention heads cannot be split over {num_ranks} ranks"
        )
    if max(num_kv_heads, num_ranks) % min(num_kv_heads, num_ranks):
        raise KVCompressConfigError(
            f"{num_kv_heads} KV heads cannot be split over {num_ranks} ranks"
        )
    return max(1, num_kv_heads // num_ranks)
