"""What every job ends in: a labelled dataset and a page, made, written side by side and read again."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from deepspectra.derivatives.products import products_of
from deepspectra.derivatives.way_choice import coarse_types
from deepspectra.errors import CurvatureError, FileError, OptionError, first_line
from deepspectra.file_writing import save_whole
from deepspectra.problem.batch_trees import length
from deepspectra.problem.problem import Problem
from deepspectra.results import NOTHING, versions

if TYPE_CHECKING:
    import xarray as xr

Dataset: TypeAlias = "xr.Dataset"  # whose import takes a while
Variables = dict[str, tuple[tuple[str, ...], Any]]
"""Name → dimensions, and values: an array, or by names, one for each of the first dimensions (see `dataset_of`)."""
PLAIN = 1e9  # from here on a number is written with a power of ten: all its digits would be taken for known
STEMS = ("analysis", "layers", "regions", "compare", "certify", "sweep")  # of what the commands save


def provenance(**conditions: object) -> str:
    """How numbers were made, as JSON: the versions first, and whatever else bears on them."""
    return json.dumps({"versions": versions(), **conditions})


def measured(value: float, error: float) -> str:
    """A number to three digits, with its error to two where that shows in them."""
    largest = max(abs(value), error)
    if math.isfinite(value) and math.isnan(error):
        return f"{measured(value, 0.0)} ± ?"  # of one probe, which has no error
    if not math.isfinite(value) or not error > 5e-4 * abs(value):
        return f"{float(f'{value:.3g}'):.0f}" if 1000 <= abs(value) < PLAIN else f"{value:.3g}"
    digits = 1 - math.floor(math.log10(error))
    if largest >= PLAIN:
        return f"{value:.{math.floor(math.log10(largest)) + digits}e} ± {error:.1e}"
    if digits <= 0:
        return f"{round(value, digits):.0f} ± {round(error, digits):.0f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits <= 5 else f"{value:.2g} ± {error:.2g}"


def precision(problem: Problem) -> list[str]:
    """What a verdict says where the arithmetic is coarser than float32; measured now, if it was not before."""
    coarse, choice = coarse_types(problem), products_of(problem).choice
    if not coarse:
        return []
    if not choice.rounding:
        with contextlib.suppress(CurvatureError):  # a network of which class means alone are right
            choice.linearize()
    if choice.rounding and max(choice.rounding.values()) < NOTHING:  # TF32 is allowed, and this network uses none
        return []
    listed = " and ".join(f"{what} is off by {error:.1%}" for what, error in choice.rounding.items())
    off = f"{listed}, measured against float64 on a few examples" if listed else "how far it is off is not known"
    return [f"Computed in {coarse}: {off}; what differs by less says nothing."]


class Labels(NamedTuple):
    """What a page calls a network and its data, and the seed that it names; a network is its class by default."""

    model: str = ""
    data: str = ""
    seed: int = 0


UNLABELLED = Labels()


def dataset_of(
    variables: Variables, coords: Mapping[str, Sequence[Any]], attributes: Mapping[str, object]
) -> Dataset:
    """Numbers with their dimensions named; `docs/file-format.md` describes those of each job.

    Values by name are put where the coordinates of their first dimensions have these names, and are NaN elsewhere; a
    dimension without coordinates is as long as the longest of them. A layer without a name is the model.
    """
    import xarray as xr  # noqa: PLC0415  (its import takes a while)

    named = {name: _by_name(values) for name, (_, values) in variables.items() if isinstance(values, dict)}
    sizes = {dim: len(names) for dim, names in coords.items()}
    for name, entries in named.items():
        for key, one in entries.items():
            own = dict(zip(variables[name][0][len(key) :], one.shape, strict=True))
            sizes |= {dim: max(size, sizes.get(dim, 0)) for dim, size in own.items()}
    tables = {}
    for name, entries in named.items():
        dims, _ = variables[name]
        table = np.full([sizes.get(dim, 1) for dim in dims], np.nan)
        for key, one in entries.items():
            at = tuple(coords[dim].index(label) for dim, label in zip(dims, key, strict=False))
            table[at + tuple(slice(size) for size in one.shape)] = one
        tables[name] = dims, table
    shown = {dim: [label if label != "" else "(model)" for label in labels] for dim, labels in coords.items()}
    return xr.Dataset(variables | tables, coords=shown, attrs=attributes)


def _by_name(values: Mapping[Any, Any]) -> dict[tuple[Any, ...], np.ndarray]:
    """Numbers, arrays or tensors as arrays, each by its names."""
    keys = (key if isinstance(key, tuple) else (key,) for key in values)
    return {
        key: one.cpu().numpy() if isinstance(one, torch.Tensor) else np.asarray(one)
        for key, one in zip(keys, values.values(), strict=True)
    }


def page_dataset(
    variables: Variables,
    coords: Mapping[str, Sequence[Any]],
    problem: Problem,
    labels: Labels,
    subject: str,
    verdict: Iterable[str],
    seconds: float,
) -> Dataset:
    """A job's dataset with what its page says of the problem, its subject ("Layers of") and its verdict."""
    lines = [*verdict, *precision(problem)]
    about = described(problem, labels, subject, lines, problem.loss(), problem.accuracy())
    return dataset_of(variables, coords, about | {"provenance": provenance(seconds=round(seconds, 1))})


