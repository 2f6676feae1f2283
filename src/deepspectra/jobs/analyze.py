"""The main job: from a problem to an attributed spectrum with its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspectra.arguments import check_count, check_rtol
from deepspectra.errors import FileError, OptionError
from deepspectra.jobs import stages
from deepspectra.jobs.analysis_dataset import build
from deepspectra.jobs.ledger import Ledger
from deepspectra.jobs.pages import load_dataset, save_dataset, save_whole
from deepspectra.problem.problem import Problem
from deepspectra.report.page import write, write_series
from deepspectra.rows.gradients import check_labelled
from deepspectra.rows.projections import grouped, num_groups

DATASET_FILE, VECTORS_FILE = "analysis.nc", "vectors.safetensors"


@dataclass(frozen=True)
class Analysis:
    """An attributed spectrum: numbers with labels, eigenvectors, a verdict.

    Attributes:
        dataset: every number with its dimensions named; `docs/file-format.md` lists them.
        vectors: "hessian" and "gauss_newton" → parameter name → (K, *shape), the top eigenvectors; none of
            a G that is zero.
    """

    dataset: xr.Dataset
    vectors: dict[str, dict[str, Tensor]]

    @property
    def verdict(self) -> str:
        """What was found, in sentences, with the thresholds stated."""
        return str(self.dataset.attrs["verdict"])

    def __str__(self) -> str:
        return self.verdict

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
        write(self.dataset, path)
        return Path(path)


def save_series(analyses: Mapping[str, Analysis], path: str | Path) -> Path:
    """Write one page of several analyses by label, such as those of a network at several epochs.

    The reader chooses among them; the last is shown first.

    Raises:
        DataError: there are no analyses.
        FileError: the file cannot be written.
    """
    write_series({label: analysis.dataset for label, analysis in analyses.items()}, path)
    return Path(path)


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
        raise FileError(
            f"{folder / VECTORS_FILE} is truncated, damaged or foreign ({error}). {again}"
        ) from error
    if "verdict" not in dataset.attrs:
        raise FileError(f"{folder / DATASET_FILE} is NetCDF but not an analysis of this library.")
    vectors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        kind, _, name = key.partition("/")
        vectors.setdefault(kind, {})[name] = value
    return Analysis(dataset, vectors)


def analyze(
    problem: Problem,
    *,
    num: int | None = None,
    num_probes: int | None = None,
    num_steps: int | None = None,
    rtol: float | None = None,
    seed: int = 0,
    progress: bool = True,
    title: str = "",
    model: str = "",
    data: str = "",
    class_names: list[str] | None = None,
    groups: Tensor | Sequence[int] | None = None,
    resume: str | Path | None = None,
) -> Analysis:
    """Compute the spectra of H, G and R, attribute the outliers, and judge the papers' claims on them.

    Args:
        problem: one with cross-entropy and class labels.
        num: top eigenpairs of H and of G; by default C + 3, or C for large problems. Problems are "medium" when a
            gradient takes over 5e9 floating-point operations and "large" over 1e11 (on an accelerator 50 times
            as many), three times what PyTorch counts in a forward pass, or 6 P N if that is more: about a quarter
            of a second and three seconds of one core. The report says what was chosen.
        num_probes: random probes of each density; by default 4, or 2 for medium and large problems.
        num_steps: Krylov steps of each probe; by default 24, 16 for medium problems or 5 for large ones.
        rtol: of the eigenpairs' residuals; by default 1e-2, or 3e-2 for large problems.
        seed: of every random vector.
        progress: draw progress with cost on standard error.
        title: of the report.
        model: its name, for the report.
        data: its name, for the report.
        class_names: one a class, or one a group, for the report.
        groups: (C,) the group of each class, as in `decompose`, for problems of very many classes; C is then the
            number of groups wherever averages are meant.
        resume: a folder where finished stages are kept; called again with it after a stop, the analysis goes on
            behind the last of them, with the same result up to rounding. It takes as much space as the eigenvectors
            and the Krylov basis of H, and can be removed once the result is saved.

    Returns:
        The analysis; `str()` is the verdict, `.save(dir)` and `.to_html(path)` write it.

    Raises:
        LossError: the loss is not the cross-entropy of class labels.
        CurvatureError: the network has no right second derivative.
        OptionError: counts below 1, rtol not between 0 and 1, class names that are not one a class, or groups that
            are not one number a class.
        FileError: the folder to resume from is of another problem or of other options, or damaged.

    Cost: itemised in the result.
    """
    for name, value in (("num", num), ("num_probes", num_probes), ("num_steps", num_steps)):
        if value is not None:
            check_count(name, value)
    if rtol is not None:
        check_rtol(rtol)
    check_labelled(problem)
    owner = grouped(groups, problem.num_classes, problem.device)
    num_classes = num_groups(owner, problem.num_classes)
    if class_names is not None and len(class_names) != num_classes:
        raise OptionError(f"{len(class_names)} class names for {num_classes} classes.")
    found = stages.run(
        problem,
        Ledger(progress),
        num=num,
        num_probes=num_probes,
        num_steps=num_steps,
        rtol=rtol,
        groups=owner,
        seed=seed,
        resume=None if resume is None else Path(resume),
    )
    dataset = build(found, class_names)
    if owner is not None:
        dataset.attrs["averages"] = f"{num_classes} groups of {problem.num_classes:,} classes"
    model = model or type(problem.model).__name__
    dataset.attrs.update(
        title=title or f"Spectrum of {model}" + (f" on {data}" if data else ""), model=model, data=data
    )
    found_vectors = {name: pairs.vectors for name, pairs in found.pairs.items() if len(pairs.values)}
    return Analysis(dataset, {name: _named(problem, vectors) for name, vectors in found_vectors.items()})


def _named(problem: Problem, vectors: Tensor) -> dict[str, Tensor]:
    """Columns (P, K) as parameter name → (K, *shape)."""
    trees = [problem.unflatten(vector) for vector in vectors.T]
    return {name: torch.stack([tree[name] for tree in trees]) for name in problem.parameter_names}
