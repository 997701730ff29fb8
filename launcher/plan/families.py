"""How is each architecture of Hugging Face built? What a config.json says, and what its code adds.

The table holds what the modules in transformers have regardless of config.json; tests compare every entry
with the module itself. Encoders are counted with their masked-language head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from launcher.plan.parameters import Architecture, Experts
from launcher.plan.pretrained import ConfigFile, routed_experts


class Key(NamedTuple):
    """A switch in config.json, and what it means to leave it out."""

    name: str
    default: bool = False


KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
ATTENTION_BIAS = Key("attention_bias")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Switches of an architecture, named as in Architecture; a Key leaves one to config.json."""

    gated: bool = True
    grouped: bool = True
    """Whether config.json may give key and value heads."""
    tied: bool = False
    """What it means to leave tie_word_embeddings out."""
    norm: int = 1
    norms: int = 2
    outer_norms: int = 1
    qkv_bias: bool | Key = False
    output_bias: bool | Key = False
    mlp_bias: bool | Key = False
    head_bias: bool = False
    fused_qkv: bool = False
    fused_gate: bool = False
    query_key_norm: Literal["none", "head", "width"] = "none"
    """head: one norm shared by all heads; width: over all heads."""
    head_dim: int | None = None
    """What it means to leave head_dim out; none means hidden / heads."""
    learned_positions: int | None = None
    """Rows beyond max_position_embeddings; none means that positions are not learned."""
    adapt: Callable[[ConfigFile, Architecture], Architecture] | None = None
    """What the switches do not cover."""


def architecture_of(config: ConfigFile) -> Architecture | None:
    """What a config.json describes; none when its model_type is not in the table. Raises ConfigError."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return None

    def switch(value: bool | Key) -> bool:
        return config.flag(*value) if isinstance(value, Key) else value

    layers, hidden, heads = layers_of(config), hidden_of(config), heads_of(config)
    kv_heads = config.size("num_key_value_heads", default=heads) if family.grouped else heads
    head_dim = config.size("head_dim", default=family.head_dim or hidden // heads)
    normed = {"none": 0, "head": 2 * head_dim, "width": (heads + kv_heads) * head_dim}
    positions = 0
    if family.learned_positions is not None:
        positions = family.learned_positions + config.size("max_position_embeddings", "n_positions")
    architecture = Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn_of(config),
        vocabulary=config.size("vocab_size"),
        gated=family.gated,
        tied=config.flag("tie_word_embeddings", family.tied),
        norm=family.norm,
        norms=family.norms,
        outer_norms=family.outer_norms,
        qkv_bias=switch(family.qkv_bias),
        output_bias=switch(family.output_bias),
        up_bias=switch(family.mlp_bias),
        down_bias=switch(family.mlp_bias),
        head_bias=family.head_bias,
        fused_qkv=family.fused_qkv,
        fused_gate=family.fused_gate,
        query_key_norm=normed[family.query_key_norm],
        positions=positions,
    )
    if family.adapt:
        architecture = family.adapt(config, architecture)
    if architecture.heads % architecture.kv_heads:
        key = next(key for key in KV_HEADS if config.values.get(key) == architecture.kv_heads)
        raise config.wrong(key, architecture.kv_heads, f"must divide the {heads} heads")
    return architecture


def layers_of(config: ConfigFile) -> int:
    return config.size("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def hidden_of(config: ConfigFile) -> int:
    return config.size("hidden_size", "n_embd", "d_model", "n_embed")


def heads_of(config: ConfigFile) -> int:
    return config.size("num_attention_heads", "n_head", "num_heads", "n_heads")


def ffn_of(config: ConfigFile) -> int:
    keys = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")
    return config.size(*keys, default=4 * hidden_of(config))


def _mixtral(config: ConfigFile, plain: Architecture) -> Architecture:
    """Every feed-forward layer is a mixture of experts of its width (Jiang et al. 2024)."""
    number = config.size("num_local_experts", "num_experts")
    return replace(
        plain,
        experts=Experts(
            number=number,
            per_token=routed_experts(config, number),
            ffn=plain.ffn,
            blocks=plain.layers,
            other=number * plain.hidden,
        ),
    )


def _qwen_moe(config: ConfigFile, plain: Architecture) -> Architecture:
    """Mixtures in every decoder_sparse_step-th block but mlp_only_layers; Qwen2's share a gated expert."""
    number = config.size("num_experts", "num_local_experts")
    step = config.size("decoder_sparse_step", default=1)
    dense = {i for i in config.indices("mlp_only_layers") if i < plain.layers and (i + 1) % step == 0}
    qwen2 = config.model_type == "qwen2_moe"
    shared = config.size("shared_expert_intermediate_size") if qwen2 else 0
    return replace(
        plain,
        experts=Experts(
            number=number,
            per_token=routed_experts(config, number),
            ffn=config.size("moe_intermediate_size"),
            blocks=plain.layers // step - len(dense),
            shared_ffn=shared,
            other=(number + qwen2) * plain.hidden,
        ),
    )


