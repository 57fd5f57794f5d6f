"""A shard's captions → text embeddings, in calls of one shape each, so that none depends on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from infra.errors import Refused
from pipelines.embed.prefetch import DeviceCopier

if TYPE_CHECKING:
    from torch import Tensor

    from unclip.clip import Clip


class Captions:
    """The captions of some rows, read by CLIP when they are asked for, each once.

    lengths: what captions are filled up to, in tokens: each to the least that holds it, or else to CLIP's context.
    batch: captions of a call. Those of one length go together, in the order of the rows, and the last call of each
    length is filled up with empty ones; so a call may read captions of rows that are asked for much later.
    """

    def __init__(
        self, clip: Clip, lane: DeviceCopier, captions: Sequence[str], lengths: Sequence[int], batch: int
    ) -> None:
        import torch

        if lengths and not clip.ignores_padding:
            raise Refused(
                "embed.lengths: the text tower of this CLIP sees what captions are filled up with, so their embeddings "
                "would depend on it. Leave embed.lengths out."
            )
        self._clip, self._lane, self._batch = clip, lane, batch
        self._ids = clip.tokenize(captions)
        self._empty = clip.tokenize([""])
        self._embeddings = torch.empty(len(captions), clip.embedding_width)
        context = self._ids.shape[1]
        stops = np.array(sorted({*(length for length in lengths if length < context), context}))
        used = self._ids.argmax(1).numpy() + 1  # the end token has the largest id
        self._calls: list[tuple[int, np.ndarray]] = []  # tokens, rows
        self._call = np.empty(len(captions), np.int64)  # of each row
        for place, stop in enumerate(stops):
            rows = np.flatnonzero(np.searchsorted(stops, used) == place)
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                self._call[part] = len(self._calls)
                self._calls.append((int(stop), part))
        self._asked: set[int] = set()
        self._due: dict[int, Callable[[], Tensor]] = {}

    def ask(self, rows: Sequence[int]) -> None:
        """Begins to read what is not yet read of these rows' captions."""
        for number in sorted({*self._call[list(rows)].tolist()} - self._asked):
            self._asked.add(number)
            length, part = self._calls[number]
            spare = self._empty[:, :length].expand(self._batch - len(part), -1)
            ids = self._lane.send([self._ids[part, :length], spare])
            self._due[number] = self._lane.fetch(self._clip.encode_tokens(ids).embedding[: len(part)])

    def take(self, rows: Sequence[int]) -> Tensor:
        """Embeddings of rows that were asked for, raw float32 [rows, d], on the CPU."""
        places = list(rows)
        for number in {*self._call[places].tolist()} & self._due.keys():
            _, part = self._calls[number]
            self._embeddings[part] = self._due.pop(number)()
        return self._embeddings[places]
