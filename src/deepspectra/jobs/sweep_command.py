"""`deepspectra sweep`: axes as words of the command line, and the cell that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepspectra import zoo
from deepspectra.argument_checks import check_choice
from deepspectra.errors import OptionError
from deepspectra.jobs.command_output import say_kept
from deepspectra.jobs.command_targets import load_function
from deepspectra.jobs.pages import Dataset, load_dataset, write_page
from deepspectra.jobs.sweep import sweep
from deepspectra.jobs.sweep_cell import Cell, Value
from deepspectra.jobs.sweep_store import STORE, gather
from deepspectra.jobs.sweep_zoo import ZooCell

LOOKS = ("epochs", "progress")  # of the zoo's cell
PAGE = "sweep.html"
WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}


def sweep_of(
    words: Sequence[str],
    folder: Path,
    *,
    looks: str | None = None,
    data_root: Path | None = None,
    training_epochs: int | None = None,
    by_layer: bool = False,
    processes: int | None = None,
    memory: str | None = None,
    retry: bool = False,
) -> tuple[Dataset, str]:
    """Sweep as the words say; without any, only gather what the folder has. The cells, and what to say of them.

    Args:
        words: axes such as "seed=0,1,2"; perhaps first a function of the user's, file.py:function or
            package.module:function. Without one the axes are those of `ZooCell`, with looks at epochs or progress.
        folder: of the results.
        looks: as in `sweep`.
        data_root: as in `ZooCell`.
        training_epochs: as in `ZooCell`.
        by_layer: as in `ZooCell`.
        processes: how many.
        memory: as in `sweep`.
        retry: as in `sweep`.

    Raises:
        OptionError: words that are neither, or options that belong to the zoo.
        DeepSpectraError: whatever `sweep` raises.
    """
    if not words:
        return _told(gather(folder), folder)
    targets = [word for word in words if "=" not in word]
    if targets and targets != [words[0]]:
        raise OptionError(f"{targets[-1]!r}: expected an axis such as seed=0,1,2, after file.py:function or alone.")
    axes = dict(map(_axis, words[len(targets) :]))
    if len(axes) + len(targets) < len(words):
        raise OptionError("an axis is named twice; give all of its values at once, such as seed=0,1,2.")
    if not axes:
        raise OptionError(f"{targets[0]} has no axis; add values of what it takes, such as seed=0,1,2.")
    cell: Cell
    if targets:
        options = {"--training-epochs": training_epochs is not None, "--layers": by_layer}
        unused = [name for name, given in options.items() if given]
        if unused:
            raise OptionError(f"{', '.join(unused)}: of networks of the zoo; with a target, {targets[0]} decides.")
        cell = load_function(targets[0], "that takes a point and returns a mapping of names to numbers")
    else:
        for name, known in (("model", zoo.MODEL_NAMES), ("data", zoo.DATA_NAMES)):
            for value in axes.get(name, ()):
                check_choice(name, str(value), known)
        cell = ZooCell(data_root, training_epochs, by_layer=by_layer)
        looks = next((name for name in LOOKS if name in axes), None) if looks is None else looks
    try:
        found = sweep(cell, axes, folder, looks=looks, executor=processes, memory=memory, retry=retry)
    except KeyboardInterrupt:
        say_kept(folder)
        raise
    return _told(found, folder)


def _told(found: Dataset, folder: Path) -> tuple[Dataset, str]:
    """What came of the cells that were asked for; the page is of all that the folder holds."""
    page = write_page(load_dataset(folder / STORE, "Gather it again."), folder / PAGE)
    return found, f"{found.attrs['verdict']}\nResults: {folder / STORE}\nReport: {page}"


def _axis(word: str) -> tuple[str, list[Value]]:
    """From "seed=0,1,2"."""
    name, _, values = word.partition("=")
    return name, [_value(text) for text in values.split(",")]


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return WORDS.get(text.lower(), text)
