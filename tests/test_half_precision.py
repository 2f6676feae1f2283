"""Every analysis in bfloat16 and float16 is near its own in float64, up to the rounding of the network itself."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import deepspectra as ds
from deepspectra.derivatives import way_choice
from deepspectra.jobs.layers_dataset import layer_dataset
from deepspectra.jobs.pages import precision

TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005}  # of norms; the types round to 4e-3 and 5e-4
KINDS = ("kfac", "ekfac", "cfac", "optimal")


class Words(nn.Module):
    """A table of embeddings, averaged over three words, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(words).mean(1)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Conv2d(2, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


@cache
def problems(net: str, dtype: torch.dtype) -> tuple[ds.Problem, ds.Problem]:
    """Two networks of one architecture, on data of three classes."""
    torch.manual_seed(0)
    x = torch.randn(12, 1, 3, 3) if net == "convolutional" else torch.randint(0, 7, (12, 3))
    make = convolutional if net == "convolutional" else Words
    one, other = (ds.Problem(make().eval(), (x, torch.arange(12) % 3), dtype=dtype) for _ in range(2))
    return one, other


def scaled(*arrays: Tensor) -> Tensor:
    """Each relative to its own norm, as one vector."""
    return torch.cat([array.double().flatten() / array.double().norm() for array in arrays])


def qualities(one: ds.Problem, _: ds.Problem) -> Tensor:
    found = ds.kronecker_quality(one, KINDS, ks=(1, 2))
    every = [fit for layer in found.values() for fit in layer.fits.values()]
    numbers = [[fit.frobenius, fit.cosine, fit.spectral, fit.trace] for fit in every]
    return scaled(torch.tensor(numbers), *[fit.overlaps for fit in every])


def dissected(one: ds.Problem, _: ds.Problem) -> Tensor:
    found = ds.dissect(one, num=3)
    layers = [array for e in found.values() for array in (e.values, e.rank_one, e.factored_values)]
    return scaled(*layers, found.whole.values, found.whole.approximated)


def compared(one: ds.Problem, other: ds.Problem) -> Tensor:
    found = ds.compare(one, other, num=3)
    return scaled(*[array for layer in found.values() for array in (layer.measured, layer.kronecker)], found.whole)


def layered(one: ds.Problem, _: ds.Problem) -> Tensor:
    return scaled(*[layer.gradients.values[:3] for layer in ds.layers(one, hessian=False).values()])


def split(one: ds.Problem, _: ds.Problem) -> Tensor:
    parts = ds.decompose(one)
    return scaled(*[part.dense() for part in parts.values()], ds.attribute(ds.GaussNewton(one), parts).pair_shares)


def weighed(one: ds.Problem, _: ds.Problem) -> Tensor:
    (layer,) = ds.weights(one).values()
    cosines = torch.tensor([layer.rest_cosine, layer.class_cosine, layer.class_share, layer.baseline])
    return scaled(layer.singular_values, layer.class_singular_values[:2], cosines)


def clustered(one: ds.Problem, _: ds.Problem) -> Tensor:
    found = ds.clustering(one)
    return scaled(found.logits, found.gradients)


def shifted(one: ds.Problem, _: ds.Problem) -> Tensor:
    outliers = ds.regions(one).whole.values[:4, 0]  # bump and bulk lie at the rounding of these types
    return scaled(outliers)


def estimated(one: ds.Problem, _: ds.Problem) -> Tensor:
    H = ds.Hessian(one)
    numbers = [ds.trace(H, 400).value, ds.frobenius_norm(H, 400).value, ds.density(H, 1, 20).mean]
    return scaled(ds.diagonal(H, 400).values, torch.tensor(numbers[:2]))


CALLS = {
    "kronecker": lambda p, _: scaled(*[ds.kronecker(p, kind).dense() for kind in KINDS]),
    "inverse": lambda p, _: scaled(
        ds.kronecker(p).inverse(0.1).dense(), ds.kronecker(p, "ekfac").inverse(0.1).dense()
    ),
    "reduce": lambda p, _: scaled(ds.kronecker(p, sharing="reduce").dense()),
    "kronecker_quality": qualities,
    "dissect": dissected,
    "compare": compared,
    "collapse": lambda p, _: torch.tensor([[e.nc1, e.nc2_norms] for e in ds.collapse(p).values()]).log(),
    "layers": layered,
    "decompose": split,
    "estimates": estimated,
    "eigenpairs": lambda p, _: ds.eigenpairs(ds.Hessian(p), 2, rtol=0.1).values,
    "gram_spectrum": lambda p, _: ds.gram_spectrum(p).values[:5],
    "class_means": lambda p, _: scaled(
        *[ds.class_means(p, of).class_means for of in ("gradients", "errors", "features")]
    ),
    "principal_subspace": lambda p, _: scaled(
        *[ds.principal_subspace(p, level=level).values[:2] for level in ("class", "cross_class", "sampled")]
    ),
    "class_groups": lambda p, _: ds.class_groups(p, 3).double(),
    "weights": weighed,
    "clustering": clustered,
    "regions": shifted,
}


OF_TABLES = ("kronecker", "kronecker_quality", "dissect", "compare")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("name", "net"), [*[(name, "convolutional") for name in CALLS], *[(name, "words") for name in OF_TABLES]]
)
def test_half_precision_rounds_what_the_network_does_and_no_more(name, net, dtype):
    expected = CALLS[name](*problems(net, torch.float64))
    with warnings.catch_warnings():  # how far pairs can be told is the processor's: how it multiplies such numbers
        warnings.filterwarnings("ignore", message=".*the rounding of this dtype allows no less")
        found = CALLS[name](*problems(net, dtype))
    assert float((found - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


class Cast(nn.Module):
    """A network in float32 that computes in bfloat16 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutional()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize(
    ("make", "dtype", "coarse"),
    [
        (convolutional, torch.bfloat16, "bfloat16"),
        (convolutional, torch.float16, "float16"),
        (Cast, None, "bfloat16"),
        (convolutional, None, ""),
    ],
    ids=["bfloat16", "float16", "autocast inside", "float32"],
)
@pytest.mark.filterwarnings("ignore:.*inside .autocast", "ignore:.*the rounding of this dtype")
def test_how_far_products_are_off_is_measured_kept_and_told(make, dtype, coarse):
    torch.manual_seed(0)
    x, labels = torch.randn(12, 1, 3, 3), torch.arange(12) % 3
    problem = ds.Problem(make().eval(), (x, labels), dtype=dtype)
    pairs = ds.eigenpairs(ds.Hessian(problem), 2, rtol=0.1)
    exact = ds.Hessian(problem.to(torch.float64))
    v = torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(0))
    off = ((ds.Hessian(problem) @ v).double() - exact @ v.double()).norm() / (exact @ v.double()).norm()
    if not coarse:
        assert pairs.provenance.rounding is None
        assert precision(problem) == []
        return
    told = pairs.provenance.rounding
    assert float(off) / 5 < told < 5 * float(off)  # of other examples, along another direction
    assert f"products are off by {told:.1%}" in str(pairs)
    (sentence,) = precision(problem)
    assert sentence.startswith(f"Computed in {coarse}: H v is off by {told:.1%}")


def test_the_verdict_of_every_page_tells_precision():
    one, _ = problems("words", torch.bfloat16)
    assert "Computed in bfloat16: J v is off by" in layer_dataset(ds.layers(one, hessian=False), one).attrs["verdict"]


def test_tf32_is_told_where_a_gpu_takes_it(monkeypatch):
    _, one = problems("words", torch.float32)
    gpu = one.variant(device=torch.device("cuda"))
    for asked in (True, False):
        monkeypatch.setattr(way_choice, "_takes_tf32", lambda asked=asked: asked)
        assert way_choice.coarse_types(gpu) == ("TF32" if asked else "")
        assert way_choice.coarse_types(one) == ""
