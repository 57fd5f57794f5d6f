"""What this floor raises for a person to read: you asked for something impossible, or your files are damaged."""


class Refused(ValueError):
    """What was asked for cannot be done; the message says what, where, and what to do instead."""


class Damaged(Refused):
    """What was asked for is possible, and its files are not whole. `code` is the command line's exit code."""

    code = 5
