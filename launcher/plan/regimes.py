"""When in a step is memory fullest? Bytes of one rank in every regime, by strategy.

A step passes through regimes: the loss, the first and the last block's backward, the gradients of
embedding and head (root), the optimizer. Each is a sum of components. The forms of fully sharded
training were fitted to traces of FSDP2 (median deviation 0.01 %, worst 4.7 %), those of ddp are checked
against traces too; those of DeepSpeed follow its documentation and are not traced.
N parameters, n of a block, R outside the blocks, d ranks that share one copy, A activations of one of
L blocks (A_none without checkpointing), T tokens of a micro batch, h hidden, V vocabulary; w, b and r are the
bytes of a stored weight, of the compute format and of a reduced gradient.
"""

from __future__ import annotations

from launcher.plan.part import Part
from launcher.plan.setup import BYTES, Setup

Bytes = dict[str, float]
"""weights, gradients, optimizer: states. working: copies of weights in use, temporary copies. communication:
gradients on their way to be summed. activations, logits."""


def regimes_of(part: Part, setup: Setup) -> dict[str, Bytes]:
    """Bytes by component in every regime of a step."""
    match setup.strategy:
        case "ddp":
            return ddp(part, setup)
        case "zero1" | "zero2" | "zero3":
            return deepspeed(part, setup)
        case _:
            return fsdp(part, setup)


def moment_bytes(setup: Setup) -> float:
    """Bytes of the two moments of a weight: in the weight's format, or one each (Dettmers et al. 2021)."""
    return 2 if setup.optimizer == "adamw_8bit" else 2 * BYTES[setup.weights]


def ddp(part: Part, setup: Setup) -> dict[str, Bytes]:
    """Everything on every rank: 16N in fp32. Gradients are views of DDP's buckets, which stay for good.

    loss            16N + 2N + LA + 8Th + 12TV
    first backward  16N + 2N + LA + A_none - A + 6Vh
    optimizer       16N, or 20N with foreach

    In bf16, autocast keeps a cast of every weight until backward has used it: 2N. With checkpointing it lets
    go of them after forward, which ends with logits of 2TV, and casts a block's again in its backward. A
    gradient passes through its format and fp32 on the way to its bucket; the head's, the largest, takes
    6Vh. Accumulated gradients lie beside the buckets until the last micro batch: 4N.
    """
    w, b = BYTES[setup.weights], setup.compute_bytes
    states = {
        "weights": w * part.parameters,
        "gradients": w * part.trained,
        "optimizer": moment_bytes(setup) * part.trained,
    }
    casts = b * part.parameters if setup.autocast else 0
    after_forward = casts
    if setup.autocast and setup.checkpointing != "none":
        after_forward = b * (part.head + part.block)
    in_transit = (w + (b if setup.autocast else 0)) * (part.head if part.root_trained else 0)
    states_between = states | {"communication": w * part.trained if setup.accumulation > 1 else 0}
    backward = part.kept + part.block_whole - part.block_kept
    return {
        "forward": states_between
        | {"working": casts, "activations": part.kept + part.final_norm, "logits": part.logits_output},
        "loss": states_between
        | {"working": after_forward, "activations": part.kept + part.final_norm, "logits": part.logits},
        "first backward": states_between
        | {"communication": states_between["communication"] + in_transit}
        | {"working": after_forward, "activations": backward},
        "optimizer": states | {"working": w * part.trained * setup.foreach},
    }


