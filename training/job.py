"""What a fit is asked to do: the job (in its key, byte for byte) and the how (workers, threads, cadence; in no key).

The options of each objective stand in a class of their own, so that an option of another kind is an unknown one.
Nothing heavy is imported here: the command line and the driver read these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from infra.errors import Refused
from training.options import KINDS, TrainConfig
from unclip.config import AMOUNT, COUNT, FRACTION, SEED, WHOLE, Range, outside

SHARDS = ("auto", "flat", "fsdp")
START = "start"
"""The role, in a job's data, of the version that a fit goes on from."""


@dataclass(frozen=True)
class Job:
    """One model to fit. Plain JSON throughout; it travels to workers."""

    stage: str
    """Name of the stage, for progress and metrics."""
    key: str
    """Key of the fit's action: its checkpoints lie under `checkpoints/<key>/`."""
    kind: str
    """One of `training.options.KINDS`."""
    model: dict[str, Any]
    """The model's configuration as a plain dict (PriorConfig, …; for clip an open_clip model configuration)."""
    train: dict[str, Any]
    """The training options as a plain dict: the fields of `KINDS[kind].options`."""
    data: dict[str, str]
    """Role → manifest version. rows and selection always; statistics and clip for the priors, the decoder and the
    inpainter, clip for a noised CLIP; start, which an inpainter needs and any may have: the finished model, or the
    release with one, that it goes on from (training/warm_start.py)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Refused(f"a fit of kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")

    @property
    def config(self) -> TrainConfig:
        """The training options; Refused for an unknown or impossible one."""
        options = KINDS[self.kind].options
        known = {field.name for field in fields(options)}
        if unknown := sorted(set(self.train) - known):
            raise Refused(f"{self.stage}: unknown training option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return options(**self.train)


@dataclass(frozen=True)
class FitHow:
    """How a fit is run. None of it is in a key.

    `threads`, `workers`, `shard`, `compile` and `channels_last` are the exception that DESIGN allows: the order of sums
    depends on them, so "identical when recomputed" means at the same ones (and on the same type of device).
    """

    workers: int = 1
    """Processes that train together."""
    least_workers: int = 0
    """As few of them as this begin or go on where the cluster holds no more, and more join once it does; 0: all or
    none."""
    shard: str = "auto"
    """`flat`: every worker holds the whole model. `fsdp`: a shard of each of its tensors. `auto`: fsdp for a model that
    one GPU does not hold."""
    threads: int = 1
    """Torch threads of each."""
    cpus: float = 1
    """CPUs that Ray reserves for each."""
    gpus: float = 0
    """GPUs that Ray reserves for each; with any, the model lives on the first."""
    checkpoint_seconds: float = 60
    """Seconds between checkpoints, at least: none begins while one is written. 0: one behind the other."""
    keep: int = 2
    """Newest checkpoints that are kept while it trains."""
    keep_best: str = ""
    """The name of a metric, such as `loss`: the checkpoint at which it was least is kept too."""
    overlap: bool = True
    """Training goes on while a checkpoint is written."""
    store_wait_s: float = 600
    """Seconds for which a store that does not answer, or has no room, is waited for; what was to be written is kept
    meanwhile. Less than the 1,800 for which workers wait for each other."""
    compile: bool = False
    """The network is compiled (torch.compile), which takes minutes at each start, and a C++ compiler on a CPU."""
    channels_last: bool = False
    """Convolutions have their channels last in memory, as GPUs with tensor cores like them."""
    recompute: bool = False
    """Blocks keep their input alone and are computed a second time for the gradient: the same bytes in less memory and
    about a third more time (activation checkpointing)."""
    deterministic: bool = False
    """Operations whose result depends on chance, as some do on GPUs, are replaced or refused; slower there."""
    log_seconds: float = 1.5
    """Seconds between metrics."""
    system_seconds: float = 10
    """Seconds between figures of the machine (CPU, memory, disk, network, GPUs) among them; 0: none."""
    preview_share: float = 0.01
    """Part of the training's time that may go into previews: what priors, decoders and upsamplers draw of a few rows
    with their averaged weights. 0: none. A model in shards shows none."""
    peak_tflops: float = 0
    """Peak of each worker's device in 10¹² operations a second at the precision that it trains in, for the metric
    `mfu`; 0: what its fastest matrix product reaches, measured as training starts."""
    cache_bytes: int = 1 << 30
    """Rows kept in memory, a worker: with their pictures decoded where all pictures have room, else encoded. It should
    hold `window` blocks for each lane of the worker; a fit that wants more of it says so."""
    decoders: int = 1
    """Threads that decode pictures; the batches do not depend on it."""
    prefetch: int = 2
    """Micro-batches prepared ahead."""
    nice: int = 0
    """Niceness on a shared machine (0–19): larger gives way to the fits that take longer, and starts that many seconds
    after them."""
    max_failures: int = 3
    """Restarts after a worker dies."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("workers", "threads", "decoders", "prefetch", "keep"), COUNT)
        names = ("cpus", "gpus", "log_seconds", "system_seconds", "checkpoint_seconds", "peak_tflops")
        amounts = dict.fromkeys(names, AMOUNT) | {"preview_share": FRACTION}
        ranges = {"cache_bytes": SEED, "nice": Range(0, 19), "max_failures": WHOLE, "least_workers": WHOLE}
        ranges["store_wait_s"] = Range(0, 1500)
        if wrong := outside(self, **counts, **amounts, **ranges):
            raise Refused(wrong)
        if self.shard not in SHARDS:
            raise Refused(f"shard is {self.shard!r}; use one of {', '.join(SHARDS)}")
        if self.least_workers > self.workers:
            raise Refused(f"least_workers is {self.least_workers}, more than the {self.workers} workers")

    @property
    def fewest(self) -> int:
        """Workers without which it does not begin."""
        return self.least_workers or self.workers
