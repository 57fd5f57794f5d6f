"""Shards, CLIPs and sides for bench_embed.py: our stage, its parts by themselves, and clip-retrieval beside it.

    python -m tests.benchmarks.embedding peak SHARDS

prints the resident memory at its peak, in bytes, of a process that embeds so many shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import KEPT, SOURCE, pair_uid
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.download.images import Picture, decode_picture
from pipelines.download.shard import Outcome, pack
from pipelines.embed.stage import Embed, base_picture, chosen_rows, load_clip, picture_tensor
from pipelines.select.stage import FeatureStage, Select
from pipelines.shapes.world import picture_of, scene_of
from tests.benchmarks.measure import one_thread, status
from tests.fixtures.stages import make
from unclip.clip.model import Clip, build_clip

PEER = Path(__file__).parents[2] / ".venv-peers" / "clip-retrieval" / "bin" / "python"
SCRIPT = Path(__file__).parent / "peers" / "clip_retrieval_inference.py"

SMALL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
"""The demo's CLIP, with CLIP's whole vocabulary, which clip-retrieval's tokeniser needs."""


WORDS = ("red", "photo", "of", "the", "old", "house", "in", "a", "garden", "with", "blue", "sky", "poster", "2019")


class Took(NamedTuple):
    """What some work cost."""

    clock: float
    """Seconds that passed."""
    processor: float
    """Processor seconds of all threads and child processes."""


def timed(call: Callable[[], Any]) -> Took:
    """The cost of a call in this process."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return Took(time.perf_counter() - clock, time.process_time() - processor)


def pair(draw: np.random.Generator, number: int, side: int, shapes: bool) -> tuple[bytes, str]:
    """A picture and its caption: one of the demo's shapes, as PNG; or a likeness of a photograph from the web, as JPEG
    of img2dataset's quality, whose caption has ten words or so, rarely many."""
    out = io.BytesIO()
    if shapes:
        Image.fromarray(picture_of(number, 0, side=side)).save(out, "PNG", compress_level=1)
        return out.getvalue(), scene_of(number, 0)[1]
    coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    grain = draw.integers(-6, 7, (side, side, 3))
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue(), " ".join(draw.choice(WORDS, 3 + int(draw.gamma(2.0, 4.0))))


@dataclass(frozen=True)
class Case:
    """A CLIP with random weights, and shards of pairs in a store of their own."""

    folder: Path
    model: dict[str, Any]
    shards: int
    rows: int
    """Of each shard."""
    side: int
    """Of each picture, in pixels."""
    shapes: bool
    """Whether the pairs are the demo's; else they are like the web's."""

    @cached_property
    def store(self) -> Store:
        return open_store(str(self.folder / "store"))

    @cached_property
    def clip(self) -> Manifest:
        """The CLIP as the clip stage leaves it."""
        torch.manual_seed(0)
        action = Action("clip/1", {"seed": 0}, ())
        with self.store.scratch() as out:
            Clip.of(build_clip(self.model), self.model).save(out)
            manifest = Manifest(action, (commit(self.store, action, Record.of(action, out), out),))
        manifest.save(self.store)
        return manifest

    @cached_property
    def download(self) -> Manifest:
        """Webdataset tars and their indices, as the download stage leaves them."""
        records = []
        for shard in range(self.shards):
            draw = np.random.default_rng(shard)
            pairs = [pair(draw, shard * self.rows + row, self.side, self.shapes) for row in range(self.rows)]
            urls = [f"http://a.test/{shard}/{row}" for row in range(self.rows)]
            captions = [text for _, text in pairs]
            names = pa.array([pair_uid(*both) for both in zip(urls, captions, strict=True)], pa.binary(16))
            table = pa.table([names, urls, captions], schema=SOURCE)

            def take(positions: Any, pairs: list[tuple[bytes, str]] = pairs) -> Iterator[tuple[int, Outcome]]:
                for position in positions:
                    body = pairs[position][0]
                    found = Picture(None, body, *[self.side] * 4)
                    yield position, Outcome(KEPT, hashlib.sha256(body).digest(), found)

            action = Action("download/1", {"shard": shard}, ())
            with self.store.scratch() as out:
                made = pack(action, table, {}, take, self.store, out, self.extension)
                records.append(commit(self.store, action, made, out))
        manifest = Manifest(Action("download/1", {}, ()), tuple(records))
        manifest.save(self.store)
        return manifest

    @cached_property
    def inputs(self) -> tuple[Manifest, Manifest, Manifest]:
        """What embed needs."""
        looks = make(self.store, FeatureStage("filter"), self.download)
        return self.download, make(self.store, Select("filter"), looks, self.download), self.clip

    @property
    def tars(self) -> list[Path]:
        """The shards, as other tools read them: by names that end in .tar."""
        folder = self.folder / "tars"
        folder.mkdir(exist_ok=True)
        for number, record in enumerate(self.download.records):
            link = folder / f"{number:05d}.tar"
            if not link.exists():
                link.symlink_to(self.store.local(object_name(record.sha("images.tar"))).absolute())
        return sorted(folder.iterdir())

    @property
    def extension(self) -> str:
        """Of the pictures in the tars."""
        return "png" if self.shapes else "jpg"

    @property
    def total(self) -> int:
        """Pairs."""
        return self.shards * self.rows

    def adapter(self, precision: str = "float32") -> Clip:
        """The CLIP, loaded, its image tower built."""
        clip = load_clip(self.store, self.clip.version, "cpu", precision)
        assert clip.model
        return clip

    def embed(self, stage: Embed) -> None:
        """What an actor does, from the open store to committed records, in a folder that is thrown away."""
        for action in stage.actions(*self.inputs):
            with tempfile.TemporaryDirectory(dir=self.folder) as out:
                place = Path(out)
                stage.run(action, self.store, place).to_json(action)

    def run(self, stage: Embed) -> Took:
        """What that costs once CLIP is there."""
        self.adapter(stage.spec.precision)
        return timed(lambda: self.embed(stage))

    def bodies(self) -> list[bytes]:
        """Every picture's bytes."""
        found = []
        for action in Embed().actions(*self.inputs):
            tar, index, selection, _ = action.inputs
            data = self.store.local(object_name(tar)).read_bytes()
            rows = chosen_rows(self.store, index, selection)
            places = zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True)
            found += [data[offset : offset + length] for offset, length in places]
        return found


