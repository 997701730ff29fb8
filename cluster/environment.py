"""Where this node stands in the job, whatever scheduled it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """This node's rank among the nodes of the job, and where rank 0 listens."""

    node_rank: int
    nodes: int
    master_address: str
    master_port: int

    def worker_environment(self, local_rank: int, workers: int, attempt: int) -> dict[str, str]:
        """Environment variables of one worker, named as torch names them."""
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        defaults = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        if self.nodes == 1:
            # The machine's own name may resolve to no interface at all in a container.
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        return (
            defaults
            | dict(os.environ)
            | {
                "RANK": str(self.node_rank * workers + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(self.nodes * workers),
                "LOCAL_WORLD_SIZE": str(workers),
                "MASTER_ADDR": self.master_address,
                "MASTER_PORT": str(self.master_port),
                "TRAINYARD_ATTEMPT": str(attempt),
                "TRAINYARD_PARENT": str(os.getpid()),
            }
        )


def local_placement() -> Placement:
    """The only node of a local run, with a free port for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Placement(node_rank=0, nodes=1, master_address="127.0.0.1", master_port=port)