def _deepseek(config: ConfigFile, plain: Architecture) -> Architecture:
    """Latent attention, and mixtures with shared experts after the first blocks (DeepSeek-AI 2024).

    head_dim is the mean of the sizes that scores and values have, so that attention's FLOPs are right.
    """
    h, heads, bias = plain.hidden, plain.heads, config.flag("attention_bias")
    rotary, latent = config.size("qk_rope_head_dim"), config.size("kv_lora_rank")
    content, value = config.size("qk_nope_head_dim"), config.size("v_head_dim")
    width = heads * (content + rotary)
    query_rank = config.count("q_lora_rank")
    queries = h * query_rank + bias * query_rank + query_rank + query_rank * width
    keys_values = (h + bias) * (latent + rotary) + latent + latent * heads * (content + value)
    output = heads * value * h + bias * h
    number, ffn = config.size("n_routed_experts"), config.size("moe_intermediate_size")
    dense = config.count("first_k_dense_replace")
    if dense > plain.layers:
        raise config.wrong("first_k_dense_replace", dense, f"must be at most the {plain.layers} blocks")
    return replace(
        plain,
        attention=(queries if query_rank else h * width) + keys_values + output,
        kv_heads=heads,
        head_dim=(content + rotary + value) // 2,
        experts=Experts(
            number=number,
            per_token=routed_experts(config, number),
            ffn=ffn,
            blocks=plain.layers - dense,
            shared_ffn=config.count("n_shared_experts") * ffn,
            other=number * h,
        ),
    )


def _gpt_oss(config: ConfigFile, plain: Architecture) -> Architecture:
    """Mixtures with biases, also in the router, and one learned attention sink per head."""
    mixed = _mixtral(config, plain)
    assert mixed.experts is not None
    router = mixed.experts.number * (plain.hidden + 1)
    return replace(mixed, query_key_norm=plain.heads, experts=replace(mixed.experts, other=router, bias=True))


def _falcon(config: ConfigFile, plain: Architecture) -> Architecture:
    """One key-value head in the 7B, groups in the new architecture; parallel blocks need one norm."""
    grouped = config.flag("new_decoder_architecture")
    kv_heads = config.size(*KV_HEADS[1:], default=plain.heads)
    if not grouped and config.flag("multi_query", True):
        kv_heads = 1
    two = grouped and config.size("num_ln_in_parallel_attn", default=2) == 2
    return replace(plain, kv_heads=kv_heads, norms=2 if two or not config.flag("parallel_attn", True) else 1)


def _gpt_bigcode(config: ConfigFile, plain: Architecture) -> Architecture:
    return replace(plain, kv_heads=1 if config.flag("multi_query", True) else plain.heads)


def _mpt(_: ConfigFile, plain: Architecture) -> Architecture:
    """transformers ignores expansion_ratio."""
    return replace(plain, ffn=4 * plain.hidden)


def _opt(config: ConfigFile, plain: Architecture) -> Architecture:
    """The 350M has narrower embeddings and norms after the sums, without a last one."""
    last = config.flag("do_layer_norm_before", True) and not config.flag("_remove_final_layer_norm")
    return replace(
        plain,
        norm=2 if config.flag("layer_norm_elementwise_affine", True) else 0,
        outer_norms=int(last),
        embedding_width=config.size("word_embed_proj_dim", default=plain.hidden),
    )


def _optional_query_key_norm(config: ConfigFile, plain: Architecture) -> Architecture:
    """Norms of queries and keys by a switch: one for all heads (Phi) or one per head (Cohere, StableLM)."""
    if not (config.flag("use_qk_norm") or config.flag("qk_layernorm")):
        return plain
    if config.model_type == "phi":
        return replace(plain, query_key_norm=2 * plain.norm * plain.head_dim)
    return replace(plain, query_key_norm=(plain.heads + plain.kv_heads) * plain.head_dim)


def _stablelm(config: ConfigFile, plain: Architecture) -> Architecture:
    parallel = config.flag("use_parallel_residual")
    return replace(_optional_query_key_norm(config, plain), norms=1 if parallel else 2)


def _bert(config: ConfigFile, plain: Architecture) -> Architecture:
    """Token types, a norm on the embeddings, and a dense layer before the head (Devlin et al. 2018)."""
    h = plain.hidden
    return replace(plain, token_types=config.size("type_vocab_size", default=2), outer=h * h + h)


def _t5(config: ConfigFile, plain: Architecture) -> Architecture:
    """Encoder and decoder with relative positions in the first block of each (Raffel et al. 2020).

    v1.0 has a plain feed-forward layer with ReLU, v1.1 a gated one. transformers ties the head in both.
    umT5 has relative positions in every block.
    """
    encoder = config.size("num_layers", "num_hidden_layers")
    decoder = config.size("num_decoder_layers", default=encoder)
    tables = encoder + decoder if config.model_type == "umt5" else 2
    buckets = config.size("relative_attention_num_buckets", default=32)
    silent = "relu" if config.model_type == "t5" else "gated-gelu"
    return replace(
        plain,
        layers=encoder + decoder,
        encoder_layers=encoder,
        gated=str(config.values.get("feed_forward_proj", silent)).startswith("gated"),
        head_dim=config.size("d_kv", default=64),
        tied=True,
        outer=tables * buckets * plain.heads,
    )


