"""What a row must be to stay: each rule looks at one shard alone and decides over all of them.

`features` reduces a shard to a few bytes a row; `reject` goes through those in manifest order. Among equals the row
that is first in the manifest stays, so what was decided about a shard does not change when others come after it (except
under `top_fraction`, which asks for just that, and while there are too few rows for `semantic_duplicates` to have found
its clusters).
"""

from __future__ import annotations

from pipelines.select.rules.base import Rule, kind_of, opened
from pipelines.select.rules.contamination import Contamination
from pipelines.select.rules.duplicates import ExactDuplicates, NearDuplicates
from pipelines.select.rules.embeddings import SemanticDuplicates
from pipelines.select.rules.image import MEASURES, Aspect, Blank, Size, measured
from pipelines.select.rules.scores import Aesthetic, ClipScore, Nsfw, Watermark
from pipelines.select.rules.text import BlockedTerms, Caption, Language

RULES: list[type] = [
    Size,
    Aspect,
    Caption,
    ExactDuplicates,
    ClipScore,
    Blank,
    Language,
    BlockedTerms,
    NearDuplicates,
    Watermark,
    Nsfw,
    Aesthetic,
    SemanticDuplicates,
    Contamination,
]
"""Every rule that a recipe may name."""
