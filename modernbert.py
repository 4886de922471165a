"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): BERT with what was learned since.

LayerNorm stands before attention and feed-forward, and once behind the last layer; nothing has biases; positions are
rotations of queries and keys (Su et al. 2021, arXiv 2104.09864); the feed-forward is a GeGLU (Shazeer 2020, arXiv
2002.05202); of three layers one attends to the whole row, and the others to a window around each token.

Shape letters: N packed tokens, B rows, D hidden, I intermediate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

from torch import Tensor, nn

import ops
from bert import BertConfig, CheckpointError, Encoder
from messages import shown
from ops import DropoutMasks, Linear, PackedTokens, Packing


@dataclass(frozen=True)
class ModernBertConfig(BertConfig):
    """The fields of a Hugging Face ModernBERT config.json.

    local_attention: tokens of a window. global_attn_every_n_layers: the first layer of each so many attends to the
    whole row. global_rope_theta, local_rope_theta: by which rotations slow down from one pair of numbers to the next.
    """

    model_type: ClassVar[str] = "modernbert"
    architecture: ClassVar[str] = "ModernBertModel"
    prefix: ClassVar[str] = "model"
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "hidden_act": "hidden_activation",
            "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "mlp_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "type_vocab_size": "",
        }
    )

    vocab_size: int = 50368
    num_hidden_layers: int = 22
    intermediate_size: int = 1152
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    embedding_dropout: float = 0.0
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    local_attention: int = 128
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    pad_token_id: int = 50283

    def make_encoder(self) -> "ModernBert":
        return ModernBert(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Also of the form that transformers 5 writes, with a type for each layer and rotations by type."""
        for name in ("norm_bias", "attention_bias", "mlp_bias"):
            if values.get(name):
                raise CheckpointError(f"{where}: {name} is {shown(repr(values[name]))}, expected False")
        values = dict(values)
        kinds = values.get("layer_types") or []
        places = [place for place, kind in enumerate(kinds) if kind == "full_attention"]
        every = places[1] if len(places) > 1 else max(1, len(kinds))
        if kinds and kinds != [cls._kind(place, every) for place in range(len(kinds))]:
            raise CheckpointError(
                f"{where}: layer_types is {shown(kinds)}, expected full_attention in every n-th from the first"
            )
        if kinds:
            values["global_attn_every_n_layers"] = every
        for kind, name in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
            rotation = (values.get("rope_parameters") or {}).get(kind) or {}
            if rotation.get("rope_type", "default") != "default":
                raise CheckpointError(f"{where}: rope_type is {shown(repr(rotation['rope_type']))}, expected 'default'")
            values[name] = rotation.get("rope_theta", values.get(name, getattr(cls, name)))
        return super().from_dict(values, where)

    @staticmethod
    def _kind(layer: int, every: int) -> str:
        return "sliding_attention" if layer % every else "full_attention"


class ModernBertLayer(nn.Module):
    """Self-attention and feed-forward, each of them LayerNorm, what it does, dropout and residual sum.

    The matrices of query, key and value stand in one (3 D, D) matrix, those of value and gate in one (2 I, D).
    """

    def __init__(self, config: ModernBertConfig, number: int) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        is_global = number % config.global_attn_every_n_layers == 0
        self.reach = None if is_global else config.local_attention // 2  # tokens to each side
        self.theta = config.global_rope_theta if is_global else config.local_rope_theta
        has_norm = number > 0  # the embeddings have had theirs
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps, bias=False) if has_norm else None
        self.qkv = Linear(size, 3 * size, bias=False)
        self.attention_output = Linear(size, size, bias=False)
        self.mlp_norm = nn.LayerNorm(size, eps=config.layer_norm_eps, bias=False)
        self.intermediate = Linear(size, 2 * config.intermediate_size, bias=False)
        self.output = Linear(config.intermediate_size, size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        packing: Packing,
        masks: DropoutMasks | None,
        task_term: Tensor | None = None,
        first_tokens: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (N, D) -> (N, D), or -> (B, D) where first_tokens (B,) are the only ones that are wanted.

        task_term: (N, D), enters at the last residual sum.
        """
        config, attention_prob = self.config, self.config.attention_probs_dropout_prob
        normalized = hidden_states
        if self.attention_norm is not None:
            normalized = ops.layer_norm(hidden_states, self.attention_norm)
        qkv = ops.rotated(self.qkv(normalized), packing, config.num_attention_heads, self.theta)  # (N, D) -> (N, 3 D)
        context = ops.attention(qkv, packing, config.num_attention_heads, attention_prob, masks, self.reach)  # (N, D)
        if first_tokens is not None:
            context, hidden_states = context.index_select(0, first_tokens), hidden_states.index_select(0, first_tokens)
            task_term = None if task_term is None else task_term.index_select(0, first_tokens)  # (N, D) -> (B, D)
        attended = hidden_states + ops.dropout(self.attention_output(context), attention_prob, masks)
        normalized = ops.layer_norm(attended, self.mlp_norm)
        activated = ops.gated_linear(normalized, self.intermediate, config.hidden_act)  # (N, D) -> (N, I)
        update: Tensor = self.output(ops.dropout(activated, config.hidden_dropout_prob, masks))  # (N, I) -> (N, D)
        return attended + (update if task_term is None else update + task_term)


class ModernBert(Encoder):
    """The encoder. The checkpoints have no pooler: it is new, as BERT's is."""

    can_be_recorded = False  # windows that are shorter than a row are looked up on the host

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.embedding_norm = nn.LayerNorm(size, eps=config.layer_norm_eps, bias=False)
        self.layers = nn.ModuleList(ModernBertLayer(config, number) for number in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(size, eps=config.layer_norm_eps, bias=False)
        self.pooler = Linear(size, size)
        self.embedding_dropout = config.embedding_dropout

    def embed(self, tokens: PackedTokens, masks: DropoutMasks | None, perturbation: Tensor | None) -> Tensor:
        """Words, the perturbation, LayerNorm, dropout."""
        embeddings = ops.embedding(tokens.input_ids, self.word_embeddings.weight)  # (N,) -> (N, D)
        if perturbation is not None:
            embeddings = embeddings + perturbation
        return ops.dropout(ops.layer_norm(embeddings, self.embedding_norm), self.embedding_dropout, masks)

    def states(self, *arguments: Any, **more: Any) -> Iterator[Tensor]:
        """As `Encoder.states`, with a LayerNorm behind the last layer."""
        for number, hidden_states in enumerate(super().states(*arguments, **more)):
            is_last = number == self.config.num_hidden_layers
            yield ops.layer_norm(hidden_states, self.final_norm) if is_last else hidden_states


def huggingface_names(name: str) -> list[str]:
    """The Hugging Face name of a parameter of `ModernBert`."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return [name]


_NAMES = {
    "word_embeddings.": "embeddings.tok_embeddings.",
    "embedding_norm.": "embeddings.norm.",
    "pooler.": "pooler.dense.",
    ".attention_norm.": ".attn_norm.",
    ".qkv.": ".attn.Wqkv.",
    ".attention_output.": ".attn.Wo.",
    ".intermediate.": ".mlp.Wi.",
    ".output.": ".mlp.Wo.",
}
