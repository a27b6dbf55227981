"""Find numbers that YAML 1.1 misreads: 010 is octal, 1:30 is base 60."""

import re
from collections.abc import Iterator

MISREAD = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
ADVICE = "write a decimal number without leading zeros or colons, or put quotes around a text"


def misread_numbers(text: str) -> Iterator[tuple[int, str]]:
    """(line, scalar) of every unquoted scalar in the YAML `text` that is misread. Raises yaml.YAMLError if `text` is
    not YAML."""
    import yaml

    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken) and token.plain and MISREAD.fullmatch(token.value):
            yield token.start_mark.line + 1, token.value
