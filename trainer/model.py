"""Models: transformers modules from sizes or from a checkpoint, ready to be sharded."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from configs.schema import Config, ConfigError, Model
from trainer.adapters import choose_trained
from trainer.pretrained import load_buffers
from trainer.skeleton import skeleton


def build_model(config: Config, tokenizer_size: int, end_of_document: int) -> nn.Module:
    """The model, ready to be sharded: parameters in fp32 on the meta device, buffers on the CPU.

    Its weights are those of trainer.initial. Raises ConfigError when the checkpoint cannot be read, the
    rows are longer than its positions reach, the tokenizer (of `tokenizer_size` ids) has ids beyond the
    embedding table, nothing would be trained, or documents cannot be masked.
    """
    model = config.model
    architecture = architecture_of(model)
    limit = getattr(architecture, "max_position_embeddings", None)
    if limit is not None and model.sequence_length > limit:
        raise ConfigError(
            f"model.sequence_length={model.sequence_length}: {model.path} has {limit} positions"
        )
    if tokenizer_size > architecture.vocab_size:
        key = "model.vocabulary" if model.path is None else "model.tokenizer"
        value = architecture.vocab_size if model.path is None else model.tokenizer or model.path
        raise ConfigError(
            f"{key}={value}: the tokenizer has {tokenizer_size} ids, the model {architecture.vocab_size} rows"
        )
    if model.path is None:
        architecture.eos_token_id = end_of_document
        architecture.bos_token_id = end_of_document
    module, _ = skeleton(architecture)
    if config.objective.mask_documents:
        _check_maskable(module)
    if model.path is not None:
        load_buffers(model.path, module)
    choose_trained(module, model, blocks(module))
    return prepared(module, config)


def prepared(module: nn.Module, config: Config) -> nn.Module:
    """A model in training mode, with recomputation and compilation as configured."""
    module.train()
    if config.activation_checkpointing != "none":
        _recompute_activations(module, selective=config.activation_checkpointing == "selective")
    if config.compile:
        for block in blocks(module):
            block.compile()
    return module


def architecture_of(model: Model) -> PreTrainedConfig:
    """The transformers configuration of a model. Raises ConfigError naming model.path."""
    sizes: dict[str, Any]
    match model.family:
        case "llama":
            sizes = {
                "vocab_size": model.vocabulary,
                "hidden_size": model.hidden,
                "intermediate_size": model.ffn,
                "num_hidden_layers": model.layers,
                "num_attention_heads": model.heads,
                "num_key_value_heads": model.kv_heads or model.heads,
                "max_position_embeddings": model.sequence_length,
                "rms_norm_eps": model.norm_epsilon,
                "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
                "tie_word_embeddings": model.tied_embeddings,
            }
            return LlamaConfig(**sizes)
        case "gpt2":
            sizes = {
                "vocab_size": model.vocabulary,
                "n_embd": model.hidden,
                "n_inner": model.ffn,
                "n_layer": model.layers,
                "n_head": model.heads,
                "n_positions": model.sequence_length,
                "layer_norm_epsilon": model.norm_epsilon,
                "resid_pdrop": model.dropout,
                "embd_pdrop": model.dropout,
                "attn_pdrop": model.dropout,
                "tie_word_embeddings": model.tied_embeddings,
            }
            return GPT2Config(**sizes)
        case "hf":
            assert model.path is not None
            try:
                architecture: PreTrainedConfig = AutoConfig.from_pretrained(model.path)
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0][:200]
                raise ConfigError(f"model.path={model.path}: no Hugging Face model: {reason}") from None
            if getattr(architecture, "quantization_config", None):
                raise ConfigError(f"model.path={model.path}: has quantized weights, which cannot be trained")
            return architecture


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order: the units of sharding, recomputation and compilation."""
    names = set(getattr(module, "_no_split_modules", None) or ())
    return [child for child in module.modules() if type(child).__name__ in names]


def forward(module: Any, inputs: Tensor, positions: Tensor | None) -> Tensor:
    """Logits [rows, T, vocabulary] of ids [rows, T], by a model or what stands for it.

    positions: [rows, T], counting from 0 in each document; transformers' masks keep tokens from attending
    to another document wherever positions do not go on by one. None for rows that are one text.
    """
    documents = {} if positions is None else {"position_ids": positions}
    logits: Tensor = module(input_ids=inputs, use_cache=False, **documents).logits
    return logits


def flops_per_token(module: nn.Module, sequence_length: int) -> float:
    """FLOPs per trained token, 6 N + 12 L H Q T, N without input embeddings (Chowdhery et al. 2022).

    H heads of width Q in L layers. A tied embedding matrix counts once, for the output product.
    """
    config: Any = module.config
    total = sum(parameter.numel() for parameter in module.parameters())
    inputs = sum(p.numel() for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    if config.tie_word_embeddings:
        inputs -= module.get_output_embeddings().weight.numel()  # type: ignore[operator]
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention: int = config.num_hidden_layers * width * sequence_length
    return 6.0 * (total - inputs) + 12.0 * attention


def _check_maskable(module: nn.Module) -> None:
    """Raise ConfigError for a model that is known to mix the documents of a row; see check_documents too."""
    if "position_ids" not in signature(type(module).forward).parameters:
        reason = "takes no positions"
    elif any(isinstance(part, nn.Conv1d) for block in blocks(module) for part in block.modules()):
        reason = "has recurrent or convolutional blocks"  # Mamba's and its like; its influence can be small
    else:
        return
    raise ConfigError(
        f"objective.mask_documents=true: {type(module).__name__} {reason}, so documents cannot be masked; "
        "choose false"
    )


def _recompute_activations(module: nn.Module, *, selective: bool) -> None:
    """Recompute activations in the backward pass: all of a block, or all but its costly products."""
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = _keep_products
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]


def _keep_products() -> Any:
    """Save attention and every second matrix product, recompute the rest, as torchtitan's policy does."""
    aten = torch.ops.aten
    products = {aten.mm.default, aten.addmm.default}
    attention = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    seen = {False: 0, True: 0}  # the forward pass and its recomputation meet the same products

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator in products:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        else:
            kept = operator in attention
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
