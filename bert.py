"""BERT (Devlin et al. 2019, arXiv 1810.04805) on packed tokens.

The rows of a batch stand one behind the other, without padding: every dense layer, LayerNorm and dropout works on the
tokens that are there, and attention alone needs to know where a row ends.

Shape letters: N packed tokens, B rows, D hidden, I intermediate.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ops
from messages import shown
from ops import DropoutMasks, Linear, PackedTokens, Packing


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class BertConfig:
    """The fields of a Hugging Face BERT config.json that shape the computation. Variants derive from it.

    model_type: in config.json. architecture: transformers' class; prefix: of its tensors in a model with a head.
    renamed: fields that config.json has under another name, or, where that is empty, does not have.
    """

    model_type: ClassVar[str] = "bert"
    architecture: ClassVar[str] = "BertModel"
    prefix: ClassVar[str] = "bert"
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for item in fields(self):
            value, most = getattr(self, item.name), 1000 if item.name.startswith("num_") else 10**7
            if item.type is int and (type(value) is not int or not 1 <= value <= most):
                raise CheckpointError(f"{item.name} is {shown(repr(value))}, expected a whole number from 1 to {most}")
            if item.type is float and (type(value) not in (int, float) or not 0 <= value < float("inf")):
                raise CheckpointError(f"{item.name} is {shown(repr(value))}, expected a number of at least 0")
            if item.name.endswith("_prob") and value >= 1:
                raise CheckpointError(f"{item.name} is {shown(repr(value))}, expected a probability below 1")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ops.ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act is {shown(repr(self.hidden_act))}, expected one of {', '.join(ops.ACTIVATIONS)}"
            )

    @property
    def num_positions(self) -> int:
        """Tokens of a row at most."""
        return self.max_position_embeddings

    def make_encoder(self) -> "Encoder":
        return Bert(self)

    @classmethod
    def _names(cls) -> dict[str, str]:
        """Of each field that config.json has its name there."""
        names = {item.name: cls.renamed.get(item.name, item.name) for item in fields(cls)}
        return {name: there for name, there in names.items() if there}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """The configuration in a parsed config.json. Raises CheckpointError if it is not that of such an encoder."""
        for name, expected in (("model_type", cls.model_type), ("position_embedding_type", "absolute")):
            if values.get(name, expected) != expected:
                raise CheckpointError(f"{where}: {name} is {shown(repr(values[name]))}, expected {expected!r}")
        try:
            return cls(**{name: values[there] for name, there in cls._names().items() if there in values})
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers writes them."""
        values = {there: getattr(self, name) for name, there in self._names().items()}
        return {"model_type": self.model_type, "architectures": [self.architecture], "pad_token_id": 0, **values}


