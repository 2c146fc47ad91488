"""Errors that a person at the terminal can act on."""


class UserError(Exception):
    """Bad input: one line that says what was wrong, where, and what to do.

    Programs print it as ``error: ...`` and exit with code 2; the library raises it.
    """
