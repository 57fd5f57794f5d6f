"""What a shard's tar is made of."""

from __future__ import annotations

import string
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from pipelines.download.shard import header


@given(st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_a_header_is_what_tarfile_writes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)
