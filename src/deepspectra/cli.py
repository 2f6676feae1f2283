"""The command line: `deepspectra demo`, `analyze`, `layers`, `regions`, `certify`, `compare` and others."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from deepspectra.analysis.compare import compare
from deepspectra.analysis.layers import layers
from deepspectra.analysis.regions import NUM_GROUPS, check_groups, regions
from deepspectra.analysis.regions import OF as KINDS_OF_REGIONS
from deepspectra.argument_checks import check_choice
from deepspectra.certificates.binomial_bounds import BOUNDS
from deepspectra.certificates.posterior import BASES
from deepspectra.certificates.priors import KINDS as PRIORS
from deepspectra.certificates.settings import VARIANTS, Settings
from deepspectra.errors import DeepSpectraError, OptionError
from deepspectra.jobs.analyze import Analysis, Counts, analyze, check_options, save_series
from deepspectra.jobs.certify import certified, named_priors, unseen
from deepspectra.jobs.certify_dataset import certificate_dataset
from deepspectra.jobs.command_output import STAGES, finish, foretell, forget, in_json, kept, status, tell
from deepspectra.jobs.command_targets import CONSOLE, AsJson, Choice, Moment, Out, Seed, chosen_problem, moments
from deepspectra.jobs.compare_dataset import comparison_dataset
from deepspectra.jobs.estimate import JOBS, estimate, foreseen
from deepspectra.jobs.layers_dataset import layer_dataset
from deepspectra.jobs.one_voice import among_all, complain, one_voice
from deepspectra.jobs.option_names import in_options
from deepspectra.jobs.pages import (
    Dataset,
    check_writable,
    refuse_overwriting,
    rewrite,
    write_page,
)
from deepspectra.jobs.regions_dataset import regions_dataset
from deepspectra.jobs.sweep_cell import DONE
from deepspectra.jobs.sweep_command import sweep_of
from deepspectra.problem.problem import Problem
from deepspectra.results import versions
from deepspectra.rows.averages import METHODS

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Target = Annotated[
    str | None, typer.Argument(help="file.py:function or package.module:function that returns a Problem.")
]
Command = Callable[..., None]
LAST = ("split", "at", "resume", "seed")  # of a command's options
MALLOC_OPTIONS = {-3: 2**31 - 1, -1: 2**31 - 1, -2: 2**28}  # mmap threshold, trim threshold, top pad
JUDGED = ("kfac", "ekfac", "cfac")  # Kronecker-factored approximations


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
) -> None:
    """Split the spectrum of a deep network into the parts that cause it.

    Exit status: 0 done; 1 an unforeseen failure, or a sweep without a finished cell; 2 an option, a model or data
    that cannot be used; 130 interrupted.
    """
    if version:
        typer.echo(f"deepspectra {versions()['deepspectra']}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error of this library ends it with its message and exit status 2."""
    _keep_freed_memory()
    try:
        with one_voice(sys.argv[1:]):
            app()
    except DeepSpectraError as error:
        complain(error)
        sys.exit(2)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensor: faulting pages in anew costs a tenth of all products."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for option, value in MALLOC_OPTIONS.items():
            library.mallopt(option, value)


