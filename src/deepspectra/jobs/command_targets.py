"""From the options of a command to the problem that it looks at: a target of the user's, or a network of the zoo."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from deepspectra import zoo
from deepspectra.argument_checks import check_choice
from deepspectra.errors import DeepSpectraError, FileError, OptionError, TargetError
from deepspectra.jobs.pages import Labels
from deepspectra.problem.example_subsets import limited
from deepspectra.problem.input_checks import usable_device
from deepspectra.problem.memory_budget import parse_bytes
from deepspectra.problem.parallel import current
from deepspectra.problem.problem import Problem
from deepspectra.problem.shared_problems import sharded

CONSOLE = Console(stderr=True)
SPLITS = ("train", "test", "both")
WEIGHTS = "model.safetensors"  # of a trained network, beside its results
IMPORTING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>", importlib.__file__)
AsJson = Annotated[
    bool, typer.Option("--json", help="Numbers as JSON on standard output, all else on standard error.")
]
Out = Annotated[Path, typer.Option(help="Directory of the results and the report.")]
Seed = Annotated[int, typer.Option(help="Seed of the training and of every random vector.")]


class Choice(NamedTuple):
    """What the options of a command say of its problem, each with its words on the command line."""

    model: Annotated[str | None, typer.Option(help=f"Zoo model, by default mlp: {', '.join(zoo.MODEL_NAMES)}.")] = (
        None
    )
    data: Annotated[
        str | None, typer.Option(help=f"Zoo data set, by default digits: {', '.join(zoo.DATA_NAMES)}.")
    ] = None
    data_root: Annotated[
        Path | None, typer.Option(envvar="DEEPSPECTRA_DATA", help="Folder of the data set's files.")
    ] = None
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights (safetensors, or a PyTorch state dict).")
    ] = None
    per_class: Annotated[int | None, typer.Option(min=1, help="Examples a class; all by default.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many of the examples, evenly spread.")] = None
    epochs: Annotated[int | None, typer.Option(min=0, help="Epochs of training, if no checkpoint.")] = None
    out: Out = Path()
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an earlier run's results in OUT.")] = (
        False
    )
    as_json: AsJson = False
    memory: Annotated[str | None, typer.Option(help='Memory budget, such as "8GiB".')] = None
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None
    at: Annotated[
        str | None,
        typer.Option(help="Also after these epochs of training, such as 0,1,5; one report of all."),
    ] = None
    split: Annotated[
        str,
        typer.Option(
            help="Analyse the data of training or of test, or both: these, and the test data's spectra beside them. "
            "TARGET then returns a pair, (Problem, Problem with the test data)."
        ),
    ] = "train"
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep finished stages in OUT/stages; go on behind those of a stopped run."),
    ] = False
    seed: Seed = 0


class Subject(NamedTuple):
    """A problem to be looked at, names of its classes, of model and data, and test data beside it if asked for."""

    problem: Problem
    class_names: list[str] | None
    labels: Labels
    test: Problem | None = None


class Moment(NamedTuple):
    """A subject, and where what is found of it goes."""

    label: str
    out: Path
    subject: Subject


def moments(target: str | None, chosen: Choice) -> list[Moment]:
    """The problem at each epoch that is asked for, and at the end of training."""
    epochs, out = _epochs(chosen.at), chosen.out
    if epochs and (target is not None or chosen.checkpoint is not None):
        raise OptionError(
            "--at follows the training of a network of the zoo; there is none with a checkpoint or target."
        )
    final = chosen_problem(target, chosen, snapshots=epochs)
    found = []
    for epoch in epochs:
        weights = _snapshot(out, epoch)
        earlier = chosen_problem(None, chosen._replace(checkpoint=weights))
        found.append(Moment(f"epoch {epoch}", weights.parent, earlier))
    return [*found, Moment("end" if epochs else "", out / "end" if epochs else out, final)]


def _epochs(at: str | None) -> tuple[int, ...]:
    """The numbers in "0,1,5"."""
    try:
        found = tuple(int(part) for part in at.split(",")) if at else ()
    except ValueError:
        found = (-1,)
    if list(found) != sorted(set(found)) or min(found, default=0) < 0:
        raise OptionError(f"--at {at}: expected epochs in order, such as 0,1,5.")
    return found


def _snapshot(out: Path, epoch: int) -> Path:
    """Where the weights after an epoch are kept."""
    return out / f"epoch-{epoch}" / WEIGHTS


def chosen_problem(
    target: str | None,
    chosen: Choice,
    *,
    draw: int | None = None,
    snapshots: tuple[int, ...] | None = (),
) -> Subject:
    """The problem of a target or of the zoo, its class names, and names of model and data for the report.

    `draw` is the seed of the draw of examples, if that is another than the training's, and `snapshots` are epochs
    after which the network's weights are kept; None leaves a network of the zoo untrained.
    """
    check_choice("split", chosen.split, SPLITS)
    if target is None:
        return _zoo_problem(chosen, chosen.seed if draw is None else draw, snapshots)
    return _subject_of(target, chosen)


def _subject_of(target: str, chosen: Choice) -> Subject:
    """The problem of a target, which decides everything that options may say of a network of the zoo."""
    options = ("model", "data", "checkpoint", "per_class", "epochs", "memory", "device")
    unused = [f"--{name.replace('_', '-')}" for name in options if getattr(chosen, name) is not None]
    if unused:
        raise OptionError(
            f"{', '.join(unused)}: of a network of the zoo; with a target, the function {target} decides. "
            "Leave that out, and set it where the Problem is made."
        )
    problem, *tests = _load_target(target)
    if chosen.split != "train" and not tests:
        raise OptionError(
            f"--split {chosen.split}: {target} returns one problem. Have it return a pair, that of the training data "
            "and that of the test data with the same network."
        )
    return _of_split(Subject(problem, None, Labels(seed=chosen.seed), *tests), chosen)


def _of_split(subject: Subject, chosen: Choice) -> Subject:
    """What is asked for of a problem and its test data, shared by the processes that there are."""

    def part(problem: Problem) -> Problem:
        return sharded(problem if chosen.limit is None else limited(problem, chosen.limit))

    test, split = None if subject.test is None else part(subject.test), chosen.split
    subject = subject._replace(problem=part(subject.problem), test=test)
    if split == "test" and subject.test is not None:
        labels = subject.labels
        named = labels._replace(data=f"{labels.data}, test".removeprefix(", "))
        return Subject(subject.test, subject.class_names, named)
    return subject if split == "both" else subject._replace(test=None)


def _zoo_problem(chosen: Choice, draw: int, snapshots: tuple[int, ...] | None) -> Subject:
    """Data, and a network from a checkpoint or trained here and saved beside the results."""
    if chosen.memory is not None:
        parse_bytes(chosen.memory)  # which is wrong, if it is, before a network is trained; as the device
    if chosen.device is not None:
        usable_device(chosen.device)
    model, data = chosen.model or "mlp", chosen.data or "digits"
    size = zoo.paper_side(model, data)
    examples = zoo.load(data, root=chosen.data_root, per_class=chosen.per_class, size=size, seed=draw)
    names = [str(name) for name in examples.class_names]
    shape = examples.input_shape
    network = zoo.build(model, input_shape=shape, num_classes=examples.num_classes, seed=chosen.seed)
    recipe = zoo.recipe(model, data, len(examples))
    epochs = recipe.epochs if chosen.epochs is None else chosen.epochs
    if snapshots and snapshots[-1] > epochs:
        raise OptionError(f"--at {snapshots[-1]}: training ends at epoch {epochs}.")
    about: dict[str, str | int] = {"model": model, "data": data, "seed": chosen.seed}
    about |= {"examples": len(examples), "epochs": epochs}
    about |= {} if chosen.per_class is None else {"draw": draw}

    def weights() -> dict[str, Tensor]:
        if chosen.checkpoint is not None:
            zoo.load_checkpoint(chosen.checkpoint, network)
        elif snapshots is None:
            pass
        elif (chosen.resume or not chosen.overwrite) and _was_trained(network, about, chosen, snapshots):
            CONSOLE.print(f"{model} was trained before: {chosen.out / WEIGHTS}")
        else:
            _train(network, examples, replace(recipe, epochs=epochs), about, chosen, snapshots)
        return network.state_dict()

    network.load_state_dict(current(torch.device("cpu")).of_first(weights))
    network.eval()
    pair = (examples.inputs, examples.targets)
    problem = Problem(network, pair, device=chosen.device, memory=chosen.memory)
    test = None
    if chosen.split != "train":
        other = zoo.load(data, root=chosen.data_root, split="test", per_class=chosen.per_class, size=size, seed=draw)
        pair = (other.inputs, other.targets)
        test = Problem(network, pair, device=chosen.device, memory=chosen.memory)
    drawn = f"{data}, {chosen.per_class} images a class" if chosen.per_class else data
    return _of_split(Subject(problem, names, Labels(model, drawn, chosen.seed), test), chosen)


def _was_trained(network: nn.Module, about: dict[str, str | int], chosen: Choice, snapshots: tuple[int, ...]) -> bool:
    """Load the end of a training that was done before; False, and nothing loaded, unless all that it leaves is there.

    Raises:
        FileError: it was another training.
    """
    expected = {_snapshot(chosen.out, epoch): about | {"epochs": epoch} for epoch in snapshots}
    expected[chosen.out / WEIGHTS] = about
    there = [path for path in expected if path.is_file()]
    advice = "Choose another --out" + ("." if chosen.resume else "; or add --overwrite, if it may go.")
    found = copy.deepcopy(network)
    for path in there:  # the end comes last and stays
        try:
            earlier = zoo.load_checkpoint(path, found)
        except FileError as error:
            raise FileError(f"{error} {advice}") from error
        if earlier != expected[path]:
            raise FileError(f"{path} was trained otherwise: {earlier}, not {expected[path]}. {advice}")
    if len(there) < len(expected):
        return False
    network.load_state_dict(found.state_dict())
    return True


def _train(
    network: nn.Module,
    examples: zoo.LabelledData,
    recipe: zoo.Recipe,
    about: dict[str, str | int],
    chosen: Choice,
    snapshots: tuple[int, ...],
) -> None:
    """Train a network and save it beside the results, also after the epochs in `snapshots`."""

    def keep(epoch: int) -> None:
        if epoch in snapshots:
            zoo.save_checkpoint(_snapshot(chosen.out, epoch), network, about | {"epochs": epoch})

    keep(0)
    with CONSOLE.status("training") as status:

        def show(history: zoo.History) -> None:
            keep(len(history))
            status.update(
                f"training {about['model']} on {about['data']}: epoch {len(history)} of {recipe.epochs}, "
                f"loss {history.losses[-1]:.4f}, accuracy {history.accuracies[-1]:.1%}"
            )

        history = zoo.train(network, examples, recipe, seed=chosen.seed, device=chosen.device, progress=show)
    path = chosen.out / WEIGHTS
    zoo.save_checkpoint(path, network, about)
    last = f"accuracy {history.accuracies[-1]:.1%} while training" if len(history) else "untrained"
    CONSOLE.print(
        f"Trained {about['model']} on {len(examples):,} examples of {examples.name}: {last}; saved as {path}"
    )


def _load_target(target: str) -> tuple[Problem, ...]:
    """The problem that file.py:function or package.module:function returns, or a pair with that of the test data."""
    function = load_function(target, "that takes nothing and returns a deepspectra.Problem")
    with _told_alone(target):
        found = function()
    problems = found if isinstance(found, tuple) and len(found) == 2 else (found,)
    for problem in problems:
        if not isinstance(problem, Problem):
            raise TargetError(
                f"target {target!r} returned {type(problem).__name__}; expected a deepspectra.Problem, or a pair of "
                "them, with the training and the test data."
            )
    return problems


@contextlib.contextmanager
def _told_alone(target: str) -> Iterator[None]:
    """Failures of the user's file or function as errors of this library, with the user's part of the traceback."""
    try:
        yield
    except (DeepSpectraError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise TargetError(f"target {target!r} cannot be imported: {error}") from error
    except Exception as error:
        frames = error.__traceback__
        while frames is not None and (frames.tb_frame.f_code.co_filename in (__file__, *IMPORTING)):
            frames = frames.tb_next
        told = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
        raise TargetError(f"target {target!r} failed by itself:\n{told}") from error


def load_function(target: str, purpose: str) -> Callable[..., Any]:
    """file.py:function or package.module:function; `purpose` says which function is expected.

    Raises:
        TargetError: there is none, or its file cannot be imported.
    """
    place, separator, function = target.rpartition(":")
    if not separator or not place or not function:
        raise TargetError(
            f"target {target!r}: expected file.py:function or package.module:function, a function {purpose}."
        )
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise TargetError(f"target {target!r}: there is no file {path}.")
        sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        with _told_alone(target):
            spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        with _told_alone(target):
            module = importlib.import_module(place)
    if not callable(getattr(module, function, None)):
        raise TargetError(f"target {target!r}: {place} has no function {function!r}.")
    found: Callable[..., Any] = getattr(module, function)
    return found
