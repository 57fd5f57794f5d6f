"""Warm starts: a fit that goes on from a finished model, a record's or a release's, at a learning rate of its own.

What belongs to the finished model stays its own: statistics of embeddings, principal components, the empty text, tables
of classes, CLIP's preprocessing. New data are seen through them, as the weights were trained to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from infra.records import materialised
from infra.store import Store
from training.job import START, Job
from training.options import KINDS
from unclip.errors import Refused
from unclip.release import MANIFEST, read_model_config, warm_start


@contextmanager
def finished_model(job: Job, store: Store) -> Iterator[Path]:
    """The folder of the model that a job goes on from: the version's own, or the component of a release.

    Raises Refused for a release that lacks it.
    """
    with materialised(store, job.data[START]) as folder:
        if (folder / MANIFEST).is_file():
            names = [job.stage, *KINDS[job.kind].from_kinds]
            there = [folder / name for name in names if (folder / name).is_dir()]
            if not there:
                parts = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
                raise Refused(f"{job.stage}: the release that it starts from has none; it has {parts}")
            folder = there[0]
        yield folder


def inherit_fields(job: Job, store: Store, config: Any, *fields: str) -> Any:
    """A model's configuration with the fields that data decide as the finished model has them, if there is one."""
    from dataclasses import replace

    if START not in job.data:
        return config
    with finished_model(job, store) as folder:
        found, _ = read_model_config(folder, job.kind)
    return replace(config, **{name: getattr(found, name) for name in fields})


def warm_started(model: nn.Module, job: Job, store: Store, clip: str | None = None) -> nn.Module:
    """A new model with the weights and buffers of the finished one, if the job names one.

    clip: the fingerprint of the CLIP that it has to have been trained on. Raises Refused where they do not fit.
    """
    if START in job.data:
        with finished_model(job, store) as folder:
            warm_start(model, folder, job.kind, *KINDS[job.kind].from_kinds, clip=clip)
    return model
