"""What do ranks send each other? Elements moved per step, and the time of collectives.

Psi parameters, d ranks of a group, k accumulation steps. Rings move (d - 1) / d of a buffer through the
slowest link and wait for d - 1 hops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import Hardware
from launcher.plan.adapters import trained_parameters
from launcher.plan.setup import BYTES, Setup, Strategy
from launcher.plan.shape import Shape

LINK_SHARE = 0.8
"""Share of a link's nominal bandwidth that NCCL reaches with large messages."""
HOP_BYTES = 0.7e6
"""Bytes that a link between nodes could have sent while a hop waits: 28 us at 25 GB/s, 14 us at 50 GB/s.
Chosen so that full sharding of 2.7B over 256 A100s on links of 12.5 GB/s takes twice the time of 64, as
the Modalities benchmarks found."""
NODE_HOP_SECONDS = 4e-6
"""Latency of a hop inside a node."""
DEEPSPEED_GATHERS = 4
"""DeepSpeed's stage 3 gathers a block matrix by matrix, and hid little of it when it was measured against
pipelines (Narayanan et al. 2021, arXiv:2104.04473, table 2); FSDP gathers block by block."""
BACKWARD_SHARE = 2 / 3
"""Share of a pass that is backward."""


@dataclass(frozen=True)
class Network:
    """Links of a machine, bytes per second and direction of one accelerator; none where unknown."""

    intra_bytes_s: float | None
    inter_bytes_s: float | None

    def ring(self, ranks: int, per_node: int) -> tuple[float, float]:
        """Bandwidth of a ring over ranks, of which per_node share a node, and seconds of one hop.

        Rings that cross nodes do so on all their members' adapters. Unknown links cost nothing.
        """
        intra = self.intra_bytes_s or math.inf
        if ranks <= per_node:
            return LINK_SHARE * intra, NODE_HOP_SECONDS if self.intra_bytes_s else 0.0
        if self.inter_bytes_s is None:
            return math.inf, 0.0
        bandwidth = min(intra, self.inter_bytes_s * per_node)
        return LINK_SHARE * bandwidth, HOP_BYTES / self.inter_bytes_s

    def gather_seconds(self, size_bytes: float, count: int, ranks: int, per_node: int) -> float:
        """All-gather or reduce-scatter in count messages: (d-1)/d size / B + count (d-1) hops."""
        bandwidth, hop_seconds = self.ring(ranks, per_node)
        return (ranks - 1) / ranks * size_bytes / bandwidth + count * (ranks - 1) * hop_seconds

    def all_reduce_seconds(self, size_bytes: float, count: int, ranks: int, per_node: int) -> float:
        """2 (d-1)/d size / B + count 2 log2(d) hops, since NCCL reduces small messages along trees."""
        bandwidth, hop_seconds = self.ring(ranks, per_node)
        hops = 2 * math.ceil(math.log2(ranks))
        return 2 * (ranks - 1) / ranks * size_bytes / bandwidth + count * hops * hop_seconds


def network_of(hardware: Hardware) -> Network:
    """The links of an accelerator."""
    intra, inter = hardware.intra_node_gb_s, hardware.inter_node_gb_s
    return Network(intra and intra * 1e9, inter and inter * 1e9)


def elements_moved(strategy: Strategy, accumulation: int = 1, reshard_after_forward: bool = True) -> int:
    """Elements that a rank sends per step, in units of Psi, for (d-1)/d = 1.

    ddp 2: all-reduce of gradients. zero1, zero2 2: gradients scattered, weights gathered. zero3, fsdp and
    hsdp within a group 3: weights gathered for forward and backward, gradients scattered, in each
    of k accumulation steps; 2 where gathered weights are kept after forward. zero2 scatters in each of them.
    Rajbhandari et al. 2020 (arXiv:1910.02054), section 7; Zhao et al. 2023 (arXiv:2304.11277), section 3.2.
    """
    match strategy:
        case "ddp" | "zero1":
            return 2
        case "zero2":
            return accumulation + 1
        case "fsdp_grad_op":
            return 2 * accumulation
        case _:
            return (3 if reshard_after_forward else 2) * accumulation


ZERO_PLUS_PLUS = {"qwZ": 0.5, "hpZ": 0.0, "qgZ": 0.25}
"""Psi that quantised forward gathers, backward gathers within a node and quantised gradients send between
nodes; 1 each without. Wang et al. 2023 (arXiv:2306.10209)."""


def zero_plus_plus_elements(*parts: str) -> float:
    """Elements sent between nodes per step in units of Psi, with these parts of ZeRO++."""
    return sum(volume if part in parts else 1.0 for part, volume in ZERO_PLUS_PLUS.items())


