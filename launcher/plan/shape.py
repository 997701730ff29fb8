"""How large is the model? Sizes and parameter counts of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, Model
from launcher.plan.families import architecture_of, ffn_of, heads_of, hidden_of, layers_of
from launcher.plan.parameters import Architecture, Experts, Parameters, count
from launcher.plan.pretrained import ConfigFile, read_config, stored_parameters


@dataclass(frozen=True)
class Shape:
    """Sizes that decide what a model costs. Parameters are counted, not in bytes."""

    name: str
    family: str
    """llama, gpt2, or the model_type of a Hugging Face checkpoint."""
    layers: int
    """Blocks; of encoder and decoder together where there are both."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of a feed-forward layer; of one expert in a mixture."""
    vocabulary: int
    sequence_length: int
    gated: bool
    """Whether the feed-forward layer has two matrices in and one out, like SwiGLU."""
    tied: bool
    parameters: int
    parameters_active: int
    """Those that one token passes through: fewer than parameters in a mixture of experts, and half of an
    encoder-decoder's."""
    parameters_embedding: int
    """Rows that are looked up: token embeddings and learned positions."""
    parameters_head: int
    """Weights of the product that makes logits; the token embeddings when tied to them."""
    ffn_active: int
    """Width that one token passes through in a block: its experts' and the shared one's, else ffn."""
    fused_qkv: bool = False
    """Whether one product makes queries, keys and values."""
    fused_gate: bool = False
    """Whether one product makes both inputs of a gated feed-forward layer."""
    experts: int = 0
    experts_per_token: int = 0
    encoder_layers: int = 0
    """Blocks of the encoder of an encoder-decoder, else 0."""

    @property
    def stacks(self) -> int:
        """Encoder and decoder, or one of them. A token passes one: shares of it are means over both."""
        return 2 if self.encoder_layers else 1

    @property
    def tokens_per_row(self) -> int:
        """Tokens that a row trains on: of an encoder-decoder as many in each of both."""
        return self.stacks * self.sequence_length

    @property
    def attentions(self) -> int:
        """Attention layers: one per block, and each decoder block's attention to the encoder."""
        return self.layers + (self.layers - self.encoder_layers if self.encoder_layers else 0)

    @property
    def parameters_blocks(self) -> int:
        """Weights in the blocks that a token is multiplied by; the final norm counts as theirs."""
        if self.encoder_layers:
            return (self.parameters - self.parameters_root) // self.stacks
        return self.parameters_active - self.parameters_root

    @property
    def parameters_multiplied(self) -> int:
        """Active parameters without look-up tables; a tied table still multiplies, as the head.

        Half of the tokens of an encoder-decoder reach the head.
        """
        return self.parameters_blocks + self.parameters_head // self.stacks

    @property
    def parameters_root(self) -> int:
        """Parameters outside the blocks: embeddings and an untied head; the final norm is negligible."""
        return self.parameters_embedding + (0 if self.tied else self.parameters_head)

    @property
    def parameters_layer(self) -> int:
        """Parameters of one block, with all its experts."""
        return (self.parameters - self.parameters_root) // self.layers


def shape_of(model: Model) -> Shape:
    """The shape that a checked `model` section describes.

    Families llama and gpt2 are computed from its sizes, family hf from config.json in model.path, or from
    the weights beside it where the architecture is unknown.
    Raises ConfigError when that checkpoint cannot be read or is shorter than model.sequence_length.
    """
    if model.family != "hf":
        return shape_from_config(model.name, _like_checkpoint(model), model.sequence_length)
    config = read_config(str(model.path))
    shape = shape_from_config(Path(config.path).name, config, model.sequence_length)
    positions = config.size("max_position_embeddings", "n_positions", default=model.sequence_length)
    if model.sequence_length > positions and not shape.encoder_layers:
        raise ConfigError(
            f"model.sequence_length={model.sequence_length}: at most {positions}, "
            f"the positions of the checkpoint in model.path={config.path}"
        )
    return shape


