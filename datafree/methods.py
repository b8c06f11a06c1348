"""The data-free methods by name. To add one, write its file and add a line here, and its parameters and their line in
`utils.params.METHODS`."""
from __future__ import annotations

from collections.abc import Callable

from datafree.cmi import CMI
from datafree.deepinversion import DeepInversion
from datafree.generative import Generative
from datafree.ood import OoD
from datafree.zskt import ZSKT
from utils.training import Learner

# (student, teacher, facts, params, dtype) -> Learner
METHODS: dict[str, Callable[..., Learner]] = {
    "zskt": ZSKT, "ood": OoD, "cmi": CMI, "dafl": Generative, "dfq": Generative, "deepinversion": DeepInversion}