LLAMA = Family(qkv_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS, mlp_bias=Key("mlp_bias"))
ATTENTION_BIASED = Family(qkv_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS)
GLM = Family(qkv_bias=Key("attention_bias", True), head_dim=128, fused_gate=True)
GEMMA = replace(ATTENTION_BIASED, tied=True, head_dim=256)
GPT = Family(
    gated=False,
    grouped=False,
    norm=2,
    tied=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    fused_qkv=True,
)
GPTJ = replace(GPT, tied=False, norms=1, qkv_bias=False, output_bias=False, head_bias=True, fused_qkv=False)
BERT = replace(GPT, fused_qkv=False, outer_norms=2, head_bias=True, learned_positions=0, adapt=_bert)
T5 = Family(grouped=False, outer_norms=2, adapt=_t5)
DEEPSEEK = Family(grouped=False, adapt=_deepseek)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": Family(),
    "ministral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": replace(ATTENTION_BIASED, query_key_norm="head", head_dim=128),
    "phi3": Family(fused_qkv=True, fused_gate=True),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, norms=4),
    "gemma3_text": replace(GEMMA, norms=4, query_key_norm="head"),
    "olmo": replace(ATTENTION_BIASED, norm=0),
    "olmo2": replace(ATTENTION_BIASED, query_key_norm="width"),
    "olmo3": replace(ATTENTION_BIASED, query_key_norm="width"),
    "smollm3": replace(LLAMA, tied=True),
    "granite": LLAMA,
    "arcee": replace(LLAMA, gated=False),
    "seed_oss": Family(
        qkv_bias=Key("attention_bias", True),
        output_bias=Key("attention_out_bias"),
        mlp_bias=Key("mlp_bias"),
        head_dim=128,
    ),
    "helium": Family(qkv_bias=ATTENTION_BIAS, mlp_bias=Key("mlp_bias")),
    "ernie4_5": Family(
        tied=True, qkv_bias=Key("use_bias"), output_bias=Key("use_bias"), mlp_bias=Key("use_bias")
    ),
    "exaone4": Family(query_key_norm="head"),
    "glm": GLM,
    "glm4": replace(GLM, norms=4),
    "cohere": replace(ATTENTION_BIASED, tied=True, norms=1, adapt=_optional_query_key_norm),
    "cohere2": replace(ATTENTION_BIASED, tied=True, norms=1),
    "stablelm": Family(norm=2, qkv_bias=Key("use_qkv_bias"), adapt=_stablelm),
    "starcoder2": Family(
        gated=False,
        norm=2,
        tied=True,
        qkv_bias=Key("use_bias", True),
        output_bias=Key("use_bias", True),
        mlp_bias=Key("use_bias", True),
    ),
    "phi": replace(
        GPT,
        grouped=True,
        tied=False,
        norms=1,
        head_bias=True,
        fused_qkv=False,
        adapt=_optional_query_key_norm,
    ),
    "gpt2": replace(GPT, learned_positions=0),
    "gpt_bigcode": replace(GPT, learned_positions=0, adapt=_gpt_bigcode),
    "gpt_neo": replace(GPT, qkv_bias=False, fused_qkv=False, learned_positions=0),
    "gpt_neox": replace(
        GPT, tied=False, qkv_bias=Key("attention_bias", True), output_bias=Key("attention_bias", True)
    ),
    "gptj": GPTJ,
    "codegen": replace(GPTJ, fused_qkv=True),
    "opt": replace(
        GPT,
        fused_qkv=False,
        qkv_bias=Key("enable_bias", True),
        output_bias=Key("enable_bias", True),
        mlp_bias=Key("enable_bias", True),
        learned_positions=2,
        adapt=_opt,
    ),
    "bloom": replace(GPT, outer_norms=2),
    "falcon": replace(
        GPT, qkv_bias=Key("bias"), output_bias=Key("bias"), mlp_bias=Key("bias"), adapt=_falcon
    ),
    "mpt": replace(GPT, norm=1, qkv_bias=False, output_bias=False, mlp_bias=False, adapt=_mpt),
    "mixtral": Family(adapt=_mixtral),
    "olmoe": replace(ATTENTION_BIASED, query_key_norm="width", adapt=_mixtral),
    "granitemoe": replace(ATTENTION_BIASED, adapt=_mixtral),
    "qwen2_moe": Family(qkv_bias=Key("qkv_bias", True), adapt=_qwen_moe),
    "qwen3_moe": replace(ATTENTION_BIASED, query_key_norm="head", adapt=_qwen_moe),
    "gpt_oss": Family(
        qkv_bias=Key("attention_bias", True),
        output_bias=Key("attention_bias", True),
        head_dim=64,
        adapt=_gpt_oss,
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
}
