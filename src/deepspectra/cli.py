"""The command line: `deepspectra demo`, `analyze`, `layers`, `regions`, `compare`, `study` and `report`."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from typing import Annotated

import typer
import xarray as xr

from deepspectra import zoo
from deepspectra.analysis.class_groups import class_groups
from deepspectra.analysis.compare import compare
from deepspectra.analysis.layers import Layers, layers
from deepspectra.analysis.regions import NUM_GROUPS, regions
from deepspectra.analysis.regions import OF as KINDS_OF_REGIONS
from deepspectra.analysis.study import study
from deepspectra.errors import DeepSpectraError, OptionError
from deepspectra.jobs.analyze import Analysis, analyze, save_series
from deepspectra.jobs.checkpoint import forget
from deepspectra.jobs.compare import comparison_dataset
from deepspectra.jobs.layers import layer_dataset
from deepspectra.jobs.pages import check_writable, load_page, save_page
from deepspectra.jobs.regions import regions_dataset
from deepspectra.jobs.study import STUDIES, study_dataset
from deepspectra.jobs.sweep_command import sweep_of
from deepspectra.jobs.targets import CONSOLE, Choice, chosen_problem, moments
from deepspectra.problem.problem import Problem
from deepspectra.report.page import write, write_series
from deepspectra.rows.averages import METHODS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Split the spectrum of a deep network into the parts that cause it.",
)

Target = Annotated[
    str | None, typer.Argument(help="file.py:function or package.module:function that returns a Problem.")
]
ModelName = Annotated[
    str | None, typer.Option(help=f"Zoo model, by default mlp: {', '.join(zoo.MODEL_NAMES)}.")
]
DataName = Annotated[
    str | None, typer.Option(help=f"Zoo data set, by default digits: {', '.join(zoo.DATA_NAMES)}.")
]
DataRoot = Annotated[
    Path | None, typer.Option(envvar="DEEPSPECTRA_DATA", help="Folder of the data set's files.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Trained weights (safetensors, or a PyTorch state dict).")
]
PerClass = Annotated[int | None, typer.Option(help="Examples a class; all by default.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training, if no checkpoint.")]
Memory = Annotated[str | None, typer.Option(help='Memory budget, such as "8GiB".')]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Directory of the results and the report.")]
Seed = Annotated[int, typer.Option(help="Seed of the training and of every random vector.")]
At = Annotated[
    str | None, typer.Option(help="Also after these epochs of training, such as 0,1,5; one report of all.")
]
MALLOC_OPTIONS = {
    -3: 2**31 - 1,
    -1: 2**31 - 1,
    -2: 2**28,
}  # of mallopt: mmap threshold, trim threshold, top pad
JUDGED = ("kfac", "ekfac", "cfac")  # Kronecker-factored approximations
SECONDS_OF_CUBE = 4e-10  # of eigenvalues and vectors of a dense matrix, times the cube of its rows, on a CPU
FEW_ROWS = 3000  # whose eigenvalues take seconds
SPECTRA_OF_REGIONS = 3  # of a layer, with its knock-outs, in units of eigenvalues and vectors
STAGES = "stages"  # folder of what an analysis keeps to be resumed


def main() -> None:
    """Run the command line; an error of this library ends it with its message and exit status 2."""
    _keep_freed_memory()
    try:
        app()
    except DeepSpectraError as error:
        CONSOLE.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        sys.exit(2)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensor: faulting pages in anew costs a tenth of all products."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for option, value in MALLOC_OPTIONS.items():
            library.mallopt(option, value)


@app.command()
def demo(out: Out = Path("deepspectra-demo"), seed: Seed = 0) -> None:
    """Train a small network on the embedded digits, analyse it and write the report."""
    check_writable(out)
    problem, names, model, data = chosen_problem(None, Choice(seed=seed), out)
    _finish(analyze(problem, seed=seed, model=model, data=data, class_names=names), out)


@app.command("analyze")
def analyze_command(
    target: Target = None,
    model: ModelName = None,
    data: DataName = None,
    data_root: DataRoot = None,
    checkpoint: Checkpoint = None,
    per_class: PerClass = None,
    epochs: Epochs = None,
    out: Out = Path("deepspectra-run"),
    memory: Memory = None,
    device: Device = None,
    num: Annotated[int | None, typer.Option(help="Top eigenpairs of H and of G.")] = None,
    num_probes: Annotated[int | None, typer.Option(help="Probes of each density.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Krylov steps of each probe.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative residual of the eigenpairs.")] = None,
    groups: Annotated[
        int | None, typer.Option(help="Average over so many groups of classes, by their logits.")
    ] = None,
    at: At = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep finished stages in OUT; go on from those of a stopped run."),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Analyse your own problem (TARGET), or a model of the zoo on one of its data sets.

    What --num, --num-probes, --num-steps and --rtol are by default follows from the size of the problem.
    """
    check_writable(out)
    chosen = Choice(model, data, data_root, checkpoint, per_class, epochs, memory, device, seed, resume)
    series, kept = {}, []
    for moment in moments(target, chosen, out, at):
        stages = moment.place / STAGES if resume else None
        owner = None if groups is None else class_groups(moment.problem, groups, seed=seed)
        names = moment.class_names if owner is None else _group_names(moment.class_names, owner.tolist())
        series[moment.label] = analyze(
            moment.problem,
            num=num,
            num_probes=num_probes,
            num_steps=num_steps,
            rtol=rtol,
            seed=seed,
            title=f"Spectrum of {target}" if target else "",
            model=moment.model,
            data=moment.data,
            class_names=names,
            groups=owner,
            resume=stages,
        )
        _finish(series[moment.label], moment.place)
        kept += [] if stages is None else [stages]
    if len(series) > 1:
        typer.echo(f"All: {save_series(series, out / 'report.html')}")
    for folder in kept:
        forget(folder)


