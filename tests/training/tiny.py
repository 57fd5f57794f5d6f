"""A store with a little of everything that trainers read: tars, indices, embeddings, selections, statistics, a CLIP."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from infra.records import schemas as rows
from infra.records.commits import commit
from infra.records.manifest import Action, Block, Manifest, Record
from infra.store.base import Store
from infra.store.local import LocalStore
from training.job import Job
from training.objectives.base import read_clip
from unclip.clip.model import Clip
from unclip.clip.text import TextTower
from unclip.models.classifier import ClassifierConfig
from unclip.models.decoder import Decoder
from unclip.models.noised_clip import NoisedClipConfig
from unclip.presets import TINY
from unclip.release.model import save_model

SIDE = 64
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}
UNSPOILED: dict[int, float] = {}
WORDS = ("red", "green", "blue", "round", "large", "small", "square", "a", "the", "on")


@dataclass(frozen=True)
class Tiny:
    """Versions of the manifests, and what is in them."""

    store: Store
    download: str
    filter: str
    embed: str
    curate: str
    statistics: str
    clip: str
    kept: dict[bytes, tuple[str, np.ndarray]]
    """uid → (caption, picture uint8 [3, SIDE, SIDE]) of every row that curate keeps."""
    labels: dict[bytes, tuple[str | None, int | None]]
    """uid → shade and number of every row of the list: columns that the indices carry; either may be missing."""

    def job(self, kind: str, key: str = "k", **train: Any) -> Job:
        """A fit of the tiny preset on this store."""
        data = {"rows": self.embed, "selection": self.curate, "statistics": self.statistics, "clip": self.clip}
        if kind == "clip":
            return Job("clip", key, kind, CLIP, train, {"rows": self.download, "selection": self.filter})
        upsampler = replace(TINY.upsamplers[0], low=16, size=32)
        models: dict[str, Any] = {"prior": TINY.prior, "ar_prior": TINY.ar_prior, "decoder": TINY.decoder}
        models["inpainter"] = replace(TINY.decoder, inpaint=True)
        assert TINY.encoder is not None
        models["classifier"] = ClassifierConfig(**vars(TINY.encoder), labels=("shade", "number"))
        models["noised_clip"] = NoisedClipConfig(**vars(TINY.encoder), embedding=32)
        return Job(kind, key, kind, asdict((models | {"upsampler": upsampler})[kind]), train, data)

    def startable(self, kind: str, key: str = "k", **train: Any) -> Job:
        """The same, with the decoder that an inpainter goes on from: one that was never trained."""
        job = self.job(kind, key, **train)
        if kind != "inpainter":
            return job
        with self.store.scratch() as folder, torch.random.fork_rng():
            torch.manual_seed(0)
            fingerprint = read_clip(self.store, self.clip).fingerprint
            save_model(folder / "start", "decoder", TINY.decoder, Decoder(TINY.decoder).state_dict(), clip=fingerprint)
            return replace(job, data=job.data | {"start": stored(self.store, folder / "start")})


def tiny(
    root: Path,
    *,
    shards: int = 3,
    count: int = 40,
    group: int = 16,
    seed: int = 0,
    spoiled: dict[int, float] = UNSPOILED,
    model: dict[str, Any] = CLIP,
    base: int = 16,
    merges: Sequence[str] | None = None,
) -> Tiny:
    """shards × count rows, of which every fifth is not downloaded and every seventh of the rest rejected by curate.

    spoiled: shard → the factor by which all of its image embeddings are too large; model: open_clip's configuration of
    the CLIP; base: side of the stored pictures, a divisor of SIDE; merges: its tokeniser's, by default open_clip's.
    """
    width: int = model["embed_dim"]
    store, random = LocalStore(root), np.random.default_rng(seed)
    store.check(create=True)
    downloads, filters, embeds, curates = [], {}, [], {}
    kept: dict[bytes, tuple[str, np.ndarray]] = {}
    labels: dict[bytes, tuple[str | None, int | None]] = {}
    for shard in range(shards):
        pictures, index, table = _shard(random, shard, count, labels, spoiled.get(shard, 1.0), width, base)
        download = committed(store, f"download-{shard}", {"images.tar": _tar(pictures), "index.parquet": index}, group)
        downloads.append(download)
        sha, uids = download.sha("index.parquet"), table["uid"].to_pylist()
        filters[f"{sha}.parquet"] = selection(uids, set())
        facts = {"tar": download.sha("images.tar"), "index": sha, "selection": ""}
        embeds.append(committed(store, f"embed-{shard}", {"rows.parquet": parquet(table, group)}, group, facts))
        rejected = set(uids[::7])
        curates[f"{embeds[-1].sha('rows.parquet')}.parquet"] = selection(uids, rejected)
        captions = table["caption"].to_pylist()
        for uid, caption in zip(uids, captions, strict=True):
            if uid not in rejected:
                kept[uid] = (caption, pictures[uid])
    clip = Clip(model, _text_tower(model), merges=merges)
    with store.scratch() as folder:
        clip.save(folder / "clip")
        files = {path.name: path.read_bytes() for path in (folder / "clip").iterdir()}
        statistics = {name: torch.zeros(width) for name in ("image_mean", "text_mean")}
        statistics |= {name: torch.ones(width) for name in ("image_std", "text_std", "eigenvalues")}
        save_file(statistics | {"pca": torch.eye(width), "count": torch.tensor(count)}, folder / "s")
        statistics_file = (folder / "s").read_bytes()
    return Tiny(
        store,
        listed(store, downloads),
        listed(store, [committed(store, "filter", filters)]),
        listed(store, embeds),
        listed(store, [committed(store, "curate", curates)]),
        listed(store, [committed(store, "statistics", {"statistics.safetensors": statistics_file})]),
        listed(store, [committed(store, "clip", files)]),
        kept,
        labels,
    )


def stored(store: Store, folder: Path) -> str:
    """The version of a manifest of one record, which holds the files of that folder."""
    return listed(store, [committed(store, folder.name, {path.name: path.read_bytes() for path in folder.iterdir()})])


def stored_tree(store: Store, folder: Path) -> str:
    """The same of a folder with folders in it, such as a release."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    action = Action("test/1", {"name": folder.as_posix()}, ())
    with store.scratch() as out:
        for name, path in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(path.read_bytes())
        return listed(store, [commit(store, action, Record.of(action, out), out)])


