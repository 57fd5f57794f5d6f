"""What every page for people is made with: a template that escapes, numbers as a person reads them, small pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.records import Manifest

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 96
"""Pixels of the longer side of an example."""


def stage_line(name: str, manifest: Manifest) -> dict[str, Any]:
    """A stage's version and how much it made."""
    return {
        "name": name,
        "version": manifest.version,
        "shards": len(manifest.records),
        "rows": manifest.rows,
        "bytes": sum(file.bytes for record in manifest.records for file in record.files.values()),
    }


def render(template: Path, page: dict[str, Any]) -> str:
    """The HTML of a page. All text is escaped: captions, prompts and addresses are strangers' words."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=count, percent=percent, size=size)
    return environment.get_template(template.name).render(page)


def thumbnail(image: Image | None) -> str | None:
    """A small copy of a picture as a data URI."""
    if image is None:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def count(number: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{number:,.0f}".replace(",", "\u202f")


def percent(share: float) -> str:
    """A share of 1 as per cent."""
    return f"{100 * share:.1f}\u202f%"


def size(number: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f}\u202f{unit}" if unit == "B" else f"{number:.1f}\u202f{unit}"
        number /= 1000
    return f"{number:.1f}\u202fTB"


def names_samples(page: bytes, uids: Iterable[bytes]) -> bool:
    """Whether one of these samples is among the examples of a page, which names each by the first digits of its uid."""
    named = {*re.findall(rb"<code>([0-9a-f]{12})</code>", page)}
    return any(uid.hex()[:12].encode() in named for uid in uids)
