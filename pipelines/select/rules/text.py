"""Rules about the caption."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import regex

from infra.errors import Refused
from pipelines.select.rules.base import NOT_IN_KEY, BaseRule, FileRule, numbers
from unclip.config import FRACTION, WHOLE, Range

_WORD = regex.compile(r"\w+")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_MARKS = regex.compile("[\u0300-\u036f]")


@dataclass(frozen=True, kw_only=True)
class Caption(BaseRule):
    """Rejects captions that are too short or too long; surrounding blanks do not count."""

    min_characters: int = 1
    """Characters, at least."""
    max_characters: int | None = None
    """Characters, at most."""
    min_words: int = 1
    """Words (between blanks), at least."""
    max_words: int | None = None
    """Words, at most."""
    rule: Literal["caption"] = "caption"
    columns: ClassVar[tuple[str, ...]] = ("caption",)
    bounds: ClassVar[Mapping[str, Range]] = dict.fromkeys(
        ("min_characters", "max_characters", "min_words", "max_words"), WHOLE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("characters", "words"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if most is not None and most < least:
                raise Refused(f"rule caption: min_{what} {least} and max_{what} {most} let no caption stay")
        if self.max_characters is not None and self.max_characters < 2 * self.min_words - 1:
            raise Refused(
                f"rule caption: {self.min_words} words (min_words) with blanks between them have more than "
                f"{self.max_characters} characters (max_characters), so no caption would stay"
            )

    def features(self, rows: pa.Table) -> pa.Table:
        said = [(caption or "").strip() for caption in rows["caption"].to_pylist()]
        characters, words = [len(one) for one in said], [len(one.split()) for one in said]
        return pa.table({"characters": pa.array(characters, pa.int32()), "words": pa.array(words, pa.int32())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            characters, words = numbers(look, "characters"), numbers(look, "words")
            rejected = (characters < self.min_characters) | (words < self.min_words)
            if self.max_characters is not None:
                rejected |= characters > self.max_characters
            if self.max_words is not None:
                rejected |= words > self.max_words
            yield rejected


@dataclass(frozen=True, kw_only=True)
class Language(BaseRule):
    """Rejects captions that are in none of the languages named.

    py3langid (a model of 97 languages that it carries) says which language is the likeliest, and how likely. Captions
    are short, so it is often unsure: a caption whose language is less likely than `min_confidence`, and one without a
    letter, is *unsure*, and stays unless `unsure` says otherwise.
    """

    languages: tuple[str, ...]
    """ISO 639-1 codes, as en or de."""
    min_confidence: float = 0.3
    """Probability of the likeliest language, at least, for it to count."""
    unsure: Literal["keep", "reject"] = "keep"
    """What becomes of captions whose language is not known."""
    rule: Literal["language"] = "language"
    columns: ClassVar[tuple[str, ...]] = ("caption",)
    bounds: ClassVar[Mapping[str, Range]] = {"min_confidence": FRACTION}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.languages:
            raise Refused("rule language: languages is empty; name one, as [en]")
        if bad := [code for code in self.languages if not regex.fullmatch("[a-z]{2}", code)]:
            raise Refused(f"rule language: languages has {bad[0]!r}; write codes of two letters (ISO 639-1), as en")

    def opened(self) -> Language:
        """Itself; Refused where a language is named that is not told from others."""
        if bad := sorted({*self.languages} - {*_identifier().labels}):
            raise Refused(f"rule language: {', '.join(bad)} is none of the languages that py3langid tells apart")
        return self

    def features(self, rows: pa.Table) -> pa.Table:
        codes, sure = [], []
        for caption in rows["caption"].to_pylist():
            code, confidence = language(caption or "")
            codes.append(code)
            sure.append(confidence)
        return pa.table({"language": pa.array(codes, pa.string()), "confidence": pa.array(sure, pa.float32())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            wanted = np.array([code in self.languages for code in look["language"].to_pylist()], bool)
            sure = numbers(look, "confidence") >= self.min_confidence
            yield np.where(sure, ~wanted, self.unsure == "reject")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(caption: str) -> tuple[str | None, float]:
    """(ISO 639-1 code, probability) of the likeliest language; (None, 0) for a caption without a letter."""
    if not any(character.isalpha() for character in caption):
        return None, 0.0
    code, confidence = _identifier().classify(caption)
    return code, float(confidence)


@dataclass(frozen=True, kw_only=True)
class BlockedTerms(FileRule):
    """Rejects captions that hold one of the terms as a whole word or as successive whole words.

    Upper and lower case, accents and forms of width are the same ("Café" is "cafe"), and so is whatever stands between
    two words ("new-york" is "new york"). In scripts that put no blanks between words (Chinese, Japanese, Thai, Lao,
    Khmer, Burmese) a term is found anywhere.
    """

    terms: tuple[str, ...] = ()
    """Terms, in the recipe."""
    file: str | None = field(default=None, metadata=NOT_IN_KEY)
    """A text file with a term a line; empty lines and those that begin with # do not count."""
    rule: Literal["blocked_terms"] = "blocked_terms"
    columns: ClassVar[tuple[str, ...]] = ("caption",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms and self.file is None:
            raise Refused("rule blocked_terms: give terms, or a file with a term a line")
        if self.sha256 and self.file is None:
            raise Refused("rule blocked_terms: sha256 is given without file")
        if bad := [term for term in self.terms if not _WORD.search(folded(term))]:
            raise Refused(f"rule blocked_terms: {bad[0]!r} has no letter and no digit, so it would match nothing")

    def opened(self) -> BlockedTerms:
        """With the terms of the file."""
        if self.file is None:
            return self
        rule: BlockedTerms = self._read(self.file)
        if not rule._listed():
            raise Refused(f"{self.file} has no term: write one a line")
        return rule

    def features(self, rows: pa.Table) -> pa.Table:
        captions = rows["caption"].to_pylist()
        return pa.table({"blocked": pa.array([self._holds(caption or "") for caption in captions], pa.bool_())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            yield numbers(look, "blocked").astype(bool)

    def _listed(self) -> list[str]:
        try:
            lines = self.content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Refused(f"{self.file} is no text in UTF-8 (byte {error.start + 1})") from None
        return [line for line in lines if _WORD.search(folded(line)) and not line.lstrip().startswith("#")]

    @cached_property
    def _index(self) -> tuple[dict[str, set[tuple[str, ...]]], tuple[str, ...]]:
        """(first word → all words of the terms that begin with it, terms that are found anywhere)."""
        words: dict[str, set[tuple[str, ...]]] = {}
        anywhere = []
        for term in (*self.terms, *self._listed()):
            text = folded(term)
            if _UNSPACED.search(text):
                anywhere.append(text.strip())
            else:
                first, *rest = _WORD.findall(text)
                words.setdefault(first, set()).add((first, *rest))
        return words, tuple(anywhere)

    def _holds(self, caption: str) -> bool:
        words, anywhere = self._index
        text = folded(caption)
        said = tuple(_WORD.findall(text))
        return any(term in text for term in anywhere) or any(
            said[place : place + len(term)] == term for place, word in enumerate(said) for term in words.get(word, ())
        )


def folded(text: str) -> str:
    """Text without the difference of case, accents and forms of width. ø, ł and the like are letters, not accents."""
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return unicodedata.normalize("NFC", _MARKS.sub("", apart))
