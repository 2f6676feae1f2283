"""Errors that name an argument of a function, said in the options of the command that was given them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator

from deepspectra.errors import DeepSpectraError, TargetError


@contextlib.contextmanager
def in_options(names: Collection[str]) -> Iterator[None]:
    """Within this errors name the options of these arguments; but for what the user's own code says."""
    try:
        yield
    except TargetError:
        raise
    except DeepSpectraError as error:
        if names and len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (spelled(error.args[0], names),)
        raise


def spelled(text: str, names: Collection[str]) -> str:
    """Where a text names an argument, as "num_groups=1", "num must be" or "raise A.memory", its option.

    Calls that are written out, and values that no option takes, are left.
    """
    names = {name: f"--{name.replace('_', '-')}" for name in names}
    name = f"({'|'.join(map(re.escape, names))})"
    within_call, with_value = r"\w\([^()]*\)", rf"(?<![\w.'\"(-]){name}(?==['\"\d-]|=None\b|=nan\b|=inf\b)"
    alone, first = rf"(?<![\w.'\"(-]){name}=(?=[\s,.;])", rf"^{name}(?= must)"
    advised = rf"(?<=[Rr]aise )(?:A\.)?{name}\b(?!=)|(?<=[Ll]ower ){name}\b(?!=)"

    def option(match: re.Match[str]) -> str:
        return names.get(next(filter(None, match.groups()), ""), match[0])

    return re.sub("|".join((within_call, with_value, alone, first, advised)), option, text)
