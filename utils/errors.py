"""Exceptions that are shown to the user, and helpers for one-line messages."""
from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters, line separators, and the marks that reverse the direction of text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def one_line(text: object) -> str:
    """Escape control characters as `\\n` or `\\x1b`, since messages quote names from untrusted files."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def first_ten(items: Sequence[str]) -> str:
    """Join the first ten items and the number of further ones, `a, b and 5 more`."""
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


class UserError(Exception):
    """Error that the user can fix: shown as one line on stderr, exit status 2, no traceback."""

    @classmethod
    def from_os(cls, error: OSError) -> UserError:
        """UserError for an OSError, with its file."""
        return cls(f"{error.filename or 'cannot write'}: {error.strerror or error}")


class Finished(Exception):
    """Nothing is left to do: shown as one line on stdout, exit status 0."""
