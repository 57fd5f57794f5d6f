"""What is wrong with a list that cannot be read, in words: what it is instead, the line if it is known, what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OTHERS = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it first",
    b"BZh": "it is compressed with bzip2; unpack it first",
    b"PK\x03\x04": "it is a zip archive; unpack it first",
    b"PAR1": "it is a Parquet file; give it the ending .parquet",
    b"\xff\xfe": "it is written in UTF-16; write it in UTF-8",
    b"\xfe\xff": "it is written in UTF-16; write it in UTF-8",
}
"""First bytes of a file → what it is, where it should be something else."""
ADVICE = {
    "invalid UTF8": "write it in UTF-8",
    "straddling object": "a row is longer than 1 MB, as where a quote is opened and not closed; leave it out",
    "utf-8": "write it in UTF-8",
    "Expected": "a value that holds the separator must stand in quotes",
    "magic bytes not found": "it is cut off, or no Parquet file; get it again",
    "Corrupt": "get it again",
    "conversion error": "keep no such column, or write one kind of value in it",
    "specified twice": "give each key a name of its own",
    "multiple columns named": "give each column a name of its own",
    "duplicate field names": "give each column a name of its own",
}
_LONGEST = 1 << 20


def describe_error(path: Path, error: BaseException) -> str:
    """Why a list file cannot be read, in one line; error: what Arrow or the file system said of it."""
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    if not begin:
        return "it is empty; leave it out"
    for sign, said in OTHERS.items():
        if begin.startswith(sign) and not said.endswith(path.suffix):
            return said
    if path.suffix == ".jsonl" and (found := bad_line(path)):
        return found
    said = " ".join(str(error).split())
    for introduction in ("input source", "Invalid: "):  # behind which Arrow says what it is
        said = said.rpartition(introduction)[2]
    said = said.rpartition(f"'{path}': ")[2][:300]
    advice = next((advice for sign, advice in ADVICE.items() if sign in said), "")
    return f"{said.rstrip(' :.')}; {advice}" if advice else said


def bad_line(path: Path) -> str:
    """The first line of JSON lines that is no JSON object, or has in a key another kind of value than lines before it;
    "" where there is none. Arrow counts lines from the beginning of a block, which nobody knows."""
    kinds: dict[str, str] = {}
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                return f"line {number:,} is longer than 1 MB; leave it out"
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                return f"line {number:,} is not written in UTF-8"
            except (ValueError, RecursionError) as error:
                return f"line {number:,} is no JSON ({error}); write one object a line"
            if not isinstance(value, dict):
                return f"line {number:,} is {_kind(value)}; write one object a line"
            for key, one in value.items():
                if one is not None and kinds.setdefault(key, _kind(one)) != _kind(one):
                    return f"line {number:,} has {_kind(one)} in {key!r}, and lines before it {kinds[key]}"
    return ""


def never_closed(path: Path, last: str | None) -> bool:
    """Whether the last value of a CSV or TSV file was opened by a quote that nothing closes: then it took in all rows
    to the file's end, of which Arrow says nothing."""
    if last is None or not last.endswith(("\n", "\r")):
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST))
        return not file.read().rstrip(b"\r\n").endswith(b'"')


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "a truth value", dict: "an object", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), "a number")