def shape_from_config(name: str, config: ConfigFile, sequence_length: int) -> Shape:
    """The shape that a config.json describes. Raises ConfigError when it lacks a size."""
    architecture = architecture_of(config)
    if architecture is not None:
        return _shape(name, config.model_type, architecture, sequence_length, count(architecture))
    hidden, heads = hidden_of(config), heads_of(config)
    architecture = Architecture(
        layers=layers_of(config),
        hidden=hidden,
        heads=heads,
        kv_heads=config.size("num_key_value_heads", default=heads),
        head_dim=config.size("head_dim", default=hidden // heads),
        ffn=ffn_of(config),
        vocabulary=config.size("vocab_size"),
        gated=config.values.get("hidden_act") == "silu",
        tied=config.flag("tie_word_embeddings", True),
        norm=1,
    )
    parameters = stored_parameters(config, head=architecture.vocabulary * hidden)
    return _shape(name, config.model_type, architecture, sequence_length, parameters)


def llama_like(
    *,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    vocabulary: int,
    sequence_length: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    gated: bool = True,
    tied: bool = False,
    experts: int = 0,
    experts_per_token: int = 0,
    name: str = "",
) -> Shape:
    """A published model of which only the sizes are known: RMSNorm, rotary positions, no biases.

    experts: feed-forward layers of that width that every block chooses from, as in Mixtral.
    """
    mixture = Experts(
        number=experts, per_token=experts_per_token, ffn=ffn, blocks=layers, other=experts * hidden
    )
    architecture = Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        ffn=ffn,
        vocabulary=vocabulary,
        gated=gated,
        tied=tied,
        norm=1,
        experts=mixture if experts else None,
    )
    return _shape(name, "llama", architecture, sequence_length, count(architecture))


def gpt_like(
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocabulary: int,
    sequence_length: int,
    ffn: int | None = None,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    tied: bool = True,
    learned_positions: bool = True,
    name: str = "",
) -> Shape:
    """A published model of which only the sizes are known: LayerNorm, biases, a plain feed-forward layer."""
    architecture = Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        ffn=ffn or 4 * hidden,
        vocabulary=vocabulary,
        gated=False,
        tied=tied,
        norm=2,
        qkv_bias=True,
        output_bias=True,
        up_bias=True,
        down_bias=True,
        fused_qkv=True,
        positions=sequence_length if learned_positions else 0,
    )
    return _shape(name, "gpt2", architecture, sequence_length, count(architecture))


def _like_checkpoint(model: Model) -> ConfigFile:
    """A preset under the keys of a config.json."""
    values: dict[str, Any] = {
        "model_type": model.family,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocabulary,
        "n_positions": model.sequence_length,
        "tie_word_embeddings": model.tied_embeddings,
    }
    return ConfigFile("preset", values)


def _shape(
    name: str, family: str, architecture: Architecture, sequence_length: int, parameters: Parameters
) -> Shape:
    mixture = architecture.experts
    return Shape(
        name=name,
        family=family,
        layers=architecture.layers,
        hidden=architecture.hidden,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        ffn=mixture.ffn if mixture else architecture.ffn,
        vocabulary=architecture.vocabulary,
        sequence_length=sequence_length,
        gated=architecture.gated,
        tied=architecture.tied,
        parameters=parameters.total,
        parameters_active=parameters.active,
        parameters_embedding=parameters.embedding,
        parameters_head=parameters.head,
        ffn_active=mixture.per_token * mixture.ffn + mixture.shared_ffn if mixture else architecture.ffn,
        fused_qkv=architecture.fused_qkv,
        fused_gate=architecture.fused_gate,
        experts=mixture.number if mixture else 0,
        experts_per_token=mixture.per_token if mixture else 0,
        encoder_layers=architecture.encoder_layers,
    )
