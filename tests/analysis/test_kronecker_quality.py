"""How far approximations are from dense blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import deepspectra as ds
from deepspectra.analysis.kronecker_quality import norm_of
from deepspectra.errors import FallbackWarning, MemoryBudgetError, OptionError
from nets import CASES, block_of
from reference import case_and_reference

KINDS = ("kfac", "ekfac", "cfac")


@pytest.mark.parametrize("name", ["relu_mlp", "conv_pool", "token_classes", "mse_module"])
@pytest.mark.parametrize("small", [3000, 0])
def test_quality_is_that_of_dense_blocks(name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspectra.analysis.kronecker_quality.SMALL", small)
    monkeypatch.setattr("deepspectra.analysis.layer_blocks.SMALL", small)
    monkeypatch.setattr("deepspectra.analysis.layer_blocks.PAIRED_ROWS", 20)
    case, ref = case_and_reference(name)
    kinds = ("kfac", "ekfac", "optimal") if name in ("token_classes", "mse_module") else KINDS
    found = ds.kronecker_quality(case.problem(), kinds, ks=(1, 3), rtol=1e-8)
    operators = {kind: ds.kronecker(case.problem(), kind) for kind in kinds}
    assert set(found) == {name for name, place in operators["kfac"].places.items() if place.is_matrix}
    for layer in found.values():
        truth = block_of(operators["kfac"], ref.gauss_newton, layer.name)
        values, vectors = torch.linalg.eigh(truth)
        assert layer.num_parameters == len(truth)
        assert layer.norm == pytest.approx(float(truth.norm()), rel=1e-10)
        assert layer.largest == pytest.approx(float(values[-1]), rel=1e-8)
        assert layer.baseline.tolist() == [k / len(truth) for k in layer.ks]
        for kind, fit in layer.fits.items():
            given = operators[kind].blocks[layer.name].dense()
            if (truth - given).norm() < 1e-7 * truth.norm():
                assert fit.frobenius < 1e-6
                continue
            others, basis = torch.linalg.eigh(given)
            assert fit.frobenius == pytest.approx(float((truth - given).norm() / truth.norm()), rel=1e-6)
            cosine = (truth * given).sum() / truth.norm() / given.norm()
            assert fit.cosine == pytest.approx(float(cosine), rel=1e-8)
            spectral = torch.linalg.eigvalsh(truth - given).abs().max() / values[-1]
            assert fit.spectral == pytest.approx(float(spectral), rel=1e-2)
            assert fit.trace == pytest.approx(float(given.trace() / truth.trace()), rel=1e-8)
            for k, overlap in zip(layer.ks, fit.overlaps.tolist(), strict=True):
                gaps = [(w[-k] - w[-k - 1]) / w[-1] for w in (values, others)]
                if min(gaps) > 1e-4:
                    expected = ds.overlap(vectors[:, -k:], basis[:, -k:])
                    assert overlap == pytest.approx(expected, abs=1e-5)
            floor = found.floor * values[-1]
            logs = [w.clamp_min(floor).log10() for w in (values, others)]
            above = max(int((w > floor).sum()) for w in (values, others))
            decades = float((logs[0] - logs[1]).abs().sum()) / above
            assert fit.decades == pytest.approx(decades, abs=1e-6 if layer.exact_spectrum else 0.05)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found) * (len(kinds) + 1)


def test_quality_checks_its_options() -> None:
    problem = CASES["relu_mlp"]().problem()
    with pytest.raises(OptionError, match="kinds"):
        ds.kronecker_quality(problem, ("shampoo",))
    with pytest.raises(OptionError, match="ascend"):
        ds.kronecker_quality(problem, ks=(3, 1))
    with pytest.raises(KeyError, match="no layer"):
        ds.kronecker_quality(problem, ("kfac",), ks=(1,))["17"]


def test_a_layer_that_does_not_fit_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["relu_mlp"]().problem()
    first, *others = ds.kronecker_quality(problem, ("kfac",), ks=(1,))
    calls: list[object] = []

    def of_some(block: object, memory: int) -> float:
        calls.append(block)
        if len(calls) == 1:
            raise MemoryBudgetError("16 GiB.")
        return norm_of(block, memory)

    monkeypatch.setattr("deepspectra.analysis.kronecker_quality.norm_of", of_some)
    with pytest.warns(FallbackWarning, match=f"leaves out {first}: 16 GiB"):
        found = ds.kronecker_quality(problem, ("kfac",), ks=(1,))
    assert list(found) == others
    monkeypatch.setattr("deepspectra.analysis.kronecker_quality.norm_of", lambda *_: of_some(calls.clear(), 0))
    with pytest.raises(MemoryBudgetError, match="16 GiB"):
        ds.kronecker_quality(problem, ("kfac",), ks=(1,))


class TwoMatrices(nn.Module):
    """Matrices that are parameters of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.first.T) @ self.second.T


def test_a_module_may_have_several_matrices(tmp_path: Path) -> None:
    data = torch.randn(30, 6), torch.arange(30) % 3
    one, other = (ds.Problem(TwoMatrices(), data) for _ in range(2))
    assert list(ds.kronecker_quality(one)) == list(ds.compare(one, other, resume=tmp_path)) == ["first", "second"]


def test_without_an_eigenspace_of_a_size_asked_for_the_rest_is_told() -> None:
    torch.manual_seed(0)
    problem = ds.Problem(nn.Linear(10, 2).double(), (torch.randn(6, 10).double(), torch.arange(6) % 2))
    (layer,) = ds.kronecker_quality(problem, KINDS, ks=(10,)).values()
    assert layer.ks == ()
    for fit in layer.fits.values():
        assert len(fit.overlaps) == 0
        assert 0 <= fit.cosine <= 1