def _shard(
    random: np.random.Generator,
    shard: int,
    count: int,
    labels: dict[bytes, tuple[str | None, int | None]],
    factor: float,
    width: int,
    base: int,
) -> tuple[dict[bytes, np.ndarray], bytes, pa.Table]:
    """Pictures by uid, index.parquet, and the table of the embedded rows; adds the rows' labels to `labels`."""
    captions = [" ".join(random.choice(WORDS, 4)) for _ in range(count)]
    urls = [f"http://a.test/{shard}/{number}.png" for number in range(count)]
    uids = [rows.uid(url, caption) for url, caption in zip(urls, captions, strict=True)]
    there = [number % 5 != 4 for number in range(count)]
    # blocks of one colour a quarter, so that a mixed-up picture is found out
    pictures = {
        uid: np.repeat(np.repeat(random.integers(0, 256, (3, 4, 4), np.uint8), SIDE // 4, 1), SIDE // 4, 2)
        for uid, here in zip(uids, there, strict=True)
        if here
    }
    said: dict[bytes, tuple[str | None, int | None]] = {
        uid: (
            ("light" if _is_light(pictures[uid]) else "dark") if uid in pictures and number % 6 else None,
            int(uid[0]) % 3 * 5 if number % 9 else None,
        )
        for number, uid in enumerate(uids)
    }
    labels |= said
    offset, spans = 0, {}
    for uid, picture in pictures.items():
        length = len(png(picture))
        spans[uid] = (offset + 512, length)
        offset += 512 + -(-length // 512) * 512
    index = pa.table(
        {
            "uid": pa.array(uids, rows.UID),
            "url": urls,
            "caption": captions,
            "state": ["kept" if here else "http-404" for here in there],
            "offset": pa.array([spans.get(uid, (None, None))[0] for uid in uids], pa.int64()),
            "length": pa.array([spans.get(uid, (None, None))[1] for uid in uids], pa.int64()),
            "width": pa.array([SIDE] * count, pa.int32()),
            "height": pa.array([SIDE] * count, pa.int32()),
            "sha256": pa.array([bytes(32)] * count, pa.binary(32)),
            "shade": pa.array([said[uid][0] for uid in uids], pa.string()),
            "number": pa.array([said[uid][1] for uid in uids], pa.int64()),
        },
        pa.schema([*rows.INDEX, ("shade", pa.string()), ("number", pa.int64())]),
    )
    kept = [number for number, here in enumerate(there) if here]
    vectors = random.standard_normal((2, len(kept), width)).astype(np.float32)
    vectors[0] *= np.float32(factor)
    stored = slice(SIDE // base // 2, None, SIDE // base)
    images = [png(pictures[uids[number]][:, stored, stored]) for number in kept]
    table = pa.table(
        {
            "uid": pa.array([uids[number] for number in kept], rows.UID),
            "caption": [captions[number] for number in kept],
            "image_embedding": pa.FixedSizeListArray.from_arrays(vectors[0].ravel(), width),
            "text_embedding": pa.FixedSizeListArray.from_arrays(vectors[1].ravel(), width),
            "score": pa.array(np.zeros(len(kept), np.float32)),
            "image": pa.array(images, pa.binary()),
            "url": [urls[number] for number in kept],
        },
        rows.embedded(width),
    )
    return pictures, parquet(index, 1000), table


def _is_light(picture: np.ndarray) -> bool:
    return bool(picture.mean() > 127.5)


def png(picture: np.ndarray) -> bytes:
    """uint8 [3, h, w] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(buffer, "png")
    return buffer.getvalue()


def _tar(pictures: dict[bytes, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for uid, picture in pictures.items():
            info = tarfile.TarInfo(f"{uid.hex()}.png")
            info.size = len(data := png(picture))
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(table: pa.Table, group: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


def selection(uids: list[bytes], rejected: set[bytes]) -> bytes:
    rules = pa.array(["rule" if uid in rejected else None for uid in uids], pa.string())
    return parquet(pa.table({"uid": pa.array(uids, rows.UID), "rule": rules}, rows.SELECTION), 1000)


def committed(
    store: Store, name: str, files: dict[str, bytes], group: int = 0, facts: dict[str, Any] | None = None
) -> Record:
    action = Action("test/1", {"name": name}, ())
    with store.scratch() as out:
        for file, data in files.items():
            (out / file).write_bytes(data)
        parquet = next((file for file in ("rows.parquet", "index.parquet") if group and file in files), None)
        blocks = []
        if parquet:
            count = pq.read_metadata(out / parquet).num_rows
            blocks = [Block(parquet, first, min(group, count - first)) for first in range(0, count, group)]
        return commit(store, action, Record.of(action, out, blocks=blocks, facts=facts), out)


def listed(store: Store, records: list[Record]) -> str:
    return Manifest(Action("test/1", {}, ()), tuple(records)).save(store)


def _text_tower(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = TextTower(model)
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.normal_(0, 0.1)
        return dict(tower.state_dict())