def _group_names(names: list[str] | None, owner: list[int]) -> list[str]:
    """The first two classes of each group, and how many more there are."""
    names = names or [str(c) for c in range(len(owner))]
    members = [[name for name, g in zip(names, owner, strict=True) if g == j] for j in range(max(owner) + 1)]
    return [", ".join(some[:2]) + (f" +{len(some) - 2}" if len(some) > 2 else "") for some in members]


@app.command("layers")
def layers_command(
    target: Target = None,
    model: ModelName = None,
    data: DataName = None,
    data_root: DataRoot = None,
    checkpoint: Checkpoint = None,
    per_class: PerClass = None,
    epochs: Epochs = None,
    out: Out = Path("deepspectra-run"),
    memory: Memory = None,
    device: Device = None,
    kronecker: Annotated[
        bool, typer.Option(help="Judge KFAC, EKFAC and CFAC too, which takes longer.")
    ] = False,
    at: At = None,
    seed: Seed = 0,
) -> None:
    """Features, errors and gradients of every layer, exactly: for up to about 12,000 examples × (classes − 1)."""
    check_writable(out)
    chosen = Choice(model, data, data_root, checkpoint, per_class, epochs, memory, device, seed)
    series = {}
    for moment in moments(target, chosen, out, at):
        found = _layers_of(moment.problem, kronecker=kronecker)
        dataset = layer_dataset(found, moment.problem, model=moment.model, data=moment.data, seed=seed)
        _finish_page(found, dataset, moment.place, "layers")
        series[moment.label] = dataset
    _finish_series(series, out, "layers")


def _layers_of(problem: Problem, *, kronecker: bool) -> Layers:
    _warn_of_long_spectra(problem)
    with CONSOLE.status("layers") as status:
        return layers(
            problem,
            kronecker=JUDGED if kronecker else (),
            progress=lambda name: status.update(f"layer {name}"),
        )


