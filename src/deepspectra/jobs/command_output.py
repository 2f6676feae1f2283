"""What a command says and saves: how far it is, what it keeps if it is stopped, its results, as JSON if asked for."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from deepspectra.argument_checks import LayerProgress
from deepspectra.errors import FileError
from deepspectra.glossary import terms_in
from deepspectra.jobs.command_targets import CONSOLE, Choice
from deepspectra.jobs.estimate import MINUTE, Plan
from deepspectra.jobs.one_voice import by_first
from deepspectra.jobs.pages import Dataset, save_dataset, write_page
from deepspectra.jobs.stage_meter import Countdown
from deepspectra.problem import finished_stages

PAGES = {"analysis": "report.html"}  # where a page is not called as its numbers are
STAGES = "stages"  # folder of what the commands keep to be resumed, each in one of its own
EVERY = 30  # seconds, after which it is said how far a command is, where nobody sees a status line


@by_first
def finish(
    dataset: Dataset,
    folder: Path,
    stem: str,
    *,
    said: str = "",
    save: Callable[[Path], object] | None = None,
    as_json: bool = False,
) -> None:
    """Say what was found, then save it: if one file does not fit, the others are still written.

    Args:
        dataset: the numbers, with the verdict.
        folder: where they go.
        stem: names the file and the page.
        said: before the verdict, or with it.
        save: what saves them in the folder, if it is more than the dataset.
        as_json: print them, too.
    """
    verdict = wrapped(str(dataset.attrs["verdict"]))
    has_verdict = " ".join(verdict.split()) in " ".join(said.split())
    typer.echo("\n" + "\n\n".join(filter(None, (said, "" if has_verdict else verdict))) + "\n", err=as_json)
    explain(verdict)
    page = folder / PAGES.get(stem, f"{stem}.html")
    try:
        if save is None:
            save_dataset(dataset, folder / f"{stem}.nc")
        else:
            save(folder)
        typer.echo(f"Results: {folder}", err=as_json)
    finally:
        typer.echo(f"Report: {write_page(dataset, page)}", err=as_json)
    if as_json:
        typer.echo(in_json(dataset))


@by_first
def tell(plan: Plan, *, as_json: bool) -> None:
    """Say what a job will take, as a table or as one line of JSON."""
    stages = [stage._asdict() | {"fits": stage.fits} for stage in plan.stages]
    about = {"job": plan.job, "effort": plan.effort, "what": plan.what, "advice": plan.advice, "fits": plan.fits}
    sums = {"seconds": plan.total_seconds, "products": plan.num_products, "num_bytes": plan.peak_bytes}
    sums |= {name: getattr(plan, name) for name in ("seconds_at_most", "products_at_most", "bytes_at_most")}
    numbers = {"gradient_seconds": plan.gradient_seconds, "memory_bytes": plan.memory}
    typer.echo(json_line({**about, **sums, **numbers, "stages": stages}) if as_json else str(plan))


def wrapped(text: str) -> str:
    """Sentences in lines as wide as the terminal, broken between words."""
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def explain(text: str) -> None:
    """The terms of a text, each in a line or two, where somebody reads them."""
    if CONSOLE.is_terminal:
        for term in terms_in(" ".join(text.split())):
            CONSOLE.print(f"[bold]{term.name}[/]: {term.meaning}", style="dim", highlight=False)


def in_json(dataset: Dataset) -> str:
    """A dataset as one line of JSON: attributes, coordinates, and variables with their dimensions; NaN is null."""
    return json_line(dataset.to_dict())


def json_line(tree: Mapping[str, Any]) -> str:
    """The same of names and numbers."""
    return json.dumps(_plain(tree), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


@contextlib.contextmanager
def kept(chosen: Choice, out: Path, stem: str) -> Iterator[Path | None]:
    """The folder of finished stages, if they are to be kept; what stops the command is told how it goes on."""
    folder = out / STAGES / stem if chosen.resume else None
    try:
        yield folder
    except FileError:  # what is there is not this command's
        raise
    except BaseException:
        if folder is not None and folder.is_dir():
            say_kept(folder)
        raise


def say_kept(folder: Path) -> None:
    """Say that a command that was stopped goes on."""
    CONSOLE.print(f"What is finished is kept in {folder}: the same command goes on behind it.")


@by_first
def forget(out: Path, stem: str) -> None:
    """Remove the finished stages of a command that has saved its results."""
    finished_stages.forget(out / STAGES / stem)
    with contextlib.suppress(OSError):  # another command's are there, or none were
        (out / STAGES).rmdir()


@contextlib.contextmanager
def status(what: str, work: Mapping[str, float] | None = None) -> Iterator[LayerProgress]:
    """Say what is being done, and yield what shows how far it is: in a line that changes, or now and then in one."""
    countdown, told = Countdown(work or {}), time.monotonic()

    def show(done: int, total: int | None, name: str) -> None:
        nonlocal told
        left = countdown.left(done, total, name)
        said = f"{what}: {name or 'the model'} ({done} of {total or 'some'} done{', about ' * bool(left)}{left})"
        line.update(said)
        if not CONSOLE.is_terminal and time.monotonic() - told > EVERY:
            CONSOLE.print(said, highlight=False)
            told = time.monotonic()

    with CONSOLE.status(what) as line:
        yield show


@by_first
def foretell(plan: Plan, chosen: Choice) -> None:
    """Say what a job will take, if that is more than a minute or than there is memory for."""
    if plan.total_seconds > MINUTE or not plan.fits:
        words = plan.told if chosen.resume else f"{plan.told} With --resume what is finished outlives a stop."
        CONSOLE.print(words, highlight=False)
