"""How large is the model? Sizes and parameter counts of a decoder-only transformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, Model
from launcher.plan.parameters import gpt2_parameters, llama_parameters
from launcher.plan.pretrained import read_config, size, stored_parameters

LLAMA_LIKE = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Shape:
    """Sizes that decide what a model costs. Parameters are counted, not in bytes."""

    name: str
    family: str
    """llama, gpt2, or the model_type of a Hugging Face checkpoint."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    sequence_length: int
    gated: bool
    """Whether the feed-forward layer has two matrices in and one out, like SwiGLU."""
    tied: bool
    parameters: int
    parameters_active: int
    """Those that one token passes through; fewer than parameters in a mixture of experts."""
    parameters_embedding: int
    """Rows that are looked up: token embeddings and learned positions."""

    @property
    def parameters_multiplied(self) -> int:
        """Active parameters without look-up tables; a tied table still multiplies, as the head."""
        head = self.vocabulary * self.hidden if self.tied else 0
        return self.parameters_active - self.parameters_embedding + head

    @property
    def parameters_root(self) -> int:
        """Parameters outside the blocks: embeddings and an untied head; the final norm is negligible."""
        return self.parameters_embedding + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def parameters_layer(self) -> int:
        """Parameters of one block."""
        return (self.parameters - self.parameters_root) // self.layers


def shape_of(model: Model) -> Shape:
    """The shape that a checked `model` section describes.

    Families llama and gpt2 are computed from its sizes, family hf from the checkpoint in model.path.
    Raises ConfigError when that checkpoint cannot be read or is shorter than model.sequence_length.
    """
    if model.family != "hf":
        return _shape(model.name, "preset", _like_checkpoint(model), model.sequence_length)
    path = str(model.path)
    config = read_config(path)
    positions = size(config, path, "max_position_embeddings", "n_positions", default=model.sequence_length)
    if model.sequence_length > positions:
        raise ConfigError(
            f"model.sequence_length={model.sequence_length}: at most {positions}, "
            f"the positions of the checkpoint in model.path={path}"
        )
    return _shape(Path(path).name, path, config, model.sequence_length)


def _like_checkpoint(model: Model) -> dict[str, Any]:
    """Sizes of a preset under the keys of a config.json."""
    return {
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


def _shape(name: str, path: str, config: dict[str, Any], sequence_length: int) -> Shape:
    family = str(config.get("model_type"))
    tied = bool(config.get("tie_word_embeddings", family not in LLAMA_LIKE))
    hidden = size(config, path, "hidden_size", "n_embd")
    layers = size(config, path, "num_hidden_layers", "n_layer")
    heads = size(config, path, "num_attention_heads", "n_head")
    kv_heads = size(config, path, "num_key_value_heads", default=heads)
    head_dim = size(config, path, "head_dim", default=hidden // heads)
    ffn = size(config, path, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    vocabulary = size(config, path, "vocab_size")
    if family in LLAMA_LIKE:
        total = active = llama_parameters(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=ffn,
            vocabulary=vocabulary,
            tied=tied,
            qkv_bias=family == "qwen2" or (family == "llama" and bool(config.get("attention_bias"))),
            output_bias=family == "llama" and bool(config.get("attention_bias")),
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
        )
        embedding = vocabulary * hidden
    elif family == "gpt2":
        positions = size(config, path, "n_positions")
        total = active = gpt2_parameters(
            layers=layers, hidden=hidden, ffn=ffn, vocabulary=vocabulary, positions=positions, tied=tied
        )
        embedding = (vocabulary + positions) * hidden
    else:
        total, active, embedding = stored_parameters(path, config)
    return Shape(
        name=name,
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocabulary=vocabulary,
        sequence_length=sequence_length,
        gated=family in LLAMA_LIKE or config.get("hidden_act") == "silu",
        tied=tied,
        parameters=total,
        parameters_active=active,
        parameters_embedding=embedding,
    )