class LayerAdapter(Protocol):
    """A task's addition to every encoder layer, such as a projected attention layer (pal.py)."""

    def __call__(
        self, layer: int, hidden_states: Tensor, packing: Packing, masks: DropoutMasks | None
    ) -> Tensor | None:
        """(N, D) term for the layer's final LayerNorm from the layer's input (N, D), or None for no term."""
        ...


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual sum and LayerNorm.

    The matrices of query, key and value stand in one (3 D, D) matrix.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.qkv = Linear(size, 3 * size)
        self.attention_output = Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.intermediate = Linear(size, config.intermediate_size)
        self.output = Linear(config.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, eps=eps)

    def forward(
        self,
        hidden_states: Tensor,
        packing: Packing,
        masks: DropoutMasks | None,
        task_term: Tensor | None = None,
        first_tokens: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (N, D) -> (N, D), or -> (B, D) where first_tokens (B,) are the only ones that are wanted.

        task_term: (N, D), enters at the final LayerNorm.
        """
        config, num_heads, prob = self.config, self.config.num_attention_heads, self.config.hidden_dropout_prob
        attention_prob = config.attention_probs_dropout_prob
        if first_tokens is None:
            qkv = self.qkv(hidden_states)  # (N, D) -> (N, 3 D)
            context = ops.attention(qkv, packing, num_heads, attention_prob, masks)  # (N, D)
        else:
            query, key_value = self._queries_of(first_tokens, hidden_states)  # (B, D), (N, 2 D)
            context = ops.first_token_attention(query, key_value, packing, num_heads, attention_prob, masks)  # (B, D)
            hidden_states = hidden_states.index_select(0, first_tokens)  # (N, D) -> (B, D)
            task_term = None if task_term is None else task_term.index_select(0, first_tokens)  # (N, D) -> (B, D)
        attended = ops.linear_residual_norm(
            context, self.attention_output, hidden_states, self.attention_norm, prob, masks
        )  # (M, D), M = N or B
        activated = ops.activated_linear(attended, self.intermediate, config.hidden_act)  # (M, D) -> (M, I)
        return ops.linear_residual_norm(
            activated, self.output, attended, self.output_norm, prob, masks, task_term
        )  # (M, I) -> (M, D)

    def _queries_of(self, first_tokens: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, D) of the first tokens, keys and values (N, 2 D) of all."""
        size, (weight, bias) = self.config.hidden_size, (self.qkv.weight, self.qkv.bias)
        first_states = hidden_states.index_select(0, first_tokens)  # (N, D) -> (B, D)
        query = ops.linear(first_states, weight, bias, slice(size))  # (B, D)
        return query, ops.linear(hidden_states, weight, bias, slice(size, 3 * size))  # (N, D) -> (N, 2 D)


class Encoder(nn.Module):
    """Packed tokens to hidden states, by BERT or a variant, which make the parts. Masks make the difference between
    training and evaluation.

    can_be_recorded: on a GPU where ops are fused nothing in a pass waits for the host.
    """

    can_be_recorded: ClassVar[bool] = True
    config: BertConfig
    word_embeddings: nn.Embedding
    layers: nn.ModuleList
    pooler: Linear

    def embed(self, tokens: PackedTokens, masks: DropoutMasks | None, perturbation: Tensor | None) -> Tensor:
        """Input embeddings (N, D); the perturbation (N, D) is added before their LayerNorm."""
        raise NotImplementedError

    def states(
        self,
        tokens: PackedTokens,
        masks: DropoutMasks | None = None,
        adapter: LayerAdapter | None = None,
        perturbation: Tensor | None = None,
        first_only: bool = False,
        top_layers: Iterable[nn.Module] = (),
    ) -> Iterator[Tensor]:
        """The input embeddings (N, D), then the hidden states (N, D) of each layer; of the last one (B, D), each row's
        [CLS] alone, where first_only.

        masks: where dropout's masks come from; None for evaluation. adapter: the task's addition to each layer.
        perturbation: (N, D), added to the input embeddings before their LayerNorm. first_only: what else the last layer
        has of a row is not computed. top_layers: the task's own, behind those of all tasks.
        """
        layers = [*self.layers, *top_layers]
        assert len(layers) == self.config.num_hidden_layers, "the top layers are each task's own"
        hidden_states = self.embed(tokens, masks, perturbation)  # (N, D)
        yield hidden_states
        last = len(layers) - 1
        for i, layer in enumerate(layers):
            term = None if adapter is None else adapter(i, hidden_states, tokens.packing, masks)  # (N, D)
            first_tokens = tokens.first_tokens if first_only and i == last else None
            hidden_states = layer(hidden_states, tokens.packing, masks, term, first_tokens)  # (N, D), last (B, D)
            yield hidden_states

    def forward(self, *arguments: Any, **more: Any) -> Tensor:
        """The hidden states of the last layer, (N, D) or (B, D); arguments: those of `states`."""
        return deque(self.states(*arguments, **more), maxlen=1)[0]  # (N,) -> (N, D) or (B, D)

    def pool(self, first_states: Tensor) -> Tensor:
        """(B, D) pooled output, a dense layer and tanh, from the hidden states (B, D) of the rows' [CLS]."""
        return torch.tanh(self.pooler(first_states))  # (B, D)


class Bert(Encoder):
    """The encoder as BERT has it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.embedding_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(size, size)

    def embed(self, tokens: PackedTokens, masks: DropoutMasks | None, perturbation: Tensor | None) -> Tensor:
        """Words, positions and token types, the perturbation, LayerNorm, dropout."""
        embeddings = (
            ops.embedding(tokens.input_ids, self.word_embeddings.weight)
            + ops.embedding(tokens.position_ids, self.position_embeddings.weight, is_vocabulary=False)
            + ops.embedding(tokens.token_type_ids, self.token_type_embeddings.weight, is_vocabulary=False)
        )  # (N,) -> (N, D)
        if perturbation is not None:
            embeddings = embeddings + perturbation
        return ops.dropout(ops.layer_norm(embeddings, self.embedding_norm), self.config.hidden_dropout_prob, masks)


# --------------------------------------------------------------------------------------------------- new modules


class Uninitialized(TorchFunctionMode):
    """Within it new modules have memory and no values: torch's own initialization is left out.

    (Modules made on the meta device would do the same, but importing torch's compiler, which torch does for them, takes
    longer than all else at the start of a run.)
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty_bert(config: BertConfig) -> Encoder:
    """An encoder whose parameters are allocated and not initialized: no generator is touched."""
    with Uninitialized():
        return config.make_encoder()


def initialize(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """BERT's initialization for new parameters: normal matrices, zero biases, LayerNorms at the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std, generator=generator)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)