def _warn_of_long_spectra(problem: Problem, spectra: int = 1) -> None:
    """Say beforehand how long so many dense spectra of a layer will take, if that is minutes."""
    num_rows = problem.num_examples * (problem.num_classes - 1)
    minutes = spectra * SECONDS_OF_CUBE * num_rows**3 / 60
    if minutes >= 1:
        CONSOLE.print(
            f"{num_rows:,} rows (examples × (classes − 1)): about {minutes:.0f} minutes for each layer of more "
            f"parameters than that, seconds with --per-class {FEW_ROWS // problem.num_classes**2 or 1}."
        )


@app.command("regions")
def regions_command(
    target: Target = None,
    model: ModelName = None,
    data: DataName = None,
    data_root: DataRoot = None,
    checkpoint: Checkpoint = None,
    per_class: PerClass = None,
    epochs: Epochs = None,
    out: Out = Path("deepspectra-run"),
    memory: Memory = None,
    device: Device = None,
    of: Annotated[str, typer.Option(help="Whose spectra, in any order.")] = ",".join(KINDS_OF_REGIONS),
    method: Annotated[str, typer.Option(help=f"{' or '.join(METHODS)}.")] = METHODS[0],
    num_groups: Annotated[
        int | None,
        typer.Option(
            help="Groups of examples left out in turn, for standard errors; 0 for none; by default 8."
        ),
    ] = None,
    at: At = None,
    seed: Seed = 0,
) -> None:
    """Which part makes outliers, bump and bulk: exact knock-outs in decades, for up to some hundred examples."""
    check_writable(out)
    chosen = Choice(model, data, data_root, checkpoint, per_class, epochs, memory, device, seed)
    kinds = list(dict.fromkeys(kind.strip() for kind in of.split(",")))
    if not set(kinds) <= set(KINDS_OF_REGIONS):
        raise OptionError(f"--of {of}: expected some of {', '.join(KINDS_OF_REGIONS)}.")
    series = {}
    for moment in moments(target, chosen, out, at):
        groups = NUM_GROUPS if num_groups is None else num_groups
        _warn_of_long_spectra(moment.problem, spectra=(groups + 1) * SPECTRA_OF_REGIONS)
        found = []
        with CONSOLE.status("regions") as status:
            for kind in kinds:

                def show(name: str, kind: str = kind) -> None:
                    status.update(f"{kind}: {name}")

                found.append(
                    regions(
                        moment.problem, kind, method=method, num_groups=num_groups, seed=seed, progress=show
                    )
                )
        dataset = regions_dataset(found, moment.problem, model=moment.model, data=moment.data, seed=seed)
        _finish_page("\n\n".join(map(str, found)), dataset, moment.place, "regions")
        series[moment.label] = dataset
    _finish_series(series, out, "regions")


