"""Fixtures of the data stages."""

from __future__ import annotations

import os

from hypothesis import settings

from tests.fixtures.chain import chain  # noqa: F401  fixtures are found by their names here
from tests.fixtures.stages import data  # noqa: F401
from tests.fixtures.tiny_run import copy, finished  # noqa: F401

settings.register_profile("all")
# make proof-algebra; fewer where there is no hour
settings.register_profile("proof", max_examples=int(os.environ.get("UNCLIP_PROOF_EXAMPLES", "1000")))
