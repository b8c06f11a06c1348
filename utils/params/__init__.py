"""Keys of params.json with type, range and default, for every stage (`python -m utils.params`)."""
from utils.params.base import (
    AUGMENTATIONS,
    Augmentation,
    DataParams,
    Description,
    MethodParams,
    ModelOptions,
    Params,
    QueryParams,
    RecipeParams,
    Switch,
    TeacherParams,
    name_answers,
)
from utils.params.file import changed_keys, check_params, describe_problem, load_params, parse_overrides
from utils.params.stage import Stage

__all__ = ["AUGMENTATIONS", "Augmentation", "DataParams", "Description", "MethodParams", "ModelOptions", "Params",
           "QueryParams", "RecipeParams", "Stage", "Switch", "TeacherParams", "changed_keys", "check_params",
           "describe_problem", "load_params", "name_answers", "parse_overrides"]
