"""What is damaged in a store, told to the person who has to mend it: which file, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from infra.errors import NotFound, Refused

MEND = {
    "records": "Delete it and run again: what it stood for is made anew.",
    "manifests": "Delete it and run again, which writes it anew.",
    "ledgers": "Put it back from a backup; it cannot be made anew. `unclip releases verify` checks the whole chain.",
    "objects": (
        "Put an undamaged copy in its place. Without one, `unclip data verify --mend` deletes it and marks the records "
        "that name it; then run again."
    ),
}
"""First part of a name in the store → how to mend what lies there."""


def damaged(name: str, why: str, mend: str = "") -> Refused:
    """The refusal, code 5, that names a damaged (or missing) thing of the store and says how to mend it."""
    mend = mend or MEND.get(name.partition("/")[0], "Delete it and run again.")
    return Refused(f"{name} in the store {why}. {mend}", code=5)


@contextmanager
def explain_damage(name: str) -> Iterator[None]:
    """Tells a person what is wrong with the document of that name, if it cannot be read within."""
    try:
        yield
    except NotFound as error:
        raise damaged(error.name, "is missing") from error
    except Refused:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise damaged(name, f"is damaged: it cannot be read ({type(error).__name__}: {error})") from error
