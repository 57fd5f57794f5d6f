"""What every configuration of this project shares."""

from __future__ import annotations

LATER = {"later": True}
"""Metadata of a field that came after models were trained: at its default it stands in no key, so that theirs hold."""

UNSAID = LATER | {"unsaid": True}
"""The same, and at its default it does not stand in a model's config.json: a model made again has the bytes it had."""
