"""Results say beside their numbers how good they are: bounds that hold, tables with a verdict."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepspectra as ds
from deepspectra.algorithms.eigenpair_search import select
from deepspectra.algorithms.eigenpairs import ENDS, eigenpairs
from deepspectra.errors import ConvergenceWarning, MissingNameError
from deepspectra.operators.base import Matrix
from deepspectra.problem.problem import Problem
from deepspectra.results import Provenance, Result
from nets import CASES
from spectra import OUTLIERS, rotated, trained


def sines(matrix, pairs):
    """Sine of the angle between each vector and the exact eigenvector of its rank, and between the spans."""
    exact, u = torch.linalg.eigh(matrix.double())
    u = u[:, select(exact, pairs.which, len(pairs.values))]
    v = pairs.vectors.double()
    beyond = [torch.linalg.vector_norm(v - u * (u * v).sum(0), dim=0), v - u @ (u.T @ v)]
    return beyond[0], float(torch.linalg.matrix_norm(beyond[1], 2))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1e-2, 1e-4]),
    st.sampled_from(ENDS),
    st.integers(0, 3),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_bounds_hold(seed, rtol, which, kind, dtype):
    size = 100
    draw = torch.Generator().manual_seed(seed)
    values = {
        0: torch.cat([trained(size - 5), -0.75 * OUTLIERS[:5]]),
        1: torch.randn(size, generator=draw, dtype=torch.float64),
        2: torch.linspace(-1, 1.1, size, dtype=torch.float64),
        3: torch.cat([torch.tensor([3.0, 2.9, 2.0, -1]), torch.rand(size - 4, generator=draw)]).double(),
    }[kind]
    matrix = rotated(values, seed, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = eigenpairs(matrix, 3, which, rtol=rtol, max_products=60, seed=seed)
    exact = torch.linalg.eigvalsh(matrix.double())
    nearest = (exact[:, None] - pairs.values).abs().min(0).values
    assert bool((nearest <= pairs.error_bounds).all())
    if pairs.converged:
        vectors, span = sines(matrix, pairs)
        assert bool((vectors <= pairs.angle_bounds).all())
        assert span <= pairs.subspace_angle_bound
    else:
        assert bool(pairs.angle_bounds.isinf().all())
        assert math.isinf(pairs.subspace_angle_bound)


def test_bounds_of_separated_pairs_are_quadratic_and_tight():
    matrix = rotated(trained())
    pairs = eigenpairs(matrix, 5, rtol=3e-2)
    errors = (OUTLIERS[:5] - pairs.values).abs()
    vectors, span = sines(matrix, pairs)
    worst = pairs.residual_norms.argmax()
    assert pairs.error_bounds[worst] < 0.1 * pairs.residual_norms[worst]
    assert errors[worst] <= pairs.error_bounds[worst] < 10 * errors[worst]
    assert vectors[worst] <= pairs.angle_bounds[worst] < 10 * vectors[worst]
    assert span <= pairs.subspace_angle_bound < 10 * span


def test_a_cluster_has_a_span_but_no_vectors():
    values = torch.cat([torch.tensor([5.0, 5, 5]), torch.linspace(0, 0.5, 200)]).double()
    pairs = eigenpairs(rotated(values), 3, rtol=1e-3)
    assert bool((pairs.angle_bounds > 1).all())  # any rotation of them will do
    assert pairs.subspace_angle_bound < 2e-3
    assert sines(rotated(values), pairs)[1] <= pairs.subspace_angle_bound


def test_the_status_is_certified_only_when_the_basis_spans_everything():
    matrix = rotated(trained())
    assert eigenpairs(matrix, 5).status == "statistical"
    everything = eigenpairs(matrix[:40, :40], 40)
    assert everything.status == "certified"
    assert "converged (certified)" in str(everything)
    assert float(everything.error_bounds.max()) < 1e-12
    with pytest.warns(ConvergenceWarning):
        assert eigenpairs(matrix, 10, max_products=12).status == "not converged"


def test_the_printed_table_has_a_row_a_pair_and_a_verdict():
    lines = str(eigenpairs(rotated(trained()), 4)).splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("largest 4 of matrix: converged (statistical), worst residual")


def test_a_result_says_where_it_came_from():
    of_matrix = Provenance.of(Matrix(torch.eye(3, dtype=torch.float64)), seed=4)
    assert (of_matrix.operator, of_matrix.size, of_matrix.dtype, of_matrix.device, of_matrix.seed) == (
        *("matrix", 3, "float64"),
        *("cpu", 4),
    )
    problem = Problem(torch.nn.Linear(2, 3), (torch.randn(6, 2), torch.arange(6) % 3))
    of_problem = Provenance.of(problem)
    assert (of_problem.operator, of_problem.size, of_problem.dtype) == ("Gauss-Newton", 9, "float32")
    assert of_problem.versions["torch"] == torch.__version__
    assert set(of_problem.versions) == {"deepspectra", "torch", "python"}
    of_rows = Provenance.of(torch.ones(7, 5), "features")
    assert (of_rows.operator, of_rows.size) == ("features", 5)


RESULTS = {
    "collapse": ds.collapse,
    "compare": lambda p: ds.compare(p, p, num=3, num_whole=0),
    "dissect": lambda p: ds.dissect(p, num_whole=0),
    "kronecker_quality": lambda p: ds.kronecker_quality(p, ("kfac",), ks=(1,)),
    "layers": lambda p: ds.layers(p, hessian=False),
    "regions": lambda p: ds.regions(p, num_groups=0),
    "weights": ds.weights,
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_mappings_from_layers_in_their_order(name: str) -> None:
    found = RESULTS[name](CASES["relu_mlp"]().problem())
    assert isinstance(found, Mapping)
    assert list(found) == ["0", "2", "4"]
    assert found.layers == dict(found.items())
    assert "2" in found
    assert "nothing" not in found
    assert found["2"] is found.layers["2"]
    assert found.get("nothing") is None
    with pytest.raises(MissingNameError, match="no layer 'nothing'; there are 0, 2, 4"):
        found["nothing"]
    assert found.seconds > 0
    assert found.provenance.versions


TOLD = {
    "compare": lambda p, show: ds.compare(p, p, num=3, num_whole=0, progress=show),
    "dissect": lambda p, show: ds.dissect(p, num_whole=0, progress=show),
    "eigenpairs": lambda p, show: ds.eigenpairs(ds.GaussNewton(p), 1, progress=show),
    "kronecker_quality": lambda p, show: ds.kronecker_quality(p, ("kfac",), ks=(1,), progress=show),
    "layers": lambda p, show: ds.layers(p, progress=show),
    "regions": lambda p, show: ds.regions(p, num_groups=0, progress=show),
    "regions of the Hessian": lambda p, show: ds.regions(p, "hessian", num_groups=0, progress=show),
}


@pytest.mark.parametrize("name", TOLD)
def test_progress_is_what_is_done_of_how_much_and_what_comes_next(name: str) -> None:
    """One function can be told of all: layers, networks or products."""
    seen: list[tuple[int, int | None, str]] = []

    def show(done: int, total: int | None, what: str = "products") -> None:
        seen.append((done, total, what))

    TOLD[name](CASES["relu_mlp"]().problem(), show)
    assert seen
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert all(0 <= done <= total and what for done, total, what in seen)


def test_results_are_short_where_they_are_named_and_whole_where_they_are_shown():
    results = [
        ds.eigenpairs(torch.eye(400).double(), 3),
        ds.density(torch.eye(400).double()),
        ds.trace(torch.eye(400).double()),
        ds.diagonal(torch.eye(400).double()),
    ]
    for result in results:
        assert repr(result) == f"<{type(result).__name__} of matrix, 400 dimensions>"
        assert html.unescape(result._repr_html_()).removesuffix("</pre>").endswith(str(result))


def test_every_result_has_the_short_form():
    """A dataclass would write all of its arrays."""
    pending = [Result]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        assert kind.__repr__ is Result.__repr__, kind
