"""`python -m pipelines.cli`: the command line, for a Python whose `unclip` script is not on the path."""

from __future__ import annotations

from pipelines.cli.main import main

main()
