"""The settings of an evaluation, as they are kept beside what it found."""

import dataclasses

from evaluation.classifiers.recipe import RECIPE_VERSIONS


def evaluation_settings(config) -> dict:
    """Without the price of private choices where none is made."""
    settings = {**dataclasses.asdict(config.eval), "seed": config.seed}
    settings["protocol"] = config.sensitive_data.protocol
    settings["recipe_version"] = RECIPE_VERSIONS[config.eval.recipe]
    if config.eval.mode != "val":
        settings.pop("selection_epsilon", None)
    return settings
