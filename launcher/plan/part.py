"""What has one rank to hold of the model? Its share of weights and activations, before states are split."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.activations import (
    block_activation_bytes,
    final_norm_bytes,
    logits_bytes,
    score_gradient_bytes,
    tokens_of,
)
from launcher.plan.adapters import lora_parameters, trained_parameters
from launcher.plan.setup import Setup
from launcher.plan.shape import Shape


@dataclass(frozen=True)
class Part:
    """Counts are parameters; activations are bytes of the micro batches that are in flight."""

    parameters: float
    trained: float
    """Those with a gradient and optimizer states."""
    block: float
    block_trained: float
    root: float
    """Outside the blocks: embeddings and head."""
    root_trained: float
    head: float
    largest: float
    """The largest matrix."""
    kept: float
    """What all blocks keep until their backward."""
    block_kept: float
    block_whole: float
    """What a block keeps while its backward runs: everything, computed again if need be."""
    final_norm: float
    logits: float
    logits_output: float
    """The logits alone, in the compute format."""


def parts_of(shape: Shape, setup: Setup) -> list[Part]:
    """The first and the last stage of a pipeline, or the whole model.

    Tensor parallelism divides every matrix. 1F1B keeps as many micro batches in flight on the first stage as
    there are stages, and one on the last, which has head and loss (Narayanan et al. 2021).
    """
    stages = setup.pipeline_parallel
    if stages == 1:
        return [_part(shape, setup, shape.parameters_root, in_flight=1, loss=True)]
    return [
        _part(shape, setup, shape.parameters_embedding, min(stages, setup.accumulation), loss=False),
        _part(shape, setup, shape.parameters_head, in_flight=1, loss=True),
    ]


def _part(shape: Shape, setup: Setup, root: float, in_flight: int, loss: bool) -> Part:
    split = setup.tensor_parallel
    share = 1 / setup.pipeline_parallel
    block, root = shape.parameters_layer / split, root / split
    parameters = shape.layers * share * block + root
    trained, block_trained, root_trained = parameters, block, root
    if setup.lora_rank is not None:
        trained = lora_parameters(shape, setup.lora_rank) * share / split
        parameters += trained
        block_trained, root_trained = trained / (shape.layers * share), 0.0
    elif setup.frozen_blocks:
        trained *= trained_parameters(shape, frozen_blocks=setup.frozen_blocks) / shape.parameters
        block_trained *= setup.frozen_blocks < shape.layers
    adapted = setup.lora_rank is None
    decoder = block_activation_bytes(shape, setup, trained=adapted)
    kept = (shape.layers - shape.encoder_layers) * decoder
    if shape.encoder_layers:
        kept += shape.encoder_layers * block_activation_bytes(shape, setup, trained=adapted, decoder=False)
    if setup.frozen_blocks and adapted:
        frozen = min(setup.frozen_blocks, shape.layers)
        kept += frozen * (block_activation_bytes(shape, setup, trained=False) - decoder)
    head = shape.parameters_head / split
    return Part(
        parameters=parameters,
        trained=trained,
        block=block,
        block_trained=block_trained,
        root=root,
        root_trained=root_trained,
        head=head,
        largest=max(head, shape.hidden * shape.ffn / split),
        kept=kept * share * in_flight,
        block_kept=decoder,
        block_whole=block_activation_bytes(shape, setup, "none", trained=adapted)
        + score_gradient_bytes(shape, setup),
        final_norm=final_norm_bytes(shape, setup) * loss,
        logits=logits_bytes(shape, setup) * loss,
        logits_output=setup.compute_bytes * tokens_of(shape, setup) * shape.vocabulary * loss,
    )
