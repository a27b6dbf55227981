"""Preset tables: how a (dataset, epsilon) cell deviates from a method's base setting.

A table is configs/presets/<Method>.yaml. The rules below `paper` are the published settings; those below `quick`
override them and scale a cell down to minutes on a CPU. Within a table a later rule overrides an earlier one.

    paper:
      - when: {data: [mnist_28, fmnist_28], epsilon: 1}     # both optional; epsilon is a tier, 1 or 10
        set: {model.network.ch_mult: [2, 2]}
      - when: {data: own, if: resolution <= 32 and N > 5000}
        set: {train.n_epochs: "= min(30, 60000 / N)"}
        note: one line that a run prints in which this rule sets a value          # optional

`data: own` matches the user's own images. Only with it, `if` is a condition on their public facts (FACTS below, and
`pace`: how many of them cost as much as one image of 32 px), and a value that starts with "=" is a formula of these
(utils/formula.py). `installed: <module>` and `missing: <module>` depend on an optional package; a run records the
values, so that a resumed run does not depend on it. `include: _diffusion` puts the rules of presets/_diffusion.yaml
before those of the table.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from utils.config_files import CONFIG_FOLDER, read_yaml
from utils.errors import UserError, unknown
from utils.formula import evaluate, resolved

PRESETS = ("paper", "quick")
TABLE_KEYS = (*PRESETS, "quick_by_default", "include")
CONDITIONS = ("data", "epsilon", "if", "installed", "missing")
TIERS = (1, 10)  # the budgets of the published, tuned settings
OWN = "own"  # `data` of a rule for the user's own images
# N: private training images; num_public: images of the set that are declared public
FACTS = ("N", "resolution", "channels", "classes", "num_public")
Facts = Mapping[str, int]
MOST_PACE = 4  # below 16 px the fixed work of a step dominates, not the pixels


def nearest_tier(epsilon: float) -> int:
    """The tuned budget nearest to `epsilon` on a log scale; the boundary sqrt(10) and inf belong to 10."""
    return 1 if epsilon < math.sqrt(10) else 10


@dataclass(frozen=True)
class Rule:
    layer: str  # its name in the provenance
    data: list[str] | str | None  # None: every dataset; OWN: the user's own images
    epsilon: int | None  # None: both tiers
    values: dict[str, object]  # dotted key -> value
    condition: str | None = None  # a formula of FACTS
    note: str | None = None  # what a run that uses this rule prints
    installed: str | None = None  # a module that must be installed
    missing: str | None = None  # a module that must not be installed

    def matches(self, data_name: str, tier: int, facts: Facts | None = None) -> bool:
        """`facts` are those of the user's own images, and None for the toolkit's data sets."""
        if self.epsilon not in (None, tier) or not self._fits_packages():
            return False
        if self.data == OWN:
            return facts is not None and (
                self.condition is None or bool(evaluate(self.condition, _names(facts)))
            )
        return self.data is None or data_name in self.data

    def _fits_packages(self) -> bool:
        if self.installed is not None and not _is_installed(self.installed):
            return False
        return self.missing is None or not _is_installed(self.missing)

    def evaluated(self, facts: Facts | None) -> "Rule":
        """The rule with its formulas replaced by numbers."""
        if self.data != OWN:
            return self
        names = _names(facts)
        return replace(self, values={key: resolved(value, names) for key, value in self.values.items()})

    def without(self, sections: Iterable[str]) -> "Rule":
        """The rule without its values in these sections."""
        kept = {key: value for key, value in self.values.items() if key.split(".")[0] not in sections}
        return replace(self, values=kept)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _names(facts: Facts) -> dict[str, float]:
    """The names that formulas may use, with their values."""
    return {**facts, "pace": min(MOST_PACE, (32 / facts["resolution"]) ** 2)}


@dataclass(frozen=True)
class PresetTable:
    rules: dict[str, list[Rule]]  # "paper" and "quick" -> rules in order
    quick_by_default: list[str]  # datasets whose runs are quick unless preset=paper is given

    def chosen(self, preset: str) -> list[Rule]:
        """The rules of `preset` in the order in which they apply."""
        return self.rules["paper"] + (self.rules["quick"] if preset == "quick" else [])


def load_presets(path: Path | None) -> PresetTable:
    """Read and check a table; an absent one (None) is empty."""
    if path is None:
        return PresetTable({preset: [] for preset in PRESETS}, [])
    content = read_yaml(path)
    for key in content:
        if key not in TABLE_KEYS:
            raise unknown(f"key in {path.name} of presets", key, TABLE_KEYS)
    shared = load_presets(_included(path, content["include"]) if "include" in content else None)
    rules = {
        preset: shared.rules[preset]
        + [
            _read_rule(rule, f"preset {path.stem} {preset} rule {number}")
            for number, rule in enumerate(content.get(preset) or [], start=1)
        ]
        for preset in PRESETS
    }
    return PresetTable(rules, content.get("quick_by_default") or [])


def _included(path: Path, name: str) -> Path:
    """The table that `path` includes: from the same folder, or else from the toolkit."""
    places = [folder / f"{name}.yaml" for folder in (path.parent, CONFIG_FOLDER / "presets")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{path}: include: '{name}' is missing; there is neither {places[0]} nor {places[1]}")
    return found


def _read_rule(rule: object, layer: str) -> Rule:
    known = isinstance(rule, dict) and not set(rule) - {"when", "set", "note"}
    if not known or not isinstance(rule.get("set"), dict):
        raise UserError(
            f"{layer}: {rule!r} is not a rule; expected 'when: {{...}}' and 'set: {{key: value}}'"
        )
    when = rule.get("when") or {}
    for key in when:
        if key not in CONDITIONS:
            raise unknown(f"condition of {layer}", key, CONDITIONS)
    data, epsilon, condition, installed, missing = (when.get(key) for key in CONDITIONS)
    if data not in (None, OWN) and not isinstance(data, list):
        raise UserError(
            f"{layer}: data: {data!r} is not allowed; it must be a list of dataset names, or {OWN}"
        )
    if condition is not None and data != OWN:
        raise UserError(f"{layer}: if: '{condition}' is not allowed without data: {OWN}")
    if epsilon is not None and epsilon not in TIERS:
        raise UserError(f"{layer}: epsilon: {epsilon!r} is not allowed; it must be one of the tiers 1 and 10")
    return Rule(layer, data, epsilon, rule["set"], condition, rule.get("note"), installed, missing)