@app.command("compare")
def compare_command(
    first: Target = None,
    second: Target = None,
    model: ModelName = None,
    data: DataName = None,
    data_root: DataRoot = None,
    per_class: PerClass = None,
    epochs: Epochs = None,
    out: Out = Path("deepspectra-compare"),
    memory: Memory = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Do two networks share eigenspaces? Your own two problems (FIRST and SECOND), or two trainings of the zoo."""
    if (first is None) != (second is None):
        raise OptionError("compare takes two targets, or none and a model of the zoo, trained twice.")
    check_writable(out)
    problems = []
    for j, target in enumerate((first, second)):
        chosen = Choice(model, data, data_root, None, per_class, epochs, memory, device, seed + j)
        problem, _, name, source = chosen_problem(target, chosen, out / f"seed-{seed + j}", draw=seed)
        problems.append(problem)
    with CONSOLE.status("comparing") as status:
        found = compare(*problems, seed=seed, progress=lambda name: status.update(f"layer {name}"))
    dataset = comparison_dataset(found, problems[0], model=name, data=source, seed=seed)
    _finish_page(found, dataset, out, "compare")


@app.command("study")
def study_command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}.")],
    model: ModelName = None,
    data: DataName = None,
    data_root: DataRoot = None,
    per_class: PerClass = None,
    epochs: Epochs = None,
    networks: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 2,
    out: Out = Path("deepspectra-study"),
    memory: Memory = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train a network of the zoo in several variants, and measure every layer of each."""
    if name not in STUDIES:
        raise OptionError(f"there is no study {name!r}; there are {', '.join(STUDIES)}.")
    check_writable(out)
    variants: dict[str, list[Problem]] = {}
    for variant in STUDIES[name]:
        for j in range(networks):
            chosen = Choice(model, data, data_root, None, per_class, epochs, memory, device, seed + j)
            place = out / variant.name.replace(" ", "-") / f"seed-{seed + j}"
            problem, _, network, source = chosen_problem(None, chosen, place, draw=seed, variant=variant)
            variants.setdefault(variant.name, []).append(problem)
    with CONSOLE.status("measuring") as status:
        found = study(variants, seed=seed, progress=status.update)
    dataset = study_dataset(found, problem, name=name, model=network, data=source, seed=seed)
    _finish_page(found, dataset, out, "study")


@app.command("sweep")
def sweep_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET] AXIS=VALUES...",
            help="Axes such as model=mlp,lenet per_class=13,51 epochs=0,40 seed=0,1,2, of the zoo or of a function "
            "of yours; none to gather what OUT has so far.",
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(envvar="DEEPSPECTRA_DATA", help="Folder of the zoo's data sets.")
    ] = None,
    training_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of each training, whatever is looked at; the recipe's by default."),
    ] = None,
    looks: Annotated[
        str | None, typer.Option(help="Axis along which one call of TARGET makes all cells.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="At once; one a CPU by default.")] = None,
    memory: Annotated[str | None, typer.Option(help='For all processes together, such as "8GiB".')] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("deepspectra-sweep"),
    retry: Annotated[bool, typer.Option("--retry", help="Do failed cells again.")] = False,
) -> None:
    """Measure a grid of networks, a process each; goes on where an earlier sweep in OUT was stopped or killed."""
    typer.echo(
        sweep_of(
            words or (),
            out,
            looks=looks,
            data_root=data_root,
            training_epochs=training_epochs,
            processes=processes,
            memory=memory,
            retry=retry,
        )
    )


@app.command()
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(help="Directories that commands wrote; of several, one page to choose from."),
    ],
    out: Annotated[Path | None, typer.Option(help="The HTML file; by default in the last directory.")] = None,
) -> None:
    """Write the report of a saved analysis again, or one report of several."""
    series = {str(directory): load_page(directory) for directory in directories}
    path = out or directories[-1] / "report.html"
    check_writable(path.parent)
    if len(series) > 1:
        write_series(series, path)
    else:
        write(next(iter(series.values())), path)
    typer.echo(f"Report: {path}")


def _finish(result: Analysis, out: Path) -> None:
    """Say what was found, then save it: if one file does not fit, the others are still written."""
    typer.echo(f"\n{result}\n")
    try:
        result.save(out)
        typer.echo(f"Results: {out}")
    finally:
        typer.echo(f"Report: {result.to_html(out / 'report.html')}")


def _finish_page(found: object, dataset: xr.Dataset, out: Path, stem: str) -> None:
    typer.echo(f"\n{found}\n\n{dataset.attrs['verdict']}\n")
    path = save_page(dataset, out, stem)
    typer.echo(f"Results: {path.parent}")
    typer.echo(f"Report: {path}")


def _finish_series(series: dict[str, xr.Dataset], out: Path, stem: str) -> None:
    """One page of all, if there are several."""
    if len(series) > 1:
        path = out / f"{stem}.html"
        write_series(series, path)
        typer.echo(f"All: {path}")


if __name__ == "__main__":
    main()
