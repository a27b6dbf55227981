import subprocess
import sys

import pytest

from utils.errors import UserError
from utils.registry import Registry


class First:
    pass


class Second:
    pass


def test_names_match_regardless_of_case_and_keep_their_spelling():
    registry = Registry("method", {"DP-LoRA": First})
    assert registry.canonical("dp-lora") == "DP-LoRA"
    assert registry.resolve("DP-LORA") is First
    assert "Dp-Lora" in registry and "DP-LDM" not in registry
    assert list(registry) == ["DP-LoRA"]


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    registry = Registry("method", {"PrivImage": First, "DPDM": Second})
    with pytest.raises(UserError) as error:
        registry.resolve("privimge")
    assert all(
        part in str(error.value) for part in ("method", "'privimge'", "'PrivImage'?", "DPDM, PrivImage")
    )


def test_a_module_path_is_imported_on_first_use():
    program = (
        "import sys; from utils.registry import Registry; r = Registry('thing', {'Wave': 'wave:open'});"
        "list(r); r.canonical('wave'); before = 'wave' in sys.modules;"
        "r.resolve('WAVE'); print(before, 'wave' in sys.modules, r.resolve('Wave').__name__)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["False", "True", "open"]


def test_registering_the_same_object_again_is_allowed():
    registry = Registry("method", {"Toy": First})
    registry.register("toy", First)
    registry.register("Other", Second)
    assert list(registry) == ["Toy", "Other"]


def test_a_second_registration_of_a_name_shows_both_objects():
    registry = Registry("method", {"Toy": First})
    with pytest.raises(UserError, match=r"'TOY'.*First.*Second"):
        registry.register("TOY", Second)
    assert registry.resolve("Toy") is First
