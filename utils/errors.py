"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr, exit status 2, no traceback."""