def decode(clip: Clip, bodies: list[bytes], side: int) -> None:
    """Each picture from bytes in memory to what CLIP sees and what is stored, and nothing else."""
    for body in bodies:
        image = decode_picture(body)
        assert image is not None
        clip.preprocess(picture_tensor(image)).to(clip.dtype)
        base_picture(image, side)


@torch.no_grad()
def forward(clip: Clip, images: torch.Tensor, tokens: torch.Tensor, calls: int) -> None:
    """The bare open_clip model on one batch that lies in memory, both towers, so many times."""
    for _ in range(calls):
        clip.model.encode_image(images)  # type: ignore[operator]
        clip.model.encode_text(tokens)  # type: ignore[operator]


def by_turns(clip: Clip, images: torch.Tensor, tokens: torch.Tensor, bodies: list[bytes], side: int) -> None:
    """Both, a batch each, and nothing else."""
    for at in range(0, len(bodies), len(images)):
        decode(clip, bodies[at : at + len(images)], side)
        forward(clip, images, tokens, 1)


class Peer:
    """clip-retrieval in an environment of its own, kept running: loaded and warm before anything is timed."""

    def __init__(self, case: Case, batch: int, workers: int) -> None:
        clip = case.adapter()
        folder = case.folder / "peer"
        folder.mkdir(exist_ok=True)
        (folder / "peer.json").write_text(json.dumps(clip.config))
        torch.save(clip.state, folder / "peer.pt")
        self.out = folder / "out"
        asked = {
            "config": str(folder / "peer.json"), "weights": str(folder / "peer.pt"), "out": str(self.out),
            "tars": [str(path) for path in case.tars], "batch": batch, "workers": workers,
            "extension": case.extension,
        }  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        self._process = subprocess.Popen(
            [PEER, SCRIPT, json.dumps(asked)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.about = self._answer()

    def run(self) -> Took:
        """One inference over all tars."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Took(answer["clock"], answer["processor"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:  # what it prints of its own is passed over
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"clip-retrieval ended with code {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def main() -> None:
    """Resident memory at its peak of embedding shards of 100 pairs one after the other."""
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder), SMALL, int(sys.argv[2]), 100, 128, shapes=True)
        case.embed(Embed())
    print(status("VmHWM"))


if __name__ == "__main__":
    main()