def described(
    problem: Problem,
    labels: Labels,
    subject: str,
    verdict: Iterable[str],
    loss: float,
    accuracy: float,
) -> dict[str, object]:
    """What a file says of the problem, what was found, and when it was made."""
    model, data = labels.model or problem.name or type(problem.model).__name__, labels.data or problem.data_name
    return {
        "verdict": " ".join(verdict),
        "title": titled(subject, model, data),
        "model": model,
        "data": data,
        "created": now(),
        "loss": problem.loss_function.name,
        "num_parameters": problem.num_parameters,
        "num_examples": problem.num_examples,
        "row": "part of an example" if _has_parts(problem) else "example",
        "num_classes": problem.num_classes,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": str(problem.device),
        "seed": labels.seed,
        "loss_value": loss,
        "accuracy": accuracy,
    }


def _has_parts(problem: Problem) -> bool:
    """Whether an example has several rows, as a sentence has tokens. Cost: one batch forward."""
    for batch in problem.fixed_batches():
        return len(problem.values(batch)[0]) > length(batch)
    return False


def titled(subject: str, model: str, data: str) -> str:
    """A page's title."""
    return f"{subject} {model}" + (f" on {data}" if data else "")


def load_pages(directory: str | Path) -> dict[str, Dataset]:
    """The datasets that commands saved in a directory, by the names of their pages, an analysis first.

    Raises:
        FileError: there are none, or one is damaged.
    """
    folder = Path(directory)
    stems = [stem for stem in STEMS if (folder / f"{stem}.nc").is_file()]
    if not stems:
        raise FileError(f"{folder} has none of {', '.join(f'{stem}.nc' for stem in STEMS)}; nothing was saved there.")
    again = "Run the command again."
    return {
        "report.html" if stem == "analysis" else f"{stem}.html": load_dataset(folder / f"{stem}.nc", again)
        for stem in stems
    }


def rewrite(directories: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write every page of a directory again; of several, a page of each kind to choose a directory from.

    Pages are written into the last directory; or to the file `out`, one beside it for each further kind.

    Raises:
        FileError: a directory holds nothing, or a page cannot be written.
        OptionError: `out` is no HTML file.
    """
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise OptionError(
            f"--out {out}: a report is HTML. Analysis.save_chart writes single figures as .pdf, .svg or .png."
        )
    kinds: dict[str, dict[str, Dataset]] = {}
    for directory in directories:
        for name, dataset in load_pages(directory).items():
            kinds.setdefault(name, {})[str(directory)] = dataset
    pages: list[Path] = []
    for name, found in kinds.items():
        path = directories[-1] / name
        if out is not None:
            path = out.with_stem(f"{out.stem}-{Path(name).stem}") if pages else out
        check_writable(path.parent)
        pages.append(write_page(found if len(found) > 1 else next(iter(found.values())), path))
    return pages


def load_dataset(path: Path, advice: str) -> Dataset:
    """Read a NetCDF file; FileError with this advice if it is truncated, damaged or of another kind."""
    import xarray as xr  # noqa: PLC0415  (its import takes a while)

    try:
        with xr.open_dataset(path, engine="h5netcdf") as file:
            return file.load()
    except MemoryError:
        raise
    except Exception as error:  # whatever reading a damaged file may raise
        raise FileError(f"{path} is truncated, damaged or foreign ({first_line(error)}). {advice}") from error


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write a NetCDF file, with checksums of its numbers; FileError if it cannot be written."""
    encoding = {
        name: {"fletcher32": True, "chunksizes": one.shape}
        for name, one in dataset.variables.items()
        if one.size and one.ndim and one.dtype.kind in "fiu"
    }
    save_whole(path, lambda staged: dataset.to_netcdf(staged, engine="h5netcdf", encoding=encoding))


def check_writable(folder: str | Path) -> None:
    """Make a folder if need be and write into it, before work is done that would be lost; or FileError."""
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
    except OSError as error:
        raise FileError(
            f"{place} cannot be written ({error.strerror or error}). Choose another directory, or make room."
        ) from error


def refuse_overwriting(folder: str | Path, stem: str) -> None:
    """Raise FileError if a folder holds results of this kind, which another run would take the place of."""
    path = Path(folder) / f"{stem}.nc"
    if path.is_file():
        raise FileError(
            f"{path} holds the results of an earlier run. Choose another --out; or add --overwrite, if they may go."
        )


def save_page(dataset: Dataset, directory: str | Path, stem: str) -> Path:
    """Write STEM.nc and STEM.html into a directory, made if need be; returns the page's path.

    Raises:
        FileError: one cannot be written; the other is, if it can be.
    """
    folder = Path(directory)
    try:
        save_dataset(dataset, folder / f"{stem}.nc")
    finally:
        page = write_page(dataset, folder / f"{stem}.html")
    return page


def write_page(shown: Dataset | dict[str, Dataset], path: Path) -> Path:
    """Write a dataset's page, or one of several by label among which the reader chooses; returns its path."""
    from deepspectra.report import page  # noqa: PLC0415  (Altair's import takes a while)

    if isinstance(shown, dict):
        page.write_series(shown, path)
    else:
        page.write(shown, path)
    return path
