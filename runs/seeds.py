"""An experiment under another seed: the same params.json with that seed, in a directory of its own, DIR/seedN."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from runs.directories import Run
from runs.graph import absolute
from utils.checkpoint import write_text


def write(run: Run, seed: int, siblings: Sequence[Run]) -> list[str] | None:
    """Write the params.json of one seed; None where it is there already. siblings: the runs that get the seed too, or
    have it: a checkpoint of one of them becomes that of the same seed. Those that have it not are returned."""
    file = run.directory / f"seed{seed}" / "params.json"
    if file.exists():
        return None
    params = json.loads((run.directory / "params.json").read_text(encoding="utf-8"))
    seeded = {absolute(sibling.directory) for sibling in siblings}
    others = []
    for key in run.params.checkpoints():
        path = Path(params[key])
        if absolute(path.parent) in seeded or (path.parent / f"seed{seed}").is_dir():
            params[key] = str(path.parent / f"seed{seed}" / path.name)
        else:
            others.append(str(path))
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps({"seed": seed} | params | {"seed": seed}, indent=4) + "\n")
    return others
