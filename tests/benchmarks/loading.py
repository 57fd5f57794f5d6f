"""Rows to load, in a store and in tars for webdataset, made without models, of the sizes that real ones have."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from infra.records import schemas as rows
from infra.store.base import Store
from infra.store.local import LocalStore
from tests.fixtures.fits import committed, listed, parquet, selection

WIDTH, BASE, LARGE = 768, 64, 256
"""ViT-L/14's embeddings, the decoder's side and that of the pictures in the tars, in pixels."""
GROUP = 256


@dataclass(frozen=True)
class Files:
    """Versions in the store, and tars for webdataset of what the store holds as Parquet."""

    store: Store
    download: str
    filter: str
    embed: str
    curate: str
    rows: int
    tars: list[str]
    """images.tar of each shard: picture, caption and facts, as the store has them."""
    vectors: list[str]
    """The same payload as the prior's rows: one .npy of both embeddings, and the caption."""
    bases: list[str]
    """The same payload as the decoder's rows: the base picture as PNG, one .npy, and the caption."""


def files(root: Path, shards: int, count: int, pictures: int = 64) -> Files:
    """shards × count rows, all of them kept, over so many different pictures."""
    store, random = LocalStore(root / "store"), np.random.default_rng(0)
    store.check(create=True)
    drawn = [_picture(random) for _ in range(pictures)]
    large = [_encoded(picture, "jpeg", quality=95) for picture in drawn]
    base = [_encoded(picture.resize((BASE, BASE), Image.Resampling.BOX), "png") for picture in drawn]
    downloads, embeds, filters, curates = [], [], {}, {}
    found: dict[str, list[str]] = {"tars": [], "vectors": [], "bases": []}
    for shard in range(shards):
        urls = [f"http://a.test/{shard}/{row}.jpg" for row in range(count)]
        captions = [f"a photograph of thing {row} with {row % 7} others on shelf {shard}" for row in range(count)]
        uids = [rows.pair_uid(url, caption) for url, caption in zip(urls, captions, strict=True)]
        vectors = random.standard_normal((count, 2, WIDTH)).astype(np.float32)
        samples = list(zip(uids, captions, range(count), strict=True))
        tar, offsets = _tar((uid, {"jpg": large[n % pictures], "txt": text.encode()}) for uid, text, n in samples)
        index = pa.table(
            {
                "uid": pa.array(uids, rows.UID), "url": urls, "caption": captions, "state": [rows.KEPT] * count,
                "offset": pa.array(offsets, pa.int64()),
                "length": pa.array([len(large[n % pictures]) for n in range(count)], pa.int64()),
                "width": pa.array([LARGE] * count, pa.int32()), "height": pa.array([LARGE] * count, pa.int32()),
                "sha256": pa.array([bytes(32)] * count, pa.binary(32)),
            },
            rows.INDEX,
        )  # fmt: skip
        download = committed(
            store, f"download-{shard}", {"images.tar": tar, "index.parquet": parquet(index, GROUP)}, GROUP
        )
        table = pa.table(
            {
                "uid": pa.array(uids, rows.UID), "caption": captions,
                "image_embedding": pa.FixedSizeListArray.from_arrays(vectors[:, 0].ravel(), WIDTH),
                "text_embedding": pa.FixedSizeListArray.from_arrays(vectors[:, 1].ravel(), WIDTH),
                "score": pa.array(np.zeros(count, np.float32)),
                "image": pa.array([base[n % pictures] for n in range(count)], pa.binary()), "url": urls,
            },
            rows.embedded_schema(WIDTH),
        )  # fmt: skip
        facts: dict[str, Any] = {"tar": download.sha("images.tar"), "index": download.sha("index.parquet")}
        embed = committed(store, f"embed-{shard}", {"rows.parquet": parquet(table, GROUP)}, GROUP, facts)
        filters[f"{facts['index']}.parquet"] = selection(uids, set())
        curates[f"{embed.sha('rows.parquet')}.parquet"] = selection(uids, set())
        downloads.append(download), embeds.append(embed)
        npy = [_npy(vector) for vector in vectors]
        parts: dict[str, Iterator[tuple[bytes, Mapping[str, bytes]]]] = {
            "vectors": ((uid, {"npy": npy[n], "txt": text.encode()}) for uid, text, n in samples),
            "bases": (
                (uid, {"png": base[n % pictures], "npy": npy[n], "txt": text.encode()}) for uid, text, n in samples
            ),
        }
        for name, members in parts.items():
            path = root / f"{name}-{shard}.tar"
            path.write_bytes(_tar(members)[0])
            found[name].append(str(path))
        found["tars"].append(str(store.local(f"objects/{facts['tar'][:2]}/{facts['tar']}")))
    return Files(
        store,
        listed(store, downloads),
        listed(store, [committed(store, "filter", filters)]),
        listed(store, embeds),
        listed(store, [committed(store, "curate", curates)]),
        shards * count,
        **found,
    )


def _picture(random: np.random.Generator) -> Image.Image:
    """Something between a photograph and noise: blurred patches of colour with a little grain."""
    patches = random.integers(0, 256, (LARGE // 8, LARGE // 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((LARGE, LARGE), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + random.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def _encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def _npy(vector: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()


def _tar(samples: Iterator[tuple[bytes, Mapping[str, bytes]]]) -> tuple[bytes, list[int]]:
    """A tar of those samples, and where the first member of each begins in it."""
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for uid, members in samples:
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{uid.hex()}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue(), offsets
