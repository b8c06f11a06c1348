"""Record of a run's data in checkpoints and results.json, and its comparison with that of another run.

A record is a dict of plain values: `classes`, in the order of their labels; `images`, the number in each part;
`image_size` in pixels; `interpolation`, the filter that resized the images of a folder; `mean` and `std` for pixels in
[0, 1]; `sha256` of the images and labels of each part. Runs of earlier versions have no `image_size`, `interpolation`
and `sha256`.
"""
from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from utils.checkpoint import Checkpoint
from utils.data import Images
from utils.datasets import Dataset
from utils.errors import UserError


def describe(dataset: Dataset, parts: Mapping[str, Images]) -> dict[str, Any]:
    """Record of a data set and its parts, before poisoning: poisoned images follow from the parameters, and their
    rounding depends on the device, which may change when a run is resumed."""
    return {**describe_input(dataset, parts["test"]), "images": {name: len(part) for name, part in parts.items()},
            "sha256": {name: _sha256(part) for name, part in parts.items()}}


def describe_input(dataset: Dataset, part: Images) -> dict[str, Any]:
    """The entries of a record that `compare_origin` reads. part: images with the mean and std of the network."""
    return {"classes": list(dataset.classes), "image_size": dataset.image_size, "interpolation": dataset.interpolation,
            "mean": part.mean.tolist(), "std": part.std.tolist()}


def _sha256(part: Images) -> str:
    digest = hashlib.sha256()
    for tensor in (part.images, part.labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def changes(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Entries that differ between the record of a run and its present data. Entries that the record lacks (earlier
    versions) are not compared."""
    changed = [key for key in ("images", "mean", "std") if recorded.get(key) != current[key]]
    if _names(recorded) != _names(current):
        changed.insert(0, "classes")
    hashes = recorded.get("sha256", {})
    parts = [name for name, value in current["sha256"].items() if hashes.get(name, value) != value]
    if parts and "images" not in changed:  # with another number of images the hash always differs
        changed.append(f"pixels or labels of {', '.join(parts)}")
    return changed


def compare_origin(source: Checkpoint, current: Mapping[str, Any], role: str) -> list[str]:
    """Compare the data that a checkpoint was trained on with the present data.

    Returns warnings for the log; none for checkpoints from elsewhere, which have no record. Raises UserError if the
    classes have equal names in another order, since every prediction would be assigned to a wrong class.
    """
    recorded = source.content.get("data")
    if not isinstance(recorded, dict):
        return []
    source_names, names = _names(recorded), _names(current)
    for form in (str, _normalize_name):
        label = _first_difference([form(name) for name in source_names], [form(name) for name in names])
        if label is not None and sorted(map(form, source_names)) == sorted(map(form, names)):
            raise UserError(f"{role}: {source.path} was trained on the same classes in another order (its class "
                            f"{label} is {source_names[label]!r}, here {names[label]!r}); rename the class "
                            "folders so that they sort alike")
    label = _first_difference(source_names, names)
    warnings = [] if label is None else [f"{role}: trained on classes with other names (its class {label} is "
                                        f"{source_names[label]!r}, here {names[label]!r})"]
    for key in ("mean", "std"):
        trained, here = _numbers(recorded.get(key)), _numbers(current[key])
        if trained and trained != here:
            warnings.append(f'{role}: trained with {key} {trained}, here {here} (params.json may set "{key}")')
    size, here = recorded.get("image_size", _size_of_folder(source.content)), current["image_size"]
    if size not in (None, here):
        warnings.append(f"{role}: trained on images of {size}x{size} pixels, here {here}x{here}")
    if recorded.get("interpolation") not in (None, current["interpolation"]) and current["interpolation"]:
        warnings.append(f'{role}: trained on images resized by {recorded["interpolation"]}, here by '
                        f'{current["interpolation"]} (params.json may set "interpolation")')
    return warnings


def _names(record: Mapping[str, Any]) -> list[str]:
    """Class names in Unicode form NFC; empty if there are none."""
    names = record.get("classes")
    return [unicodedata.normalize("NFC", str(name)) for name in names] if isinstance(names, list | tuple) else []


def _normalize_name(name: str) -> str:
    """Class name without leading zeros and case: `007` equals `7`, `Cat` equals `cat`."""
    return name.lstrip("0") if name.isdecimal() else name.casefold()


def _first_difference(source_names: Sequence[str], names: Sequence[str]) -> int | None:
    """First label whose names differ; None if there is none."""
    return next((label for label, (one, two) in enumerate(zip(source_names, names, strict=False)) if one != two), None)


def _numbers(values: Any) -> str:
    """Format numbers for a message, `[0.4914, 0.4822, 0.4465]`; empty if there are none."""
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return ""
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"


def _size_of_folder(content: Mapping[str, Any]) -> int | None:
    """Image size in the parameters of an earlier version; None unless the data set is a folder."""
    params = content.get("params")
    if isinstance(params, dict) and str(params.get("dataset")).startswith("folder:"):
        return params.get("image_size")
    return None
