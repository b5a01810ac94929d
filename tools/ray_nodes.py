"""A Ray cluster of two nodes on this machine, for tests and tools."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stream_hbaf.cluster import ENVIRONMENT, connected

OBJECTS_BYTES = 100 << 20  # of each node's object store


@contextmanager
def two_nodes(*, cpus: int = 4) -> Iterator[Any]:
    """A cluster that this process is connected to; its nodes have so many CPUs to their name."""
    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": OBJECTS_BYTES}
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False}
    )
    try:
        cluster.add_node(**node)
        with connected(cluster.address):
            from ray import serve

            serve.start(proxy_location="Disabled")  # clients connect to the service itself
            yield cluster
    finally:
        cluster.shutdown()
