"""Prompts of a text-to-image model, one per private class. Class names are public."""

from data.spec import DataSpec
from utils.sections import check_field


def check_prompt(field: str, prompt: str) -> None:
    """Raise FieldError where a template has no place for the class name, or more braces than that."""
    plain = prompt.replace("{}", "", 1)
    check_field(
        plain != prompt and not set("{}") & set(plain),
        field,
        repr(prompt),
        "a text with one {} for the class name",
    )


def class_prompts(prompt: str, prompts: list[str] | None, spec: DataSpec) -> list[str]:
    """One text per class: `prompts` if given, else the template `prompt` with the class name in the place of {}."""
    if prompts is None:
        return [prompt.format(name) for name in spec.class_names]
    check_field(
        len(prompts) == spec.num_classes,
        "prompts",
        f"a list of {len(prompts)}",
        f"null, or have one text for each of the {spec.num_classes} classes",
    )
    return prompts
