import subprocess
import sys

import pytest

from utils.errors import UserError
from utils.registry import Registry


class First:
    pass


class Second:
    pass


def test_names_match_without_regard_to_case_and_keep_their_spelling():
    registry = Registry("method", {"DP-LoRA": First})
    assert registry.canonical("dp-lora") == "DP-LoRA"
    assert registry.resolve("DP-LORA") is First
    assert "Dp-Lora" in registry and "DP-LDM" not in registry
    assert list(registry) == ["DP-LoRA"]


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    registry = Registry("method", {"PrivImage": First, "DPDM": Second})
    with pytest.raises(UserError) as error:
        registry.resolve("privimge")
    assert str(error.value) == "unknown method 'privimge'; did you mean 'PrivImage'? Known: DPDM, PrivImage"


def test_a_text_entry_is_imported_on_first_use_only():
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


def test_a_collision_shows_both():
    registry = Registry("method", {"Toy": First})
    with pytest.raises(UserError, match=r"'TOY' is registered twice: .*First.* and .*Second"):
        registry.register("TOY", Second)
    assert registry.resolve("Toy") is First
