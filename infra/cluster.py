"""Ray: a local instance, an existing cluster, or a job handed to one.

Ray is imported inside the functions, after its environment is set: it reads that at import.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

from infra.errors import Refused
from infra.plugins import VARIABLE, load_plugins

_OBJECT_STORE = 512 << 20  # rows travel through files, so it holds little
_PATIENCE_S = 5.0
_STOP_WAIT_S = 120  # what a stopped job has to save a checkpoint; Ray's own default is 3
_NOT_SENT = (".git", ".venv", "venv", "store", "mlruns", "__pycache__", "*.tar", "*.parquet", "*.safetensors")

_UNLIMITED = 1_000_000  # nodes of a group whose autoscaler names no bound

_started_here = False
_keeper: _Keeper | None = None


@dataclass(frozen=True)
class Node:
    """What a node has for Ray's work, and how many there are of it, or may be."""

    cpus: float
    gpus: float
    count: float = 1

    def holds(self, cpus: float, gpus: float) -> float:
        """How many units of so many CPUs and GPUs they hold at once, each whole on one node."""
        each = min(
            has / wanted + 1e-9 if wanted else math.inf for has, wanted in ((self.cpus, cpus), (self.gpus, gpus))
        )
        return self.count * (each if math.isinf(each) else math.floor(each))


@dataclass(frozen=True)
class ClusterInfo:
    """The Ray instance that this process is connected to."""

    address: str
    """host:port of its head."""
    dashboard: str
    """URL of its dashboard; empty if it has none."""
    nodes: tuple[Node, ...]
    """The nodes that it has now, by size."""
    growth: tuple[Node, ...]
    """The nodes that its autoscaler may give it in all, those of now included; empty where Ray does not know."""
    local: bool
    """Whether it was started here, and ends with this process."""

    @property
    def cpus(self) -> float:
        """CPUs of all its nodes."""
        return sum(node.cpus * node.count for node in self.nodes)

    @property
    def most(self) -> tuple[float, float]:
        """CPUs and GPUs of all its nodes, or of those that it may grow to."""
        totals = [
            [sum(getattr(node, what) * node.count for node in nodes) for what in ("cpus", "gpus")]
            for nodes in (self.nodes, self.growth)
        ]
        return max(totals[0][0], totals[1][0]), max(totals[0][1], totals[1][1])


def connect(address: str | None = None, cpus: int | None = None, *, dashboard: bool = True) -> ClusterInfo:
    """Starts Ray on this machine (no address), or joins the cluster at host:port, ray://host:port or "auto".

    cpus: of a local instance, default all that this process may use; dashboard: whether it has one, which listens on
    loopback and takes jobs. Refused, within seconds, if nothing answers at the address. Calling it again while
    connected changes nothing.
    """
    global _started_here
    if address is not None:
        _check_answers(address)
        _show_token()
    ray = _import_ray()
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if plugins := os.environ.get(VARIABLE):  # each worker imports them before its first task
            hook = {"env_vars": {VARIABLE: plugins}, "worker_process_setup_hook": load_plugins}
            quiet["runtime_env"] = hook
        try:
            if address is None:
                _start(
                    ray,
                    address="local",
                    num_cpus=cpus or usable_cpus(),
                    object_store_memory=_OBJECT_STORE,
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    **quiet,
                )
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            if address is None:
                raise Refused(f"Ray could not be started on this machine: {error}", code=5) from error
            raise Refused(_no_answer(address, str(error).strip().splitlines()[0])) from error
        _started_here = True
        _quieten()
    context = ray.get_runtime_context()
    url = ray._private.worker.get_dashboard_url() or ""
    return ClusterInfo(
        address=context.gcs_address,
        dashboard=f"http://{url}" if url else "",
        nodes=_nodes(ray),
        growth=_growth(ray),
        local=address is None,
    )


def _start(ray: Any, **options: Any) -> None:
    """ray.init in a thread that lives until `disconnect`: Linux kills Ray's processes when their parent *thread* ends.

    (They ask for that with PR_SET_PDEATHSIG, and whoever calls `connect` may be a thread of a pool.)
    """
    global _keeper
    started: Future[None] = Future()
    _keeper = _Keeper(threading.Event(), started, lambda: _init(ray, **options))
    _keeper.start()
    started.result()


