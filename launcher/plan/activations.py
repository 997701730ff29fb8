"""What does the forward pass keep for the backward pass? Bytes of one rank's micro batch.

T tokens of the micro batch, h hidden, a heads of size q, k key-value heads, f feed-forward width,
s sequence length, V vocabulary, b bytes of the compute format (2 in bf16, 4 in fp32). With the input x of
every matrix product, normalisation, activation function and attention kept, a block takes

    T (b (H h + A aq + K kq + F f) + G h + P (aq + kq) + log-sum-exp or scores)

with H, A, K, F, G, P of its family. They were measured on the modules of transformers, as the tensors that
autograd saves; the tests repeat the measurement. Norms that compute in fp32 keep fp32 copies: G and P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.plan.setup import Checkpointing, Setup
from launcher.plan.shape import Shape


@dataclass(frozen=True)
class Kept:
    """What a block of a family keeps, without checkpointing."""

    hidden: float = 4
    """Tensors of width h in the compute format; H."""
    attention: float = 2
    """Of width aq: queries and the output; A."""
    kv: float = 2
    """Of width kq; K."""
    ffn: float = 4
    """Of width f; F."""
    fp32_hidden: float = 0
    """Bytes of fp32 copies per h; G."""
    fp32_heads: float = 0
    """Bytes of fp32 copies per aq and kq, of norms on queries and keys; P."""
    autocast_hidden: float = 4
    """Bytes per h more under autocast, where the residual stream stays fp32 and products cast it anew."""
    logits: float = 0
    """Copies of the logits in the compute format, of a function on them."""
    scores: tuple[float, float] = (0, 0)
    """Bytes per head and pair of tokens in fp32 and in half precision, where attention is not one kernel."""


LLAMA = Kept(fp32_hidden=8, autocast_hidden=10)
GPT = Kept(ffn=2)
QUERY_KEY_NORM = replace(LLAMA, attention=3, kv=3, fp32_heads=4)
GEMMA = replace(LLAMA, hidden=2, fp32_hidden=16, autocast_hidden=6)
BERT = replace(GPT, autocast_hidden=8)
EAGER = replace(GPT, scores=(4, 6))
"""Attention with biases on the scores, which transformers computes as a matrix of scores."""

FAMILIES: dict[str, Kept] = {
    "qwen3": QUERY_KEY_NORM,
    "qwen3_moe": QUERY_KEY_NORM,
    "phi3": replace(LLAMA, hidden=5, attention=3, kv=3, autocast_hidden=4),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, fp32_hidden=32, attention=4, kv=0, scores=(8, 8), logits=1),
    "gemma3_text": replace(GEMMA, fp32_hidden=32, fp32_heads=8),
    "olmo2": replace(LLAMA, hidden=2, fp32_hidden=16, fp32_heads=8, autocast_hidden=6),
    "olmo3": replace(LLAMA, hidden=2, fp32_hidden=16, fp32_heads=8, autocast_hidden=6),
    "gpt2": replace(GPT, ffn=5),
    "gpt_neo": replace(GPT, ffn=5),
    "phi": replace(GPT, hidden=3, ffn=5),
    "gpt_neox": replace(GPT, attention=4, autocast_hidden=2),
    "gptj": replace(GPT, hidden=2, kv=0, ffn=5, fp32_heads=4, scores=(4, 6)),
    "opt": replace(GPT, ffn=1, autocast_hidden=8),
    "bloom": EAGER,
    "mpt": EAGER,
    "falcon": replace(GPT, hidden=2, attention=1, kv=0, fp32_heads=12, scores=(4, 4)),
    "bert": BERT,
    "roberta": BERT,
    "t5": replace(GEMMA, attention=1, kv=0, ffn=1, fp32_heads=6, scores=(4, 4)),
}
FAMILIES |= {"mt5": FAMILIES["t5"], "umt5": FAMILIES["t5"], "camembert": BERT, "xlm-roberta": BERT}
CROSS_ATTENTION = Kept(hidden=1, attention=4, kv=0, ffn=0, fp32_hidden=8, autocast_hidden=0)
"""What a decoder's attention to its encoder adds."""


def kept_by(shape: Shape, setup: Setup, *, trained: bool = True) -> Kept:
    """The coefficients of a family, as the kernels in use change them.

    compile: fp32 copies and cheap functions are computed again, as torch's partitioner does. frozen weights
    need no input: a product's is not kept, nor a norm's output. An unknown family is taken for a
    Llama when gated and for a GPT with an exact GELU when not.
    """
    kept = FAMILIES.get(shape.family, LLAMA if shape.gated else GPT)
    if shape.encoder_layers and shape.gated:
        kept = replace(kept, ffn=7)  # T5 v1.1: a gate with the tanh form of GELU
    if setup.fused_norm and kept.fp32_hidden:
        kept = replace(kept, fp32_hidden=0)
    if setup.repeated_kv:
        kept = replace(kept, attention=kept.attention + kept.kv, kv=0)
    if setup.compile:
        kept = replace(
            kept, fp32_hidden=0, fp32_heads=0, autocast_hidden=2, ffn=min(kept.ffn, 3 if shape.gated else 2)
        )
    if not trained:
        inputs = 1 if setup.lora_rank is not None else 0
        hidden = 0 if kept.fp32_hidden else kept.hidden - 2
        kept = replace(kept, hidden=hidden + inputs, ffn=kept.ffn - 1, autocast_hidden=0)
    return kept


