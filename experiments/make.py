"""Write the params.json of every unpublished run from `experiments/recipes`.

    python experiments/make.py            # write files that are missing or differ
    python experiments/make.py --check    # write nothing; exit status 1 if a file is missing or differs

Edit the recipes, not the files. A params.json without a recipe is named and left unchanged, unless it was published or
is a seed of a known run (scripts/seeds.py).
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.recipes import PUBLISHED, all_runs

ROOT = Path(__file__).resolve().parent
SEED = re.compile(r"/seed\d+$")


def text(run: str, values: dict[str, Any]) -> str:
    """Text of a params.json: one line per key as in the published files; for a seed, as scripts/seeds.py writes it."""
    if SEED.search(run):
        return json.dumps(values, indent=4) + "\n"
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"


def differing(root: Path) -> dict[Path, bytes]:
    """Files below `root` that are missing or differ from their recipe, with the expected content."""
    wanted = {root / run / "params.json": text(run, values).encode() for run, values in all_runs().items()}
    return {file: content for file, content in wanted.items() if not file.is_file() or file.read_bytes() != content}


def unknown(root: Path) -> list[Path]:
    """Every params.json below `root` that has no recipe, was not published and is not a seed of a known run."""
    known = all_runs().keys() | PUBLISHED
    runs = {file: file.parent.relative_to(root).as_posix() for file in sorted(root.rglob("params.json"))}
    return [file for file, run in runs.items() if run not in known and SEED.sub("", run) not in known]


def make(root: Path, *, check: bool) -> int:
    """Write the files below `root` or, with `check`, only compare them. Returns the exit status."""
    files = differing(root)
    for file, content in files.items():
        if check:
            print(f"missing or different: {file}")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for file in unknown(root):
        print(f"no recipe, and not published: {file}")
    print(f"{len(files)} of {len(all_runs())} files {'are missing or different' if check else 'written'}")
    return 1 if check and files else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if files would be written")
    try:
        sys.exit(make(ROOT, check=parser.parse_args().check))
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
