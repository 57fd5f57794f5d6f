"""The command line: one function a command, which reads options and calls the room that does the work.

In go words; out come text, JSON and an exit code. A person's mistake ends as one paragraph."""

from __future__ import annotations
