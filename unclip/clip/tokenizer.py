"""CLIP's byte-pair tokeniser, equal to open_clip's and without its twelve-second import.

The merges travel in the model's folder, so a release says itself how its prompts are cut. A vocabulary smaller than
CLIP's 49,408 keeps the first merges only: the same algorithm, rarer words in more pieces, a smaller embedding table.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from unclip.errors import Refused

CLIP_VOCABULARY = 49_408
BYTES = 256
SPECIAL = ("<start_of_text>", "<end_of_text>")
# Twice the bytes (inside and at the end of a word), and the two special tokens.
FIXED = 2 * BYTES + len(SPECIAL)


@lru_cache
def clip_merges() -> tuple[str, ...]:
    """All of CLIP's merges, "left right", the most frequent first; read from the installed open_clip as data."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise Refused("CLIP's merges come from the package open_clip_torch, which is not installed: install it")
    text = gzip.decompress(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    return tuple(text.split("\n")[1 : CLIP_VOCABULARY - FIXED + 1])


class Tokenizer:
    """Text → token ids: [start, pieces…, end, 0…], always `context` long.

    `vocabulary` is what the text tower's table holds; start and end are its two last ids, so the end token is the
    largest id of every row, as CLIP's pooling expects.
    """

    def __init__(self, context: int, vocabulary: int = CLIP_VOCABULARY, merges: Sequence[str] | None = None) -> None:
        count = vocabulary - FIXED
        available = clip_merges() if merges is None else tuple(merges)
        if not 0 <= count <= len(available):
            raise Refused(
                f"a vocabulary of {vocabulary} tokens is impossible with CLIP's tokeniser: "
                f"it has from {FIXED} to {FIXED + len(available)}"
            )
        if context < 3:
            raise Refused(f"a context of {context} tokens holds no text: start and end take two of them")
        self.context = context
        self.merges = available[:count]
        self.start, self.end = vocabulary - 2, vocabulary - 1
        alphabet = _printable()
        pieces = [*alphabet.values(), *(letter + "</w>" for letter in alphabet.values())]
        pieces += [merge.replace(" ", "") for merge in self.merges]
        self._alphabet = alphabet
        self._ids = {piece: number for number, piece in enumerate([*pieces, *SPECIAL])}
        self._ranks = {tuple(merge.split()): rank for rank, merge in enumerate(self.merges)}
        self._cache: dict[str, list[int]] = {special: [self._ids[special]] for special in SPECIAL}

    @property
    def digest(self) -> str:
        """SHA-256 over the merges: what tells two tokenisers of one size apart."""
        return hashlib.sha256("\n".join(self.merges).encode()).hexdigest()

    @property
    def ids(self) -> dict[str, int]:
        """Piece → id, start and end tokens included; a fresh copy."""
        return dict(self._ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start and end."""
        return [number for word in _words(text) for number in self._word(word)]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 [b, context]; a text that is too long is cut and still ends with the end token."""
        ids = torch.zeros(len(texts), self.context, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            kept = [self.start, *self.encode(text)[: self.context - 2], self.end]
            row[: len(kept)] = torch.tensor(kept)
        return ids

    def truncated(self, text: str) -> str:
        """What of a text does not fit and is not seen by the model, cleaned and lower-cased; "" where all fits."""
        rest = self.encode(text)[self.context - 2 :]
        pieces = {number: piece for piece, number in self._ids.items()} if rest else {}
        letters = {letter: byte for byte, letter in self._alphabet.items()}
        words = "".join(pieces[number] for number in rest).replace("</w>", " ")
        return bytes(letters.get(letter, 32) for letter in words).decode(errors="replace").strip()

    def _word(self, word: str) -> list[int]:
        if word not in self._cache:
            letters = [self._alphabet[byte] for byte in word.encode()]
            self._cache[word] = [self._ids[piece] for piece in self._merge([*letters[:-1], letters[-1] + "</w>"])]
        return self._cache[word]

    def _merge(self, pieces: list[str]) -> list[str]:
        """Joins, again and again, every occurrence of the adjacent pair of lowest rank (Sennrich et al. 2016)."""
        while len(pieces) > 1:
            rank, pair = min((self._ranks.get(pair, len(self._ranks)), pair) for pair in pairwise(pieces))
            if rank == len(self._ranks):
                break
            joined: list[str] = []
            position = 0
            while position < len(pieces):
                width = 2 if tuple(pieces[position : position + 2]) == pair else 1
                joined.append("".join(pieces[position : position + width]))
                position += width
            pieces = joined
        return pieces


def _printable() -> dict[int, str]:
    """A printable character for each byte: itself where it has one, else one from 256 on (Radford et al. 2019)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(BYTES + k) for k, byte in enumerate(others)}


_ENDINGS = "|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|"
_ASCII_WORD = re.compile(_ENDINGS + r"[a-z]+|[0-9]|[^\sa-z0-9]+")


def _words(text: str) -> list[str]:
    """Cleaned, lower-cased text cut into words, digits and runs of signs, as open_clip's SimpleTokenizer cuts it."""
    # Printable ASCII without entities is what ftfy and html.unescape leave as it is; nearly all captions are.
    if text.isascii() and text.isprintable() and "&" not in text:
        return _ASCII_WORD.findall(" ".join(text.split()).lower())
    import ftfy
    import regex

    cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    word = regex.compile(_ENDINGS + r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
    return word.findall(" ".join(cleaned.split()).lower())
