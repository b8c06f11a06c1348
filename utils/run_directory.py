"""Directory of a run: its lock, and the files that a run writes."""
from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils import distributed
from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, without a lock
    fcntl = None  # type: ignore[assignment]

WRITTEN = ("training.log", "metrics.csv", "results.json", "best_model.tar", "last_model.tar", "events.out.tfevents.*",
           "augmented.png")


class RunDirectory:
    """Directory with a params.json. While an object has the lock, no other process trains there."""

    def __init__(self, path: Path, artifacts: Sequence[str] = ()) -> None:
        """artifacts: names of additional files that runs of this stage write."""
        self.path, self.artifacts = path, tuple(artifacts)
        self.unlock: Callable[[], Any] = lambda: None

    def lock(self, other: str = "another process is training") -> None:
        """Lock the directory until `unlock`, or until this object or its process ends. Raises UserError, which begins
        with `other`, if another process has the lock."""
        if distributed.rank() or fcntl is None:
            return
        handle = os.open(self.path, os.O_RDONLY)
        self.unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{other} in {self.path}") from None
        except OSError:
            pass  # a file system without locks

    def written(self) -> Iterator[Path]:
        """Files in the directory that a run has written."""
        return (path for pattern in (*WRITTEN, *self.artifacts) for path in self.path.glob(pattern))

    def prepare(self, *, restart: bool) -> None:
        """Prepare the directory for a run: with `restart`, remove the files of an earlier one. Raises UserError if the
        directory is not writable."""
        if not os.access(self.path, os.W_OK):
            raise UserError(f"cannot write in {self.path}: Permission denied")
        if restart:
            for path in list(self.written()):
                path.unlink()
        (self.path / "results.json").unlink(missing_ok=True)  # until the run is finished again

    def __truediv__(self, name: str) -> Path:
        return self.path / name
