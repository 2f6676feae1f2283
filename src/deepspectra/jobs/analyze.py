"""The main job: from a problem to an attributed spectrum with its report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspectra.analysis.class_groups import class_groups
from deepspectra.argument_checks import check_choice, check_count, check_margin, check_rtol
from deepspectra.dataframes import latex_table
from deepspectra.errors import FileError, OptionError
from deepspectra.file_writing import save_whole
from deepspectra.jobs import stages
from deepspectra.jobs.analysis_dataset import CLASS_AXES, analysis_dataset
from deepspectra.jobs.effort import EFFORTS, MOST_CLASSES, NUM_GROUPS
from deepspectra.jobs.findings import Options
from deepspectra.jobs.pages import Dataset, load_dataset, save_dataset, titled, write_page
from deepspectra.jobs.stage_meter import Ledger
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.rows.gradients import has_labels, refuse_one_output
from deepspectra.rows.projections import Groups, grouped, numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

DATASET_FILE, VECTORS_FILE = "analysis.nc", "vectors.safetensors"


@dataclass(frozen=True, repr=False)
class Analysis:
    """An attributed spectrum: numbers with labels, eigenvectors, a verdict.

    Attributes:
        dataset: every number with its dimensions named; `docs/file-format.md` lists them.
        vectors: "hessian" and "gauss_newton" → parameter name → (K, *shape), the top eigenvectors; none of
            a G that is zero.
    """

    dataset: Dataset
    vectors: dict[str, dict[str, Tensor]]

    @property
    def verdict(self) -> str:
        """What was found, in sentences, with the thresholds stated."""
        return str(self.dataset.attrs["verdict"])

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return f"<Analysis: {self.dataset.attrs['title']}>"

    def _repr_html_(self) -> str:
        """What notebooks show: the verdict above the spectrum."""
        from deepspectra.report import spectrum, svg  # noqa: PLC0415  (Altair's import takes a while)

        drawn = "" if spectrum.lacks(self.dataset) else svg(self.chart())
        return f"<p>{html.escape(self.verdict, quote=False)}</p>{drawn}"

    def to_dataframe(self, table: str = "pairs") -> Any:
        """One of the tables, a row for each eigenpair of H and of G, or for each pair and what made it.

        Args:
            table: "pairs" (eigenvalue, residual, bound of the error, whether an outlier, shares and their errors);
                of each outlier "classes" (the share of each class as the true one and as the potential one),
                "class_pairs" (of each of both) or, of each pair, "layers" (the part of the eigenvector's squared
                length that lies in each). `docs/file-format.md` says what each number is.

        Raises:
            OptionError: there is no such table.
            DataError: the analysis lacks it, for there are no classes or no outliers.
        """
        from deepspectra.report import outlier_tables  # noqa: PLC0415  (Altair's import takes a while)

        return outlier_tables.dataframe(self.dataset, table)

    def to_latex(self, table: str = "pairs", digits: int = 3) -> str:
        """One of these tables, of H alone, for LaTeX (with booktabs); "± ?" where an error is not known."""
        from deepspectra.report import outlier_tables  # noqa: PLC0415  (Altair's import takes a while)

        return latex_table(outlier_tables.printed(self.dataset, table), digits)

    def labelled(
        self, *, title: str = "", model: str = "", data: str = "", class_names: Sequence[str] | None = None
    ) -> Analysis:
        """The same numbers under other names, which files and reports show.

        Args:
            title: of the report; by default the spectrum of the model on the data.
            model: name of the network; by default what it is called already, at first its class.
            data: name of the data.
            class_names: one a class, or one a group of classes.

        Raises:
            OptionError: the class names are not one a class.
        """
        model = model or str(self.dataset.attrs["model"])
        data = data or str(self.dataset.attrs["data"])
        dataset = self.dataset.assign_attrs(title=title or titled("Spectrum of", model, data), model=model, data=data)
        if class_names is not None:
            num_classes = dataset.sizes.get("class", 0)
            if len(class_names) == dataset.sizes.get("member"):
                class_names = group_names(class_names, dataset["class_group"].values.tolist())
            if len(class_names) != num_classes:
                raise OptionError(f"{len(class_names)} class names for {num_classes} classes.")
            dataset = dataset.assign_coords({axis: list(class_names) for axis in CLASS_AXES})
        return replace(self, dataset=dataset)

    def save(self, directory: str | Path) -> Path:
        """Write analysis.nc (NetCDF-4) and vectors.safetensors into a directory, made if need be.

        Each file is written beside its place and then moved there, so that a killed run leaves no half file.

        Raises:
            FileError: a file cannot be written. The numbers come first, so that a disk which has no room for the
                vectors still gets them.
        """
        folder = Path(directory)
        save_dataset(self.dataset, folder / DATASET_FILE)
        flat = {
            f"{kind}/{name}": value.detach().cpu().contiguous()
            for kind, tree in self.vectors.items()
            for name, value in tree.items()
        }
        save_whole(folder / VECTORS_FILE, lambda staged: save_file(flat, staged))
        return folder

    def to_html(self, path: str | Path) -> Path:
        """Write the report, one self-contained HTML file."""
        return write_page(self.dataset, Path(path))

    def chart(self, name: str = "spectrum", inches: float | None = None) -> Any:
        """A figure of the report as an Altair chart, which notebooks show and whose `save` writes files.

        Args:
            name: "spectrum" (on a linear axis), "log_spectrum" (both sides of zero) or "magnitude_spectrum" (of |λ|);
                "shares", "knockouts", "averaging", "class_cosines", "cross_class_weights", "three_level_map", "cost".
            inches: as wide as that and with letters that are legible there, such as 3.3 for a paper's column; by
                default as on the page.

        Raises:
            OptionError: there is no such figure.
            DataError: the analysis lacks what it draws.
        """
        from deepspectra.report import figures  # noqa: PLC0415  (Altair's import takes a while)

        return figures.chart(self.dataset, name, inches)

    def plot(self, name: str = "magnitude_spectrum", ax: Axes | None = None, **style: Any) -> Axes:
        """Draw into matplotlib's axes, or into new ones of a column's width, and return them.

        Args:
            name: "magnitude_spectrum" (of |λ|, on logarithmic axes), "spectrum" (on a linear axis), "shares" or
                "knockouts".
            ax: where to draw.
            style: of the lines, bars or dots, as matplotlib calls it; `operator="gauss_newton"` for shares and
                knock-outs of G.

        Raises:
            OptionError: there is no such figure, or matplotlib is not installed (the extra `plot`).
            DataError: the analysis lacks what it draws.
        """
        from deepspectra.report import matplotlib_axes  # noqa: PLC0415  (Altair's import takes a while)

        return matplotlib_axes.plot(self.dataset, name, ax, **style)

    def save_chart(self, path: str | Path, name: str = "spectrum", inches: float | None = 3.3) -> Path:
        """Write a figure as .pdf, .svg, .png, .html or .json, by default as wide as a paper's column.

        Raises:
            OptionError: there is no such figure, or the suffix is none of these.
            DataError: the analysis lacks what the figure draws.
        """
        from deepspectra.report import save_chart  # noqa: PLC0415  (Altair's import takes a while)

        save_chart(self.chart(name, inches), path)
        return Path(path)


def save_series(analyses: Mapping[str, Analysis], path: str | Path) -> Path:
    """Write one page of several analyses by label, such as those of a network at several epochs.

    The reader chooses among them; the last is shown first.

    Raises:
        DataError: there are no analyses.
        FileError: the file cannot be written.
    """
    return write_page({label: analysis.dataset for label, analysis in analyses.items()}, Path(path))


def load(directory: str | Path) -> Analysis:
    """Read an analysis saved by `Analysis.save`.

    Raises:
        FileError: a file is missing, truncated or of another kind.
    """
    folder = Path(directory)
    for name in (DATASET_FILE, VECTORS_FILE):
        if not (folder / name).is_file():
            raise FileError(f"{folder / name} does not exist; expected a directory written by Analysis.save.")
    again = "Run the analysis again."
    dataset = load_dataset(folder / DATASET_FILE, again)
    try:
        flat = load_file(folder / VECTORS_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FileError(f"{folder / VECTORS_FILE} is truncated, damaged or foreign ({error}). {again}") from error
    if "verdict" not in dataset.attrs:
        raise FileError(f"{folder / DATASET_FILE} is NetCDF but not an analysis of this library.")
    vectors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        kind, _, name = key.partition("/")
        vectors.setdefault(kind, {})[name] = value
    return Analysis(dataset, vectors)


class Counts(TypedDict, total=False):
    """What an effort decides, where it is to be decided otherwise; `analyze` explains them."""

    num: int | None
    num_probes: int | None
    num_steps: int | None
    rtol: float | None
    margin: float | None


def check_options(effort: str, **counts: Unpack[Counts]) -> None:
    """See that `analyze` knows the effort, and that what is to be decided otherwise can be.

    Raises:
        OptionError: see `analyze`.
    """
    check_choice("effort", effort, tuple(EFFORTS))
    for name in ("num", "num_probes", "num_steps"):
        if (value := counts.get(name)) is not None:
            check_count(name, value)
    if (rtol := counts.get("rtol")) is not None:
        check_rtol(rtol)
    if (margin := counts.get("margin")) is not None:
        check_margin(margin)


def analyze(
    problem: Problem,
    *,
    test: Problem | None = None,
    effort: str = "standard",
    groups: Groups | int | None = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **counts: Unpack[Counts],
) -> Analysis:
    """Compute the spectra of H, G and R, attribute the outliers, and judge the papers' claims on them.

    Of a problem that is `sharded` all processes have the analysis; one of them is to save it.

    Args:
        problem: any; without cross-entropy of class labels there are spectra alone, and no outlier is told from the
            bulk.
        test: the same network with other data, whose spectra are computed, too, and shown beside those of the first.
        effort: how well spectra are resolved, told with its cost before the work. All eigenvalues of H and R are
            computed where P is up to about 3,000 ("quick": seconds), 7,000 ("standard": a minute each) or 18,000
            ("paper": a quarter of an hour), if products are cheap; all of G where it has up to 3,000, 4,500 or 20,000
            gradients N (C − 1). With more of these the matrices of G and R are made, and that of H is their sum. Else
            densities are drawn from up to 4 × 24, 4 × 256 or 4 × 512 products, fewer for "quick" and "standard" where
            those take more than half a minute or five minutes of one core; figures have bins as wide as what these
            leave unresolved.
        groups: (C,) the group of each class, or a function that gives it, as in `decompose`, or how many
            `class_groups` is to find; C is then the number of groups wherever averages are meant. Names that a
            function gives are those of the report. By default 10 are found where there are over 100 classes.
        resume: a folder where finished stages are kept; called again with it after a stop, the analysis goes on
            behind the last of them, with the same result up to rounding. It takes as much space as the eigenvectors
            and the Krylov basis of H, and can be removed once the result is saved.
        seed: of every random vector.
        progress: draw progress with cost on standard error.
        counts: `num`, top eigenpairs of H and of G; by default C + 3 (10 without classes), or C for large problems,
            whose gradient takes over 1e11 floating-point operations (on an accelerator 50 times as many), three times
            what PyTorch counts in a forward pass, or 6 P N if that is more: about three seconds of one core.
            `num_probes` of each density and `num_steps` of each probe, by default as `effort` says. `rtol` of the
            eigenpairs' residuals; by default 1e-2, or 3e-2 for large problems. `margin`: eigenvalues above so many
            times the bulk's edge are outliers; by default 1.25.

    Returns:
        The analysis; `str()` is the verdict, `.save(dir)` and `.to_html(path)` write it, under the names that
        `.labelled(model=..., data=...)` gives.

    Raises:
        LossError: the loss is the cross-entropy of a single output, which is zero.
        CurvatureError: the network has no right second derivative.
        OptionError: an unknown effort, counts or margin below 1, rtol not between 0 and 1, groups that are not one
            number a class or where there are no classes, or a test problem with other weights.
        FileError: the folder to resume from is of another problem or of other options, or damaged.

    Cost: itemised in the result.
    """
    check_options(effort, **counts)
    check_problem(problem)
    refuse_one_output(problem)
    classed, ledger = has_labels(problem), Ledger(progress and problem.batches.group.rank == 0, foresees=progress)
    if groups is not None and not classed:
        raise OptionError("groups are of classes, and this problem has no class labels.")
    names = problem.class_names if classed else None
    if names is not None and len(names) != problem.num_classes:
        raise OptionError(f"problem.class_names has {len(names)} names for {problem.num_classes:,} classes.")
    owner, called = _grouped(problem, groups, ledger, seed) if classed else (None, None)
    options = Options(groups=owner, seed=seed, effort=effort, classed=classed, **counts)
    if test is not None:
        _check_same_network(problem, test)
    found = stages.run(problem, ledger, options, None if resume is None else Path(resume), test)
    vectors = {name: _named(problem, pairs.vectors) for name, pairs in found.pairs.items() if len(pairs.values)}
    dataset = analysis_dataset(found)
    if owner is not None:
        dataset.attrs["averages"] = f"{found.num_classes} groups of {problem.num_classes:,} classes"
        dataset["class_group"] = ("member", owner.cpu().numpy())
    return Analysis(dataset, vectors).labelled(class_names=called or names or _numbers(owner))


def _grouped(
    problem: Problem, groups: Groups | int | None, ledger: Ledger, seed: int
) -> tuple[Tensor | None, list[str] | None]:
    """The group of each class, if any are asked for or needed, and the names that the groups were given."""
    num = problem.num_classes
    if groups is None and num > MOST_CLASSES:
        groups = NUM_GROUPS
        ledger.tell(f"Averages over the {num:,} classes are taken over {groups} groups, classes with like logits.")
    called = None
    if isinstance(groups, int):
        check_count("groups", groups, largest=num)
        groups = class_groups(problem, groups, seed=seed)
    elif callable(groups):
        groups, called = numbered(groups, num)
    return grouped(groups, num, problem.device), called


def _numbers(owner: Tensor | None) -> list[str] | None:
    """Names of classes that have none and are in groups."""
    return None if owner is None else [str(c) for c in range(len(owner))]


def group_names(names: Sequence[str], owner: Sequence[int]) -> list[str]:
    """The first two classes of each group, and how many more there are."""
    members = [[name for name, g in zip(names, owner, strict=True) if g == j] for j in range(max(owner) + 1)]
    return [", ".join(some[:2]) + (f" +{len(some) - 2}" if len(some) > 2 else "") for some in members]


def _check_same_network(problem: Problem, test: Problem) -> None:
    weights, others = (dict(one.model.named_parameters()) for one in (problem, test))
    names = problem.parameter_names, problem.num_classes
    if names != (test.parameter_names, test.num_classes) or any(
        not torch.equal(weights[name], others[name].to(weights[name])) for name in weights
    ):
        raise OptionError(
            "test is a problem of other parameters, classes or weights. Pass the same network with other data, "
            "ds.Problem(model, test_data)."
        )


def _named(problem: Problem, vectors: Tensor) -> dict[str, Tensor]:
    """Columns (P, K) as parameter name → (K, *shape)."""
    trees = [problem.unflatten(vector) for vector in vectors.T]
    return {name: torch.stack([tree[name] for tree in trees]) for name in problem.parameter_names}
