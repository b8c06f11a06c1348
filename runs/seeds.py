"""An experiment under another seed: the same parameters with that seed, in a directory of its own, DIR/seedN."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from runs.directories import Run
from runs.graph import absolute
from utils.errors import UserError
from utils.files import read_json, write_text


def write(run: Run, seed: int, siblings: Sequence[Run]) -> tuple[bool, list[str]]:
    """Write the params.json of one seed, what the run was given by --set included, unless it is there already.

    siblings: the runs that get the seed too, or have it: a checkpoint of one of them becomes that of the same seed.
    Returns whether it was written, and remarks on checkpoints that are not of that seed. Raises UserError for what is
    no seed.
    """
    if not 0 < seed < 2**31:
        raise UserError(f"{seed} is no seed that an experiment can be made with: 1 to {2**31 - 1}")
    file = run.directory / f"seed{seed}" / "params.json"
    params = read_json(run.directory / "params.json") | (run.results.set if run.results else {})
    seeded = {absolute(sibling.directory) for sibling in siblings}
    wanted, warnings = {}, []
    for key in run.params.checkpoints().keys() & params.keys():
        path = Path(params[key])
        if absolute(path.parent) in seeded or (path.parent / f"seed{seed}").is_dir():
            wanted[key] = str(path.parent / f"seed{seed}" / path.name)
        else:
            warnings.append(f"{file.parent} reads {path}, as that has no seed {seed}")
    if file.exists():
        there = read_json(file)
        return False, [f"{file.parent} reads {there.get(key)}, though there is {path}" for key, path in wanted.items()
                       if there.get(key) != path]
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps({"seed": seed} | params | wanted | {"seed": seed}, indent=4) + "\n")
    return True, warnings
