"""What tells a sweep's cell from others of its name: what it says itself, or else its source and what it holds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from deepspectra.errors import OptionError, first_line
from deepspectra.jobs.sweep_cell import Cell
from deepspectra.problem.finished_stages import digest

ADDRESS = " at 0x"  # in texts of objects that have none of their own; differs between runs
PROTOCOL = 4  # of pickle
PLAIN = (str, bytes, int, float, bool, complex, type(None))


def identity(cell: Cell) -> tuple[str, str]:
    """A cell's name, and what tells it from other programs of that name.

    That is its ``version``, of a bound method its object's, or else a digest of its source, of the arguments that are
    fixed, of defaults, of the variables that a function closes over, and of its object: by its repr, if it has one of
    its own, and otherwise by its state. Globals and what it calls are not looked at.

    Raises:
        OptionError: it has no version, and holds what cannot be written down.
    """
    inner: Any = cell
    fixed: list[Any] = []
    while isinstance(inner, functools.partial):
        fixed += [inner.args, sorted(inner.keywords.items())]
        inner = inner.func
    if inspect.isroutine(inner) and not hasattr(inner, "__code__"):
        inner = inspect.unwrap(inner)  # of a cache
    named = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    name = f"{named.__module__}.{named.__qualname__}"
    version = getattr(cell, "version", None)
    if version is None and isinstance(cell, MethodType):
        said = getattr(cell.__self__, "version", None)
        version = said if isinstance(said, str) else None
    if version is not None:
        return name, str(version)
    texts = _Texts()
    try:
        text = _source(named) + "".join(map(texts.of, fixed))
        if isinstance(inner, MethodType):
            owner = inner.__self__
            text += _source(owner if inspect.isclass(owner) else type(owner)) + texts.of(owner)
        text += texts.held(inner) if named is inner else texts.of(inner)
    except Exception as error:  # whatever reading an object's state may raise
        raise OptionError(
            f"{name} holds what cannot be written down, to tell it from other cells ({first_line(error)}). Give it "
            "an attribute version, a text that changes when its numbers do; a bound method has that of its object."
        ) from error
    return name, hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:12]


def _source(named: Any) -> str:
    """Of a function or class; its byte code where there is no source, or not of it alone; else nothing."""
    code = getattr(named, "__code__", None)
    if code is not None and code.co_name == "<lambda>":  # its line may hold another
        return _of_code(code)
    try:
        return inspect.getsource(named if code is None else code)
    except (OSError, TypeError):  # typed at a prompt, or not of Python
        within = [named] if code is not None else getattr(named, "__dict__", {}).values()
        return "".join(_of_code(one.__code__) for one in within if hasattr(one, "__code__"))


def _of_code(code: CodeType) -> str:
    constants = [
        _of_code(one)
        if isinstance(one, CodeType)
        else repr(sorted(map(repr, one)))
        if isinstance(one, frozenset)
        else repr(one)
        for one in code.co_consts
    ]
    return f"{code.co_code.hex()}{code.co_names}{code.co_varnames}{code.co_freevars}{constants}"


class _Texts:
    """Objects as texts that are the same in every run, and differ where the objects do."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # holds the objects, so that no other has their id
        self._depth = 0

    def of(self, value: Any) -> str:
        """Its repr, where that says all; or else what pickle would make it from."""
        if type(value) in PLAIN:
            return repr(value)
        if id(value) in self._known:
            return self._known[id(value)][1]
        self._known[id(value)] = (value, f"<{self._depth}>")  # within itself
        self._depth += 1
        text = self._text(value)
        self._depth -= 1
        self._known[id(value)] = (value, text)
        return text

    def held(self, function: Any) -> str:
        """Defaults of a function and what it closes over; nothing if there is neither."""
        defaults = (getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__"))
        text = "".join(self.of(one) for one in defaults if one)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            text += f"{self.of(content)};"
        return text

    def _text(self, value: Any) -> str:
        kind = type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and not value.dtype.hasobject):
            return _of_numbers(value)
        if isinstance(value, (FunctionType, MethodType)):
            return self._of_function(value)
        if kind in (list, tuple, dict, set, frozenset):
            return self._of_container(value)
        text = repr(value)
        # the repr of a network or table leaves numbers out
        array = hasattr(kind, "__array__") and not isinstance(value, np.generic)
        if ADDRESS in text or array or isinstance(value, torch.nn.Module):
            return self._state(value)
        if dataclasses.is_dataclass(kind) and text == _of_fields(value, repr):
            return _of_fields(value, self.of)
        return text

    def _of_function(self, value: FunctionType | MethodType) -> str:
        if isinstance(value, MethodType):
            return f"{self.of(value.__func__)}{self.of(value.__self__)}"
        return f"{value.__module__}.{value.__qualname__} {_source(value)}{self.held(value)}"

    def _of_container(self, value: Any) -> str:
        """As its repr, but a set in an order of its own."""
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.of(key)}: {self.of(one)}' for key, one in value.items())}}}"
        texts = list(map(self.of, value))
        if isinstance(value, list):
            return f"[{', '.join(texts)}]"
        if isinstance(value, tuple):
            return f"({', '.join(texts)}{',' * (len(value) == 1)})"
        return f"{type(value).__name__}{sorted(texts)}"

    def _state(self, value: Any) -> str:
        parts = value.__reduce_ex__(PROTOCOL)
        if isinstance(parts, str):
            return f"{value.__module__}.{parts}"
        maker, args, *rest = parts
        # a state, and perhaps iterators over items and over pairs
        state = [one if j == 0 or one is None else list(one) for j, one in enumerate(rest[:3])]
        return f"{maker.__module__}.{maker.__qualname__}{self.of(args)}{self.of(state)}"


def _of_numbers(value: torch.Tensor | np.ndarray) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value.dtype} {digest([value])}"
    return f"{type(value).__name__} {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"


def _of_fields(value: Any, say: Callable[[Any], str]) -> str:
    """The repr that a data class has by default, with another for its fields."""
    fields = (f"{one.name}={say(getattr(value, one.name))}" for one in dataclasses.fields(value) if one.repr)
    return f"{type(value).__qualname__}({', '.join(fields)})"
