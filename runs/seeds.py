"""Copies of an experiment with another seed, in the directory DIR/seedN."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from runs.directories import Run
from runs.graph import absolute
from utils.errors import UserError
from utils.files import read_json, write_text


def write(run: Run, seed: int, siblings: Sequence[Run]) -> tuple[bool, list[str]]:
    """Write the params.json of one seed, including the --set of the run, unless it exists.

    siblings: runs that get the seed too or have it; their checkpoints are replaced by those of that seed. Returns
    whether it was written, and warnings about checkpoints of other seeds. Raises UserError for an invalid seed.
    """
    if not 0 < seed < 2**31:
        raise UserError(f"{seed} is no valid seed: choose from 1 to {2**31 - 1}")
    file = run.directory / f"seed{seed}" / "params.json"
    params = read_json(run.directory / "params.json") | (run.results.set if run.results else {})
    seeded = {absolute(sibling.directory) for sibling in siblings}
    wanted, warnings = {}, []
    for key in run.params.checkpoints().keys() & params.keys():
        path = Path(params[key])
        if absolute(path.parent) in seeded or (path.parent / f"seed{seed}").is_dir():
            wanted[key] = str(path.parent / f"seed{seed}" / path.name)
        else:
            warnings.append(f"{file.parent} reads {path}, which has no seed {seed}")
    if file.exists():
        there = read_json(file)
        return False, [f"{file.parent} reads {there.get(key)}, although {path} exists" for key, path in wanted.items()
                       if there.get(key) != path]
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps({"seed": seed} | params | wanted | {"seed": seed}, indent=4) + "\n")
    return True, warnings