def _command(name: str, *, out: str, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Register a command, whose parameter `chosen` is spelled as the options of `Choice`, but for some."""
    kinds = get_type_hints(Choice, include_extras=True)
    defaults = Choice._field_defaults | {"out": Path(out)}
    spelled = {
        field: inspect.Parameter(
            field, inspect.Parameter.KEYWORD_ONLY, default=defaults[field], annotation=kinds[field]
        )
        for field in Choice._fields
        if field not in without
    }

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def command(**options: object) -> None:
            given = {one.name for one in parameters if options[one.name] != one.default}
            mine = options.get("target") or options.get("first")  # which decides on its memory
            with in_options(given if mine else given | {"memory"}):
                chosen = {field: options.pop(field) for field in spelled}
                function(**options, chosen=Choice(**chosen))  # type: ignore[arg-type]  # Typer has checked them

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name == "chosen":
                parameters += [option for field, option in spelled.items() if field not in LAST]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        parameters += [spelled[field] for field in LAST if field in spelled]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return app.command(name)(command)

    return register


@app.command()
def demo(out: Out = Path("deepspectra-demo"), seed: Seed = 0, as_json: AsJson = False) -> None:
    """Train a small network on the embedded digits, analyse it and write the report."""
    check_writable(out)
    one = chosen_problem(None, Choice(model="mlp-small", out=out, overwrite=True, seed=seed))
    model, data, _ = one.labels
    found = analyze(one.problem, seed=seed).labelled(model=model, data=data, class_names=one.class_names)
    finish(found.dataset, out, "analysis", save=found.save, as_json=as_json)


@_command("analyze", out="deepspectra-run")
def analyze_command(
    target: Target = None,
    *,
    chosen: Choice,
    num: Annotated[int | None, typer.Option(min=1, help="Top eigenpairs of H and of G.")] = None,
    num_probes: Annotated[int | None, typer.Option(min=1, help="Probes of each density.")] = None,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Krylov steps of each probe.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative residual of the eigenpairs.")] = None,
    margin: Annotated[
        float | None, typer.Option(min=1, help="Outliers are above so many times the bulk's edge; 1.25 by default.")
    ] = None,
    effort: Annotated[
        str, typer.Option(help="How well spectra are resolved: quick, standard or paper.")
    ] = "standard",
    groups: Annotated[
        int | None,
        typer.Option(
            min=2, help="Average over so many groups of classes, by their logits; 10 by default for over 100."
        ),
    ] = None,
) -> None:
    """Analyse your own problem (TARGET), or a model of the zoo on one of its data sets.

    What --num, --num-probes, --num-steps and --rtol are by default follows from the size of the problem.
    """
    counts: Counts = {"num": num, "num_probes": num_probes, "num_steps": num_steps, "rtol": rtol, "margin": margin}
    check_options(effort, **counts)
    series: dict[str, Analysis] = {}

    def look(moment: Moment, stages: Path | None) -> Dataset:
        problem, names, labels, test = moment.subject
        found = analyze(
            problem,
            test=test,
            effort=effort,
            seed=chosen.seed,
            groups=groups,
            resume=stages,
            **counts,
        )
        model, data, _ = labels
        title = f"Spectrum of {target}" if target and not problem.name else ""
        found = found.labelled(title=title, model=model, data=data, class_names=names)
        series[moment.label] = found
        finish(found.dataset, moment.out, "analysis", save=found.save, as_json=chosen.as_json)
        return found.dataset

    def together(_: Mapping[str, Dataset]) -> Path:
        return save_series(series, chosen.out / "report.html")

    _look_at_moments(target, chosen, "analysis", look, together)


@_command("layers", out="deepspectra-run", without=("split",))
def layers_command(
    target: Target = None,
    *,
    chosen: Choice,
    kronecker: Annotated[bool, typer.Option(help="Judge KFAC, EKFAC and CFAC too, which takes longer.")] = False,
) -> None:
    """Features, errors and gradients of every layer, exactly: for up to about 12,000 examples × (classes − 1)."""

    def look(moment: Moment, stages: Path | None) -> Dataset:
        problem = moment.subject.problem
        judged = JUDGED if kronecker else ()
        work = _foretold(problem, chosen, "layers", kronecker=judged)
        with status("layers", work()) as show:
            found = layers(problem, kronecker=judged, resume=stages, progress=show)
        dataset = layer_dataset(found, problem, moment.subject.labels)
        finish(dataset, moment.out, "layers", said=str(found), as_json=chosen.as_json)
        return dataset

    _look_at_moments(target, chosen, "layers", look)


@_command("regions", out="deepspectra-run", without=("split",))
def regions_command(
    target: Target = None,
    *,
    chosen: Choice,
    of: Annotated[str, typer.Option(help="Whose spectra, in any order.")] = ",".join(KINDS_OF_REGIONS),
    method: Annotated[str, typer.Option(help=f"{' or '.join(METHODS)}.")] = METHODS[0],
    num_groups: Annotated[
        int | None,
        typer.Option(help="Groups of examples left out in turn, for standard errors; 0 for none; by default 8."),
    ] = None,
) -> None:
    """Which part makes outliers, bump and bulk: exact knock-outs in decades, for up to some hundred examples."""
    kinds = _kinds_of_regions(of)
    check_choice("method", method, METHODS)
    if num_groups is not None:
        check_groups(num_groups)

    def look(moment: Moment, stages: Path | None) -> Dataset:
        problem = moment.subject.problem
        groups = NUM_GROUPS if num_groups is None else num_groups
        work = _foretold(problem, chosen, "regions", of=kinds, num_groups=groups)
        found = []
        for kind in kinds:
            with status(kind, work(kind)) as show:
                settings = functools.partial(regions, method=method, num_groups=num_groups, seed=chosen.seed)
                found.append(settings(problem, kind, resume=stages, progress=show))
        dataset = regions_dataset(found, problem, moment.subject.labels)
        said = "\n\n".join(map(str, found))
        finish(dataset, moment.out, "regions", said=said, as_json=chosen.as_json)
        return dataset

    _look_at_moments(target, chosen, "regions", look)


def _kinds_of_regions(of: str) -> list[str]:
    """Those that are named, with commas."""
    kinds = list(dict.fromkeys(kind.strip() for kind in of.split(",")))
    if not set(kinds) <= set(KINDS_OF_REGIONS):
        raise OptionError(f"--of {of}: expected some of {', '.join(KINDS_OF_REGIONS)}.")
    return kinds


def _foretold(problem: Problem, chosen: Choice, job: str, **asked: object) -> Callable[..., Mapping[str, float]]:
    """Say what a job will take, if that can be foreseen; and what tells the seconds of its steps."""
    plan = foreseen(estimate, problem, job, **asked)
    if plan is None:
        return lambda _="": {}
    foretell(plan, chosen)
    return plan.work


def _claim(chosen: Choice, stem: str) -> None:
    """See before any work that results can be written, and that none of an earlier run are lost."""

    def check() -> None:
        check_writable(chosen.out)
        place = chosen.out / "end" if chosen.at else chosen.out
        if not (chosen.overwrite or (chosen.resume and (place / STAGES / stem).is_dir())):
            refuse_overwriting(place, stem)

    among_all().of_first(check)


def _look_at_moments(
    target: str | None,
    chosen: Choice,
    stem: str,
    look: Callable[[Moment, Path | None], Dataset],
    together: Callable[[Mapping[str, Dataset]], Path] | None = None,
) -> None:
    """A page of each moment, which `look` makes, and one of all if there are several."""
    _claim(chosen, stem)
    series, outs = {}, []
    for moment in moments(target, chosen):
        with kept(chosen, moment.out, stem) as stages:
            series[moment.label] = look(moment, stages)
        outs.append(moment.out)
    if len(series) > 1 and among_all().rank == 0:
        page = together(series) if together else write_page(series, chosen.out / f"{stem}.html")
        typer.echo(f"All: {page}", err=chosen.as_json)
    if not chosen.resume:
        return
    if any("left_out" in dataset.attrs for dataset in series.values()):
        CONSOLE.print(f"The rest is kept in {STAGES}/: the same command with more memory does what is left.")
        return
    for out in outs:
        forget(out, stem)


@_command("estimate", out="", without=("out", "overwrite", "epochs", "at", "split", "resume"))
def estimate_command(
    target: Target = None,
    *,
    chosen: Choice,
    job: Annotated[str, typer.Option(help=f"What is to be done: {', '.join(JOBS)}.")] = JOBS[0],
    effort: Annotated[str, typer.Option(help="Of an analysis: quick, standard or paper.")] = "standard",
    of: Annotated[str, typer.Option(help="Of regions: whose spectra.")] = ",".join(KINDS_OF_REGIONS),
    kronecker: Annotated[bool, typer.Option(help="Of layers: judge KFAC, EKFAC and CFAC too.")] = False,
    prior: Annotated[str, typer.Option(help="Of certify: its priors, with commas.")] = PRIORS[0],
) -> None:
    """Time and memory that a job will take, stage by stage, from one measured batch; the job is not run.

    A network of the zoo is taken untrained, unless there is a checkpoint. Exit status 2 if memory is not enough.
    """
    kinds, priors = _kinds_of_regions(of), named_priors(prior)
    problem = chosen_problem(target, chosen, snapshots=None).problem
    plan = estimate(problem, job, effort, of=kinds, kronecker=JUDGED if kronecker else (), prior=priors)
    tell(plan, as_json=chosen.as_json)
    if not plan.fits:
        raise typer.Exit(2)


@_command("certify", out="deepspectra-certify", without=("at", "split"))
def certify_command(
    target: Target = None,
    *,
    chosen: Choice,
    prior: Annotated[
        str,
        typer.Option(help=f"{', '.join(PRIORS)}; of several, with commas, the best, and all are charged."),
    ] = PRIORS[0],
    basis: Annotated[
        str | None, typer.Option(help=f"Of the posterior's variances: {', '.join(BASES)}; by default the variant's.")
    ] = None,
    bound: Annotated[str, typer.Option(help=f"{', '.join(BOUNDS)}.")] = "kl",
    variant: Annotated[str | None, typer.Option(help=f"As published, for comparison: {', '.join(VARIANTS)}.")] = None,
    test: Annotated[
        str | None,
        typer.Option(help="file.py:function that returns unseen (x, y); of the zoo, its test data."),
    ] = None,
    descent_epochs: Annotated[int | None, typer.Option(min=0, help="Epochs of descent on the bound.")] = None,
    minutes: Annotated[float | None, typer.Option(help="After which descent ends.")] = None,
) -> None:
    """A PAC-Bayes bound on the error on unseen data, beside the binomial bound and that of the network as it is."""
    priors = named_priors(prior)
    settings = Settings.asked(basis=basis, bound=bound, minutes=minutes, variant=variant, epochs=descent_epochs)
    _claim(chosen, "certify")
    problem, _, labels, _ = chosen_problem(target, chosen)
    _foretold(problem, chosen, "certify", prior=priors, **settings)
    with kept(chosen, chosen.out, "certify") as stages:
        with status("certifying") as show:
            beside = unseen(target, test, chosen)
            found = certified(problem, priors, beside, settings, seed=chosen.seed, folder=stages, progress=show)
        dataset = certificate_dataset(found, problem, labels)
        finish(dataset, chosen.out, "certify", said=str(found), as_json=chosen.as_json)
    forget(chosen.out, "certify")


@_command("compare", out="deepspectra-compare", without=("checkpoint", "at", "split"))
def compare_command(first: Target = None, second: Target = None, *, chosen: Choice) -> None:
    """Do two networks share eigenspaces? Your own two problems (FIRST and SECOND), or two trainings of the zoo."""
    if (first is None) != (second is None):
        raise OptionError("compare takes two targets, or none and a model of the zoo, trained twice.")
    _claim(chosen, "compare")
    seed = chosen.seed
    problems: list[Problem] = []
    for target, one in zip((first, second), _seeds(chosen, chosen.out, 2), strict=True):
        problem, _, labels, _ = chosen_problem(target, one, draw=seed)
        problems.append(problem)
    work = _foretold(problems[0], chosen, "compare")
    with kept(chosen, chosen.out, "compare") as stages:
        with status("comparing", work()) as show:
            found = compare(*problems, seed=seed, resume=stages, progress=show)
        dataset = comparison_dataset(found, problems[0], labels._replace(seed=seed))
        finish(dataset, chosen.out, "compare", said=str(found), as_json=chosen.as_json)
    forget(chosen.out, "compare")


def _seeds(chosen: Choice, out: Path, num: int) -> list[Choice]:
    """The same network, to be trained from several seeds."""
    seeds = range(chosen.seed, chosen.seed + num)
    return [chosen._replace(out=out / f"seed-{seed}", seed=seed) for seed in seeds]


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
    layers: Annotated[bool, typer.Option("--layers", help="Measure every layer of the zoo's networks, too.")] = False,
    looks: Annotated[str | None, typer.Option(help="Axis along which one call of TARGET makes all cells.")] = None,
    processes: Annotated[int | None, typer.Option(help="At once; one a CPU by default.")] = None,
    memory: Annotated[str | None, typer.Option(help='For all processes together, such as "8GiB".')] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("deepspectra-sweep"),
    retry: Annotated[bool, typer.Option("--retry", help="Do failed cells again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a grid of networks, a process each, and draw what moves; goes on where a sweep in OUT was stopped."""
    found, said = sweep_of(
        words or (),
        out,
        looks=looks,
        data_root=data_root,
        training_epochs=training_epochs,
        by_layer=layers,
        processes=processes,
        memory=memory,
        retry=retry,
    )
    typer.echo(said, err=as_json)
    if as_json:
        typer.echo(in_json(found))
    if not (found.status == DONE).any():
        raise typer.Exit(1)


@app.command()
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(help="Directories that commands wrote; of several, a page of each kind to choose from."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file, by default in the last directory; further kinds beside it.")
    ] = None,
) -> None:
    """Write every page of a directory again; of several directories, a page of each kind."""
    for path in rewrite(directories, out):
        typer.echo(f"Report: {path}")


if __name__ == "__main__":
    main()
