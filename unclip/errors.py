"""The one exception of this floor: you asked for something impossible."""


class Refused(ValueError):
    """What was asked for cannot be done; the message says what, where, and what to do instead."""
