"""A Ray cluster: connects to it, sees that its nodes can do the work, and runs functions on it.

Ray is an extra and takes two seconds to import: nothing of it is imported before it is asked for.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from stream_hbaf import __version__
from stream_hbaf.errors import ConfigError, StreamHbafError, shorten
from stream_hbaf.processes import THREADS, WorkerDiedError, map_as_completed, mapped_by

Item = TypeVar("Item")
Result = TypeVar("Result")

# The address of the cluster that RAY_ADDRESS names or this machine has, or of a new one.
FOUND = "auto"
OBJECTS_BYTES = 200 << 20  # of a new cluster's object store: what travels is sound and features
ONE_THREAD = {"env_vars": dict.fromkeys(THREADS, "1")}
LOCAL = "local"  # the address of a new one
# Read when Ray is imported and nodes are started: Ray sends no reports home; its workers, which
# answer within milliseconds, have the priority of other programs (its default is that of background
# work); and Serve's threads, which outlive the connection, don't start a cluster to ask once more.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
LISTENS_WITHIN_S = 5.0
ANSWERS_WITHIN_S = 10.0  # on a busy machine
WHO = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # what a cluster's head answers, of any version
CLIENT = "ray://"  # addresses of Ray's proxy for drivers elsewhere, which has other methods
RETRIES = 3  # of an item whose worker or node has died


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to the cluster at an address, or to a new one on this machine; see ``FOUND``.

    Raises ConfigError if there is none, or if it has another version of Ray or Python, and without
    Ray.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError("ray is not installed; pip install 'stream-hbaf[scale]'") from None

    where = os.environ.get("RAY_ADDRESS") or address if address == FOUND else address
    try:
        _connect(where)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        reason = shorten(" ".join(str(error).split()), limit=200)
        raise ConfigError(
            f"--ray {where}: no cluster that this Ray {ray.__version__} can use ({reason}); start "
            "one with 'ray start --head', of the same versions of Ray and Python"
        ) from None
    try:
        yield
    finally:
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # of these threads' failures
        ray.shutdown()


def _connect(address: str) -> None:
    """Connect to a cluster; to a new one for ``LOCAL``, and for ``FOUND`` if there is none here.

    Raises OSError, OverflowError, ValueError or RuntimeError.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    # Ray's own lines on how it starts. The workers' logs are in the nodes' folders.
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        # Ray also finds clusters that were killed, and would wait for them.
        found = canonicalize_bootstrap_address(FOUND) if address == FOUND else address
        _require_ray(found or "")
    except ConnectionError:
        if address != FOUND:
            raise
        address = LOCAL
    if address != LOCAL:
        ray.init(address=address, **quiet)
        return
    ray.init(
        address=LOCAL,
        num_cpus=len(os.sched_getaffinity(0)),
        object_store_memory=OBJECTS_BYTES,
        include_dashboard=False,
        **quiet,
    )


def _require_ray(address: str) -> None:
    """Raise OSError if it isn't Ray that listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdecimal():
        return
    socket.create_connection((host, int(port)), timeout=LISTENS_WITHIN_S).close()
    if os.environ.get("RAY_USE_TLS", "").lower() not in ("1", "true"):  # else it needs Ray's keys
        # In a process of its own: where gRPC was used, Ray can't start nodes.
        within_s = (ANSWERS_WITHIN_S,)
        list(map_as_completed(_ask_who, [address], workers=1, shared=within_s, isolated=True))


def _ask_who(address: str, within_s: float) -> None:
    """Raise ConnectionError if what listens isn't Ray."""
    import grpc

    options = [("grpc.enable_http_proxy", 0)]  # as Ray
    with grpc.insecure_channel(address.removeprefix(CLIENT), options=options) as channel:
        try:
            channel.unary_unary(WHO)(b"", timeout=within_s)
        except grpc.RpcError as error:
            others = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
            if not address.startswith(CLIENT):
                others.add(grpc.StatusCode.UNIMPLEMENTED)
            if error.code() in others:  # else Ray says what is wrong, such as the token
                raise ConnectionError("what listens there isn't Ray's head node") from None


def run_on_each_node(function: Callable[..., Result], *arguments: object) -> dict[str, Result]:
    """What a function returns on every node, by the node's address.

    Raises ConfigError for a node that lacks this version of stream-hbaf.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    running = {}
    for node in _nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        remote = ray.remote(**options)(_with_version)
        name = node["NodeManagerAddress"]
        name = f"{name} ({node['NodeID'][:8]})" if name in running else name
        running[name] = remote.remote(function, *arguments)
    found = {}
    for name, reference in running.items():
        try:
            version, found[name] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StreamHbafError):
                raise ConfigError(f"node {name}: {error.cause}") from None
            version = shorten(str(error).strip().rpartition("\n")[2], limit=200)
        except ray.exceptions.RayError as error:
            version = shorten(" ".join(str(error).split()), limit=200)
        if version != __version__:
            raise ConfigError(
                f"node {name}: it lacks stream-hbaf {__version__} ({version}); install the same "
                "on every node: pip install 'stream-hbaf[scale]'"
            )
    return found


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    import ray

    every: Any = ray.nodes  # without types
    return [node for node in every() if node["Alive"]]


def _with_version(function: Callable[..., Result], *arguments: object) -> tuple[str, Result]:
    from stream_hbaf import __version__ as there

    return there, function(*arguments)


def map_on_cluster(
    function: Callable[..., Result], items: Sequence[Item], *, shared: tuple[Any, ...] = ()
) -> Generator[tuple[int, Result], None, None]:
    """Yield each item's index and ``function(item, *shared)``, as they are completed.

    As ``processes.map_as_completed`` does, with a task of one core each on a cluster that is
    connected. ``shared`` is sent to each node once. An item whose worker died is done again, a few
    times; then WorkerDiedError is raised.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=RETRIES, runtime_env=ONE_THREAD)(_alone)
    sent = [ray.put(one) for one in shared]
    waiting = iter(enumerate(items))
    # Twice as many as run at once, so that none waits for this process.
    cores = sum(int(node["Resources"].get("CPU", 0)) for node in _nodes())
    ahead = 2 * max(1, cores)
    running: dict[Any, int] = {}
    folder = Path.cwd()
    try:
        while True:
            for index, item in islice(waiting, ahead - len(running)):
                running[remote.remote(function, folder, item, *sent)] = index
            if not running:
                return
            [done], _ = ray.wait([*running])
            yield running[done], _result(done, index=running.pop(done))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _alone(function: Callable[..., Result], folder: Path, item: object, *shared: object) -> Result:
    """In a worker: as in one of ``processes``, in its folder, with one thread for numerics.

    Raises ConfigError if this node doesn't have the folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"node {socket.gethostname()}: {folder}: {error.strerror}; --ray needs folders that "
            "all nodes share"
        ) from None
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return function(item, *shared)


@contextmanager
def work_on(address: str | None) -> Iterator[None]:
    """In the block, a cluster does what worker processes would do; None: they do it."""
    if address is None:
        yield
        return
    with connected(address), mapped_by(map_on_cluster):
        run_on_each_node(os.getpid)  # each has this version
        yield


def _result(reference: Any, *, index: int) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = shorten(" ".join(str(error).split()), limit=200)
        raise WorkerDiedError(
            f"a worker of the cluster died {RETRIES + 1} times ({reason}), perhaps for lack of "
            "memory; see 'ray status'",
            index=index,
        ) from None
