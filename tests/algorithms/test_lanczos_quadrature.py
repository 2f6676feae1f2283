"""Quadratures without a basis: no copy counts twice, three vectors a probe are held."""

import gc
import math
from itertools import pairwise

import pytest
import torch

from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.lanczos_quadrature import _tridiagonal, _tridiagonals
from deepspectra.algorithms.probes import Probes, stream
from deepspectra.errors import FallbackWarning, MemoryBudgetError, NonFiniteError
from spectra import Function, diagonal, distance, rotated, trained


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [24, 64, 200])
def test_no_copy_is_counted_without_a_basis(dtype, num_steps):
    values = trained(2000)
    operator = diagonal(values, dtype)
    run = Probes(operator, 4 * num_steps, None)
    start = run.gaussian(4, stream(1, "density"))  # no probe lacks one of the ten
    nothing, generator = torch.zeros(0, 2000, dtype=dtype), stream(1, "density")
    for alpha, beta in _tridiagonals(run, nothing, 4, num_steps, generator):
        assert int((torch.linalg.eigvalsh(_tridiagonal(alpha, beta)) > 0.05).sum()) > 10  # copies there are
    result = density(operator, 4, num_steps, seed=1, basis="none")
    for probe in range(4):
        above = (result.probes == probe) & (result.nodes > 0.05)
        assert int(above.sum()) == 10
        torch.testing.assert_close(result.nodes[above].flip(0), values[:10], rtol=1e-5, atol=0)
        shares = start[:10, probe].double().square() / start[:, probe].double().square().sum() / 4
        torch.testing.assert_close(result.weights[above].flip(0), shares, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [24, 64])
@pytest.mark.parametrize("deflated", [False, True])
def test_without_a_basis_probes_are_as_accurate_as_reorthogonalised_ones(dtype, num_steps, deflated):
    """One by one, so that these lock nothing and share nothing: within a half."""
    values = trained(1000)
    top = eigenpairs(diagonal(values), 10, rtol=1e-6) if deflated else None
    errors = {"full": 0.0, "none": 0.0}
    for basis in errors:
        for seed in range(4):
            found = density(diagonal(values, dtype), 1, num_steps, deflate=top, basis=basis, seed=seed)
            errors[basis] += distance(found, values) / 4
    assert errors["none"] < 1.5 * errors["full"] + 1e-3
    assert not deflated or errors["none"] < 0.1


def test_without_a_basis_the_quadrature_reproduces_the_probes_moments():
    values = torch.linspace(-1, 2, 120, dtype=torch.float64)
    result = density(rotated(values), 3, 60, seed=3, basis="none")
    z = torch.randn(3, 120, generator=stream(3, "density"), dtype=torch.float64).T
    matrix, power = rotated(values), z
    for degree in range(120):
        moments = (z * power).sum(0) / (z * z).sum(0)
        for probe in range(3):
            mine = result.probes == probe
            moment = float(result.weights[mine] @ result.nodes[mine] ** degree) * 3
            assert moment == pytest.approx(float(moments[probe]), rel=1e-9, abs=1e-12)
        power = matrix @ power


def test_without_a_basis_three_vectors_a_probe_are_held():
    values, held = trained(3000), []

    def large():
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() >= 3000]
        return {t.untyped_storage().data_ptr(): t.numel() for t in tensors}

    def apply(block):
        mine = large()
        held.append(sum(mine[pointer] for pointer in mine.keys() - before) / block.numel())
        return values[:, None] * block

    before = set(large())
    density(Function(apply, 3000, dtype=torch.float64), 4, 8, basis="none")
    assert len(held) == 8
    assert held[-1] == max(held) == 2  # and the product to come


def test_a_memory_too_small_for_a_basis_does_without_one_and_says_so():
    values = trained(500)
    with pytest.warns(FallbackWarning, match="without a basis is used; it locks no eigenvalue"):
        result = density(diagonal(values, vectors=40), 5)
    reference = density(diagonal(values), 5, basis="none")
    assert (result.num_products, result.num_probes) == (320, 5)
    torch.testing.assert_close(result.weights.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(result.nodes[result.nodes > 0.05], reference.nodes[reference.nodes > 0.05])
    with pytest.raises(MemoryBudgetError, match=r"3 vectors of length 500, even without a basis"):
        density(diagonal(values, vectors=2), 5, basis="none")


def test_without_a_basis_memory_sets_how_many_probes_advance_together():
    seen = []
    operator = diagonal(trained(300), vectors=7)
    progress = lambda done, expected: seen.append((done, expected))  # noqa: E731
    result = density(operator, 5, 10, basis="none", progress=progress)
    assert max(b[0] - a[0] for a, b in pairwise(seen)) == 2
    assert seen[-1] == (50, 50)
    assert sorted(set(result.probes.tolist())) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_basis_degenerate_spectra_are_resolved(dtype):
    itself = Function(lambda block: block, 40, dtype=dtype)
    for operator, value in ((itself, 1), (torch.zeros(40, 40, dtype=dtype), 0)):
        result = density(operator, 3, 10, basis="none")
        torch.testing.assert_close(result.nodes, torch.full((3,), value).double(), atol=1e-6, rtol=0)
    values = torch.cat([torch.full((50,), 3.0), torch.full((30,), -1.0), torch.full((20,), 0.5)])
    result = density(rotated(values, dtype=dtype), 3, 64, basis="none")
    assert result.nodes.tolist() == pytest.approx([-1, 0.5, 3] * 3, abs=1e-5)
    single = density(torch.tensor([[2.0]], dtype=dtype), basis="none")
    assert single.nodes.tolist() == pytest.approx([2] * 8)


def test_without_a_basis_deflated_pairs_keep_their_sign_and_do_not_come_back():
    values = torch.cat([torch.tensor([-9.0, 4.0]), torch.linspace(-0.1, 0.2, 398)]).double()
    top = eigenpairs(rotated(values), 2, "magnitude", rtol=1e-6)
    result = density(rotated(values), 4, 120, deflate=top, basis="none")
    outliers = result.nodes.abs() > 0.3
    assert result.nodes[outliers].sort().values.tolist() == pytest.approx([-9, 4], rel=1e-9)
    assert result.weights[outliers].tolist() == pytest.approx([1 / 400] * 2, rel=1e-12)
    assert distance(result, values) < 0.1


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e7, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_densities_without_a_basis_scale_with_the_operator(scale, dtype):
    values = trained(300).to(dtype)
    reference = density(diagonal(values, dtype), 3, 10, basis="none")
    scaled = density(diagonal(scale * values, dtype), 3, 10, basis="none")
    torch.testing.assert_close(scaled.nodes / scale, reference.nodes, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled.weights, reference.weights, rtol=1e-2, atol=1e-6)


def test_without_a_basis_products_that_are_not_finite_are_an_error():
    with pytest.raises(NonFiniteError):
        density(Function(lambda block: block * math.nan, 20), basis="none")