def hybrid_cross_host(size: float, shards: int, world_size: int) -> float:
    """2 M (W-1) / (G W): what a rank sends to other hosts when groups of G = shards fit a host."""
    return 2 * size * (world_size - 1) / (shards * world_size)


def full_shard_cross_host(size: float, world_size: int) -> float:
    """3 M (W-1) / W. Zhao et al. 2023 (arXiv:2304.11277), section 3.2.2."""
    return 3 * size * (world_size - 1) / world_size


def replicated_cross_host(size: float, world_size: int) -> float:
    """2 M (W-1) / W."""
    return 2 * size * (world_size - 1) / world_size


@dataclass(frozen=True)
class Communication:
    """Seconds of one optimizer step's collectives if nothing else ran."""

    beside_compute: float
    """Those that run while blocks are computed, and can hide there."""
    alone: float
    """Those that nothing is left to compute beside."""
    hiding_share: float
    """Share of the step's compute time that lasts while the former run."""


def communication(shape: Shape, setup: Setup, hardware: Hardware) -> Communication:
    """The collectives of data parallelism in one optimizer step.

    Weights are gathered in the compute format, gradients reduced in setup.reduce, block by block; ddp and
    DeepSpeed in buckets. ddp and zero1 reduce in the last backward of a step only; zero1 and zero2 gather
    the updated weights after the optimizer.
    """
    model_parallel = setup.tensor_parallel * setup.pipeline_parallel
    parameters = shape.parameters / model_parallel
    network = network_of(hardware)
    per_node = setup.ranks_of_a_node
    weights = min(setup.compute_bytes, BYTES[setup.weights]) * parameters
    gradients = BYTES[setup.reduce] * parameters * trained_share(shape, setup)
    ranks, passes = setup.state_ranks, setup.accumulation
    match setup.strategy:
        case "ddp":
            in_buckets = BYTES[setup.weights] * parameters * trained_share(shape, setup)
            count = math.ceil(in_buckets / (setup.bucket_mib * 2**20))
            reduce = network.all_reduce_seconds(gradients, count, ranks, per_node)
            return Communication(reduce, 0.0, BACKWARD_SHARE / passes)
        case "zero1" | "zero2":
            count = math.ceil(parameters / setup.bucket_parameters)
            reduce = network.gather_seconds(gradients, count, ranks, per_node)
            gather = network.gather_seconds(weights, count, ranks, per_node)
            if setup.strategy == "zero1":
                return Communication(reduce, gather, BACKWARD_SHARE / passes)
            return Communication(passes * reduce, gather, BACKWARD_SHARE)
        case "zero3":
            messages = _blocks(shape, setup) * DEEPSPEED_GATHERS
            return Communication(
                0.0, passes * _sharded_seconds(setup, network, weights, gradients, messages, per_node), 1.0
            )
        case _:
            seconds = _sharded_seconds(setup, network, weights, gradients, _blocks(shape, setup), per_node)
            return Communication(passes * seconds, 0.0, 1.0)


def trained_share(shape: Shape, setup: Setup) -> float:
    """Share of the weights that get gradients."""
    return trained_parameters(shape, setup.lora_rank, setup.frozen_blocks) / shape.parameters


def _sharded_seconds(
    setup: Setup, network: Network, weights: float, gradients: float, messages: int, per_node: int
) -> float:
    """One micro batch: gathers, scatter, and the all-reduce between replicas of a hybrid."""
    shards, replicas = setup.shards, setup.state_ranks // setup.shards
    kept = setup.strategy == "fsdp_grad_op" or not setup.reshard_after_forward
    seconds = (1 if kept else 2) * network.gather_seconds(weights, messages, shards, per_node)
    seconds += network.gather_seconds(gradients, messages, shards, per_node)
    replicas_per_node = max(1, per_node // shards)
    return seconds + network.all_reduce_seconds(gradients / shards, messages, replicas, replicas_per_node)


def tensor_parallel_seconds(shape: Shape, setup: Setup, hardware: Hardware) -> float:
    """One micro batch: two all-reduces of b t h bytes per block and pass; nothing hides them.

    Three passes with full checkpointing, which repeats forward, else two.
    """
    ranks = setup.tensor_parallel
    if ranks == 1:
        return 0.0
    tokens = setup.micro_batch * shape.sequence_length / setup.context_parallel
    passes = 3 if setup.checkpointing == "full" else 2
    count = 2 * passes * _blocks(shape, setup)
    size = count * setup.compute_bytes * tokens * shape.hidden
    return network_of(hardware).all_reduce_seconds(size, count, ranks, setup.gpus_per_node)


def _blocks(shape: Shape, setup: Setup) -> int:
    """Blocks of one pipeline stage, and the embeddings and head as one more."""
    return math.ceil(shape.layers / setup.pipeline_parallel) + 1
