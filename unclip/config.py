"""What every configuration of this project shares."""

from __future__ import annotations

LATER = {"later": True}
"""Metadata of a field that came after models were trained: at its default it stands in no key, so that theirs hold."""