def tokens_of(shape: Shape, setup: Setup) -> float:
    """Tokens of a micro batch on one rank. Tensor parallelism splits them too (sequence parallelism), but for
    the inputs of products, which are gathered."""
    return setup.micro_batch * shape.sequence_length / setup.context_parallel / setup.tensor_parallel


def block_activation_bytes(
    shape: Shape,
    setup: Setup,
    checkpointing: Checkpointing | None = None,
    *,
    trained: bool = True,
    decoder: bool = True,
) -> float:
    """Bytes that one block keeps, with the setup's checkpointing unless told: then the mean of all blocks.

    none:       the formula above; of experts, F and 2bh for each expert of a token; with tensor parallelism
                the gathered inputs of attention and feed-forward.
    selective:  T (b (h + 2aq + kq + f + h) + 4a): input, attention and every second matrix product
                (torchtitan's per-op policy): Q, V, gate and output of a gated block, all of a fused QKV.
    full:       T b h: the input.
    Under autocast the residual stream is fp32. decoder: whether an encoder-decoder's block attends
    to the encoder.
    """
    if checkpointing is None and setup.checkpointed_every > 1:
        whole = block_activation_bytes(shape, setup, "none", trained=trained, decoder=decoder)
        less = block_activation_bytes(shape, setup, setup.checkpointing, trained=trained, decoder=decoder)
        return whole + (less - whole) / setup.checkpointed_every
    tokens, h = tokens_of(shape, setup), shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    b = setup.compute_bytes
    kept = kept_by(shape, setup, trained=trained)
    checkpointing = checkpointing or setup.checkpointing
    stream = (b + 2 * setup.autocast) * h
    if checkpointing == "full":
        return tokens * stream
    log_sum_exp = 0 if kept.scores[0] else 4 * shape.heads
    if checkpointing == "selective":
        products = queries + 2 * keys if shape.fused_qkv else queries + keys
        if not shape.experts:
            products += shape.ffn * (2 if shape.fused_qkv and shape.gated else 1)
            products += h if shape.gated and not shape.fused_qkv else 0
        attention = 0 if kept.scores[0] else queries
        return tokens * (stream + b * (products + attention) + log_sum_exp)
    bytes_of_token = (
        b * (kept.hidden * h + kept.attention * queries + kept.kv * keys)
        + (kept.fp32_hidden + setup.autocast * kept.autocast_hidden) * h
        + kept.fp32_heads * (queries + keys)
        + log_sum_exp
        + kept.scores[b == 2] * shape.heads * shape.sequence_length
    )
    expert = 4 if setup.autocast and shape.experts else b  # grouped products are not autocast
    bytes_of_token += expert * (kept.ffn * shape.ffn_active + 2 * shape.experts_per_token * h)
    if shape.encoder_layers and decoder:
        cross = CROSS_ATTENTION
        bytes_of_token += b * (cross.hidden * h + cross.attention * queries) + cross.fp32_hidden * h
    gathered = setup.tensor_parallel - 1
    return tokens * (bytes_of_token + 2 * b * h * gathered)


def final_norm_bytes(shape: Shape, setup: Setup) -> float:
    """T (4 + 2b) h: its fp32 input, and the normalised and scaled values.

    Tensor parallelism gathers the head's input and has its whole gradient: 2bh more for each token of others.
    """
    b, gathered = setup.compute_bytes, setup.tensor_parallel - 1
    return tokens_of(shape, setup) * (4 + 2 * b + 2 * b * gathered) * shape.hidden


def score_gradient_bytes(shape: Shape, setup: Setup) -> float:
    """8 T a s: fp32 gradients of probabilities and scores in a block's backward, where they are matrices."""
    if not kept_by(shape, setup).scores[0]:
        return 0.0
    return 8 * tokens_of(shape, setup) * shape.heads * shape.sequence_length


CHUNKS = 8


def logits_bytes(shape: Shape, setup: Setup) -> float:
    """What the loss keeps at its peak, with the gradients of logits.

    fp32     12 TV: logits, fp32 log-softmax and the gradients of both; 2 + 4 + 4 + 2, or 4 + 4 + 4 in fp32.
    bf16     6 TV: all three in the compute format.
    chunked  1/8 of the tokens at a time.
    Gemma 2 caps its logits with a tanh, whose output is kept too.
    """
    each = 12.0 if setup.logits != "bf16" or setup.compute == "fp32" else 6
    each += setup.compute_bytes * kept_by(shape, setup).logits
    share = 1 / CHUNKS if setup.logits == "chunked" else 1
    return share * each * tokens_of(shape, setup) * shape.vocabulary