@contextmanager
def _own_temporary(folder: str) -> Iterator[None]:
    """TMPDIR for the processes that are started meanwhile: Ray ends its own by force, so they never tidy up. Its
    session, which has the logs, stays where it would be."""
    own = {"TMPDIR": folder, "RAY_TMPDIR": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Keeper(threading.Thread):
    def __init__(self, ended: threading.Event, started: Future[None], start: Callable[[], None]) -> None:
        super().__init__(name="ray", daemon=True)
        self.ended, self._started_ray, self._start_ray = ended, started, start
        self.temporary = tempfile.mkdtemp(prefix="unclip-ray-")

    def run(self) -> None:
        try:
            with _own_temporary(self.temporary):
                self._start_ray()
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits for it
            shutil.rmtree(self.temporary, ignore_errors=True)
            ended = isinstance(error, SystemExit)  # Ray's way to say that a process of it did not start
            self._started_ray.set_exception(RuntimeError("a process of Ray ended at once") if ended else error)
            return
        self._started_ray.set_result(None)
        self.ended.wait()


def _init(ray: Any, **options: Any) -> None:
    """ray.init, again where a busy machine did not start its processes within the 30 seconds that Ray gives them."""
    for left in (2, 1, 0):
        try:
            with _unheard():
                ray.init(**options)
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@contextmanager
def _unheard() -> Iterator[None]:
    """Without file descriptor 2: the C++ core announces there that it was told to be quiet. Exceptions pass."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def disconnect() -> None:
    """Leaves the cluster; ends a local one. Does nothing where `connect` found Ray connected already."""
    global _started_here, _keeper
    if _started_here:
        _import_ray().shutdown()
        _started_here = False
    if _keeper is not None:
        _keeper.ended.set()
        shutil.rmtree(_keeper.temporary, ignore_errors=True)
        _keeper = None


def submit(address: str, entrypoint: str, working_dir: str, env: dict[str, str]) -> str:
    """Hands a shell command to a cluster's job server, with a copy of working_dir, and returns the job's id.

    address: of the dashboard, http://host:8265 or host:8265. A job that is stopped gets SIGTERM and two minutes.
    """
    url = address if "://" in address else f"http://{address}"
    if url.startswith("http"):
        try:
            with urllib.request.urlopen(url.rstrip("/") + "/api/version", timeout=_PATIENCE_S) as answer:
                answer.read()
        except (OSError, ValueError) as error:
            if not isinstance(error, urllib.error.HTTPError) or error.code not in (401, 403):
                raise Refused(
                    f"no Ray job server answers at {address} ({getattr(error, 'reason', None) or error}). Give the "
                    "dashboard's address (port 8265 as a rule), such as --address http://head:8265."
                ) from error
    else:
        _check_answers(url)
    _show_token()
    _import_ray()
    from ray.job_submission import JobSubmissionClient

    _quieten()
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
    environment = {"working_dir": working_dir, "excludes": list(_NOT_SENT), "env_vars": {**stop, **env}}
    # A head that has just started takes jobs only once the agent of a node has reported.
    young = retry_if_exception_message(match=r"(?s).*No available agent")
    try:
        return Retrying(retry=young, wait=wait_fixed(2), stop=stop_after_delay(60), reraise=True)(
            JobSubmissionClient(url).submit_job,
            entrypoint=entrypoint,
            runtime_env=environment,
            metadata={"submitted-by": "unclip"},
        )
    except (ConnectionError, RuntimeError) as error:
        raise Refused(f"the Ray job server at {address} would not take the job: {error}") from error


def _show_token() -> None:
    """Lets Ray show its token, where there is one, to a cluster that asks for it; read when Ray is imported.

    `ray start` protects a head as soon as a token exists, while a driver shows it only if told to.
    """
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN") or Path(file).is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _import_ray() -> Any:
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # what the C++ core has to say is in Ray's own log files
        "RAY_worker_niceness": "0",  # so that one fit can give way to another (FitHow.nice)
        "OMP_WAIT_POLICY": "PASSIVE",  # threads of several fits on few cores must not wait in a spin
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it takes SIGTERM from us, and aborts three seconds later
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this very environment
    }.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


def _quieten() -> None:
    import ray._private.worker as worker

    # Raylet's warnings go to the terminal whatever log_to_driver says; the one about many workers on few CPUs is of no
    # use to anybody here, since small actors are what a laptop runs.
    tell = worker.print_to_stdstream
    if not hasattr(tell, "unclip"):

        def told(data: dict[str, Any], *rest: Any, **named: Any) -> None:
            if not any("worker processes have been started" in str(line) for line in data.get("lines", ())):
                tell(data, *rest, **named)

        told.unclip = True  # type: ignore[attr-defined]
        worker.print_to_stdstream = told
    for name in ("ray", "ray.data", "ray.train", "ray.dashboard"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _nodes(ray: Any) -> tuple[Node, ...]:
    """The living nodes, the largest first."""
    resources = (node["Resources"] for node in ray.nodes() if node["Alive"])
    sizes = Counter((has.get("GPU", 0.0), has.get("CPU", 0.0)) for has in resources)
    return tuple(Node(cpus, gpus, count) for (gpus, cpus), count in sorted(sizes.items(), reverse=True))


def _growth(ray: Any) -> tuple[Node, ...]:
    """The groups of nodes that an autoscaler has told Ray of; none through Ray's client, which cannot ask."""
    if ray.util.client.ray.is_connected():
        return ()
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return tuple(
        Node(
            one.resources.get("CPU", 0), one.resources.get("GPU", 0), _UNLIMITED if one.max_count < 0 else one.max_count
        )
        for one in groups
        if one.max_count
    )


def usable_cpus() -> int:
    """CPUs that this process may use, which a local Ray gets unless it is told another number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_answers(address: str) -> None:
    """Refused unless a gRPC server answers there: Ray itself waits a minute for one, and then ends the process."""
    if address == "auto":
        return  # Ray looks for a running instance on this machine, and says at once if there is none
    place = urlsplit(address if "://" in address else f"ray-head://{address}")
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if place.scheme not in ("ray", "ray-head") or not host or not port:
        raise Refused(f"{address!r} is no Ray address; give host:6379, ray://host:10001 or auto")
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        raise Refused(_no_answer(address, error.strerror or str(error))) from error
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_PATIENCE_S)
        except grpc.FutureTimeoutError as error:
            raise Refused(_no_answer(address, "something else listens there")) from error


def _no_answer(address: str, why: str) -> str:
    return (
        f"no Ray cluster answers at {address} ({why}). Is it running (ray start --head), and the address the head's "
        "(host:6379, ray://host:10001 from outside, or auto on one of its nodes)? If it asks for a token: is the right "
        "one in RAY_AUTH_TOKEN or ~/.ray/auth_token?"
    )
