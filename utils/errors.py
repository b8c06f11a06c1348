"""The one exception that a user is meant to see."""
from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr, exit status 2, no traceback."""

    @classmethod
    def from_os(cls, error: OSError) -> UserError:
        """The same of a file that the system refuses."""
        return cls(f"{error.filename or 'cannot write'}: {error.strerror or error}")
