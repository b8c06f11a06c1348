"""What a params.json may say, per stage: every key with its type, range and default (`python -m utils.params`)."""
from utils.params.base import AUGMENTATIONS, BackdoorParams, DataParams, Params, RecipeParams, TeacherParams
from utils.params.datafree import (
    METHODS,
    CMIParams,
    DataFreeParams,
    DeepInversionParams,
    GenerativeParams,
    OoDParams,
    SynthesisParams,
    ZSKTParams,
)
from utils.params.effect import without_effect
from utils.params.file import ParamsType, changed_keys, check_params, load_params, parse_overrides
from utils.params.stages import STAGES, KDParams, NastyParams, PoisonedParams, ScratchParams

__all__ = ["AUGMENTATIONS", "METHODS", "STAGES", "BackdoorParams", "CMIParams", "DataFreeParams", "DataParams",
           "DeepInversionParams", "GenerativeParams", "KDParams", "NastyParams", "OoDParams", "Params", "ParamsType",
           "PoisonedParams", "RecipeParams", "ScratchParams", "SynthesisParams", "TeacherParams", "ZSKTParams",
           "changed_keys", "check_params", "load_params", "parse_overrides", "without_effect"]
