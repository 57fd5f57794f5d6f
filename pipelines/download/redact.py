"""A shard of pictures without some of its rows: the bytes that the download itself would have written without them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from infra.errors import Refused
from infra.records import blank_rows


def redact_tar(tar: Path, index: pa.Table, gone: np.ndarray, target: Path) -> pa.Table:
    """Copies a tar without the pictures of those rows (bool [rows]) to target, and returns the index that fits it.

    Samples stay in their order, each of three members beginning with its picture. Refused, code 5, where the tar is not
    what the index says.
    """
    out = blank_rows(index, gone)
    kept = {
        uid.hex(): row
        for row, (uid, offset) in enumerate(zip(out["uid"].to_pylist(), out["offset"].to_pylist(), strict=True))
        if offset is not None
    }
    offsets: list[int | None] = [None] * out.num_rows
    try:
        with (
            tarfile.open(tar, "r:") as old,
            tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new,
        ):
            for member in old:
                row = kept.get(member.name.partition(".")[0])
                if row is None:
                    continue
                if offsets[row] is None:
                    offsets[row] = new.offset + tarfile.BLOCKSIZE  # behind the member's header of one block
                new.addfile(member, old.extractfile(member))
    except tarfile.TarError as error:
        raise Refused(f"{tar} is damaged: it is no tar ({error})", code=5) from error
    if missing := [name for name, row in kept.items() if offsets[row] is None]:
        raise Refused(f"{tar} is damaged: it has no picture of row {missing[0]}, which its index names", code=5)
    where = index.column_names.index("offset")
    return out.set_column(where, index.schema.field("offset"), pa.array(offsets, index.schema.field("offset").type))