def fsdp(part: Part, setup: Setup) -> dict[str, Bytes]:
    """FSDP2: weights, gradients and moments over d ranks; in bf16 with gradients reduced in fp32:

    loss            12N/d + 2R + LA + 8Th + 12TV
    first backward  12N/d + LA + A_none - A + 10n + 2R
    last backward   16N/d + A_none + 10n + 2R
    root            12N/d + 4(N - R)/d + 6R
    optimizer       16N/d with the fused AdamW, 20N/d with foreach

    At the loss embedding and head are gathered, or the last block, 2n, where they are freed after forward.
    10n are two gathered blocks (2n each), one's gradients (2n) and their fp32 copy to reduce (4n).
    Accumulation keeps the gradients, 4N/d, over the whole step. Without resharding after forward the
    gathered weights of all blocks, 2N, stay until their backward. So they do in a pipeline, where the
    gradients of all micro batches are also added up unsharded, 4N, and reduced at the end.
    """
    w, b, r = BYTES[setup.weights], setup.compute_bytes, BYTES[setup.reduce]
    d, pipelined = setup.shards, setup.pipeline_parallel > 1
    reshard = setup.reshard_after_forward and setup.strategy != "fsdp_grad_op" and not pipelined
    states = {"weights": w * part.parameters / d, "optimizer": moment_bytes(setup) * part.trained / d}
    gradients = w * part.trained / d
    accumulated = gradients if setup.accumulation > 1 and not pipelined else 0
    unsharded = r * part.trained if pipelined else 0
    gathered = b * part.parameters
    at_loss = b * (part.block if setup.root_resharded else part.root)
    reducing = (b + r) * part.block_trained
    before_root = gradients * (1 - part.root_trained / part.trained)
    return {
        "loss": states
        | {"gradients": accumulated, "communication": unsharded}
        | {"working": at_loss if reshard else gathered}
        | {"activations": part.kept + part.final_norm, "logits": part.logits},
        "first backward": states
        | {"gradients": accumulated, "communication": unsharded + reducing}
        | {"working": b * (2 * part.block + part.root) if reshard else gathered}
        | {"activations": part.kept + part.block_whole - part.block_kept},
        "last backward": states
        | {"gradients": gradients, "communication": unsharded + reducing}
        | {"working": b * (2 * part.block + part.root)}
        | {"activations": part.block_whole},
        "root": states
        | {"gradients": max(accumulated, before_root), "communication": (b + r) * part.root_trained},
        "optimizer": states | {"gradients": gradients, "working": gradients * setup.foreach},
    }


def deepspeed(part: Part, setup: Setup) -> dict[str, Bytes]:
    """ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020), as DeepSpeed builds them.

    Model and gradients are in the compute format; the optimizer works on a flat fp32 partition of the
    weights, N/d, and of the gradients while it steps:
    states  stage 1: 2N + 2N + 12N/d;  2: 2N + 2N/d + 12N/d;  3: 2N/d + 2N/d + 12N/d;  optimizer  4N/d more.
    Gradients are summed in buckets of bucket_parameters; in bf16, stage 1 and pipelines add them up in fp32
    beside, 4N.
    A second copy of the weights for gathering within a node takes 2N / secondary_degree.
    Stage 3 keeps up to live_parameters gathered, or the largest matrix, and prefetch_parameters ahead.
    """
    b, d = setup.compute_bytes, setup.shards
    master = 4 if setup.weights == "fp32" else 0
    split_weights = d if setup.strategy == "zero3" else 1
    split_gradients = 1 if setup.strategy == "zero1" else d
    second = b * part.parameters / setup.secondary_degree if setup.secondary_degree else 0
    states = {
        "weights": b * part.parameters / split_weights + second,
        "optimizer": (master + moment_bytes(setup)) * part.trained / d,
    }
    gradients = b * part.trained / split_gradients
    accumulated = gradients if setup.accumulation > 1 else 0
    if setup.compute == "bf16" and (setup.pipeline_parallel > 1 or _adds_up_in_fp32(setup)):
        accumulated += 4 * part.trained
        gradients += 4 * part.trained
    bucket = b * min(setup.bucket_parameters, part.trained)
    gathered = 0.0
    if setup.strategy == "zero3":
        bucket += b * part.largest
        live = max(setup.live_parameters, part.largest) + setup.prefetch_parameters
        gathered = b * min(live, part.parameters)
    backward = part.kept + part.block_whole - part.block_kept
    return {
        "loss": states
        | {"gradients": accumulated, "working": gathered}
        | {"activations": part.kept + part.final_norm, "logits": part.logits},
        "first backward": states
        | {"gradients": accumulated, "working": gathered, "communication": bucket, "activations": backward},
        "last backward": states
        | {"gradients": gradients, "working": gathered, "communication": bucket}
        | {"activations": part.block_whole},
        "optimizer": states | {"gradients": gradients, "working": 4 * part.trained / d},
    }


def _adds_up_in_fp32(setup: Setup) -> bool:
    """Whether DeepSpeed's optimizer for bf16 is at work, which stage 1 alone has, and not with offload."""
    return setup.strategy == "zero1" and setup.offload == "none"
