"""From the options of a command to the problem that it looks at: a target of the user's, or a network of the zoo."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

from deepspectra import zoo
from deepspectra.errors import FileError, OptionError, TargetError
from deepspectra.jobs.study import Variant
from deepspectra.problem.problem import Problem

CONSOLE = Console(stderr=True)
CONVOLUTIONAL = ("lenet", "vgg11-bn", "resnet18")
WEIGHTS = "model.safetensors"  # of a trained network, beside its results
PAPER_SIDE = 32  # side to which the papers pad images for convolutional networks


class Choice(NamedTuple):
    """What the options say of the problem."""

    model: str | None = None
    data: str | None = None
    root: Path | None = None
    checkpoint: Path | None = None
    per_class: int | None = None
    epochs: int | None = None
    memory: str | None = None
    device: str | None = None
    seed: int = 0
    resume: bool = False


class Moment(NamedTuple):
    """A problem to be looked at, and where what is found of it goes."""

    label: str
    place: Path
    problem: Problem
    class_names: list[str] | None
    model: str
    data: str


def moments(target: str | None, chosen: Choice, out: Path, at: str | None) -> list[Moment]:
    """The problem at each epoch that is asked for, and at the end of training."""
    epochs = _epochs(at)
    if epochs and (target is not None or chosen.checkpoint is not None):
        raise OptionError(
            "--at follows the training of a network of the zoo; there is none with a checkpoint or target."
        )
    final = chosen_problem(target, chosen, out, snapshots=epochs)
    found = []
    for epoch in epochs:
        place = _snapshot(out, epoch)
        if not place.is_file():
            raise OptionError(f"--at {epoch}: training ended before that epoch.")
        earlier = chosen_problem(None, chosen._replace(checkpoint=place), out)
        found.append(Moment(f"epoch {epoch}", place.parent, *earlier))
    return [*found, Moment("end" if epochs else "", out / "end" if epochs else out, *final)]


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
    out: Path,
    draw: int | None = None,
    variant: Variant | None = None,
    snapshots: tuple[int, ...] = (),
) -> tuple[Problem, list[str] | None, str, str]:
    """The problem of a target or of the zoo, its class names, and names of model and data for the report.

    `draw` is the seed of the draw of examples, if that is another than the training's; `variant` says how a study
    changes the network, and `snapshots` after which epochs its weights are kept.
    """
    if target is None:
        model, data = chosen.model or "mlp", chosen.data or "digits"
        options = chosen._asdict() | {"model": model, "data": data}
        problem, names = _zoo_problem(**options, out=out, draw=draw, variant=variant, snapshots=snapshots)
        return (
            problem,
            names,
            model,
            f"{data}, {chosen.per_class} images a class" if chosen.per_class else data,
        )
    given = {"--model": chosen.model, "--data": chosen.data, "--checkpoint": chosen.checkpoint,
             "--per-class": chosen.per_class, "--epochs": chosen.epochs, "--memory": chosen.memory,
             "--device": chosen.device}  # fmt: skip
    unused = [option for option, value in given.items() if value is not None]
    if unused:
        raise OptionError(
            f"{', '.join(unused)} belong to the zoo; with a target, the function {target} decides. "
            "Leave them out, and set them where the Problem is made."
        )
    return _load_target(target), None, "", ""


def _zoo_problem(
    model: str,
    data: str,
    *,
    out: Path,
    root: Path | None = None,
    checkpoint: Path | None = None,
    per_class: int | None = None,
    epochs: int | None = None,
    memory: str | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    draw: int | None = None,
    variant: Variant | None = None,
    snapshots: tuple[int, ...] = (),
) -> tuple[Problem, list[str]]:
    """Data, and a network from a checkpoint or trained here and saved beside the results."""
    variant = variant or Variant("")
    size = PAPER_SIDE if model in CONVOLUTIONAL and data in ("mnist", "fashion") else None
    drawn = seed if draw is None else draw
    examples = variant.of(zoo.load(data, root=root, per_class=per_class, size=size, seed=drawn), drawn)
    names = [str(name) for name in examples.class_names]
    shape = tuple(examples.inputs.shape[1:])
    network = zoo.build(model, input_shape=shape, num_classes=len(names), seed=seed)
    if variant.batch_norm:
        network = zoo.normalised(network, shape)
    recipe = zoo.recipe(model, data, len(examples))
    epochs = recipe.epochs if epochs is None else epochs
    epochs = min(1, epochs) if variant.epochs is None else epochs * variant.epochs
    about: dict[str, str | int] = {"model": model, "data": data, "seed": seed}
    about |= {"examples": len(examples), "epochs": epochs}
    trained = out / WEIGHTS
    if checkpoint is not None:
        zoo.load_checkpoint(checkpoint, network)
    elif resume and _was_trained(network, trained, about, out, snapshots):
        CONSOLE.print(f"{model} was trained before: {trained}")
    else:
        _train(network, examples, replace(recipe, epochs=epochs), out, about, snapshots, device)
    network.eval()
    data_pair = (examples.inputs, examples.targets)
    return Problem(network, data_pair, device=device, memory=memory), names


def _was_trained(
    network: nn.Module, trained: Path, about: dict[str, str | int], out: Path, snapshots: tuple[int, ...]
) -> bool:
    """Load the end of a training that was done before; False unless all that it should leave is there.

    Raises:
        FileError: it was another training.
    """
    expected = {_snapshot(out, epoch): about | {"epochs": epoch} for epoch in snapshots} | {trained: about}
    if not all(path.is_file() for path in expected):
        return False
    for path, meta in expected.items():  # the end comes last and stays
        earlier = zoo.load_checkpoint(path, network)
        if earlier != meta:
            raise FileError(f"{path} was trained otherwise: {earlier}, not {meta}. Choose another --out.")
    return True


def _train(
    network: nn.Module,
    examples: zoo.LabelledData,
    recipe: zoo.Recipe,
    out: Path,
    about: dict[str, str | int],
    snapshots: tuple[int, ...],
    device: str | None,
) -> None:
    """Train a network and save it beside the results, also after the epochs in `snapshots`."""

    def keep(epoch: int) -> None:
        if epoch in snapshots:
            zoo.save_checkpoint(_snapshot(out, epoch), network, about | {"epochs": epoch})

    keep(0)
    with CONSOLE.status("training") as status:

        def show(history: zoo.History) -> None:
            keep(len(history))
            status.update(
                f"training {about['model']} on {about['data']}: epoch {len(history)} of {recipe.epochs}, "
                f"loss {history.losses[-1]:.4f}, accuracy {history.accuracies[-1]:.1%}"
            )

        history = zoo.train(
            network,
            examples,
            epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            batch_size=recipe.batch_size,
            milestones=recipe.milestones,
            seed=int(about["seed"]),
            device=device,
            progress=show,
        )
    path = out / WEIGHTS
    zoo.save_checkpoint(path, network, about)
    last = f"accuracy {history.accuracies[-1]:.1%} while training" if len(history) else "untrained"
    CONSOLE.print(
        f"Trained {about['model']} on {len(examples):,} examples of {examples.name}: {last}; saved as {path}"
    )


def _load_target(target: str) -> Problem:
    """The problem that file.py:function or package.module:function returns."""
    problem = load_function(target, "that takes nothing and returns a deepspectra.Problem")()
    if not isinstance(problem, Problem):
        raise TargetError(
            f"target {target!r} returned {type(problem).__name__}; expected a deepspectra.Problem."
        )
    return problem


def load_function(target: str, purpose: str) -> Callable[..., Any]:
    """file.py:function or package.module:function; `purpose` says which function is expected.

    Raises:
        TargetError: there is none, or it cannot be imported.
    """
    place, separator, function = target.rpartition(":")
    if not separator or not place or not function:
        raise TargetError(
            f"target {target!r}: expected file.py:function or package.module:function, a function {purpose}."
        )
    try:
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
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(place)
    except ImportError as error:
        raise TargetError(f"target {target!r} cannot be imported: {error}") from error
    if not callable(getattr(module, function, None)):
        raise TargetError(f"target {target!r}: {place} has no function {function!r}.")
    found: Callable[..., Any] = getattr(module, function)
    return found
