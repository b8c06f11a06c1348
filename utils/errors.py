"""The exceptions that a user is meant to see, and what others say in a line."""
from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters, line separators, and the marks that reverse the direction of text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def one_line(text: object) -> str:
    """A text with control characters escaped as `\\n` or `\\x1b`. Messages quote names from files of anyone."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or what it is where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def first_ten(items: Sequence[str]) -> str:
    """Items of a list of any length as one readable text: the first ten, and how many more there are."""
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr, exit status 2, no traceback."""

    @classmethod
    def from_os(cls, error: OSError) -> UserError:
        """The same of a file that the system refuses."""
        return cls(f"{error.filename or 'cannot write'}: {error.strerror or error}")


class Finished(Exception):
    """Nothing is left to do: shown as one line on stdout, exit status 0."""
