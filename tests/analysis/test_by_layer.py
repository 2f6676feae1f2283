"""One protocol for results by layer: a mapping from names of layers, in order, to what was found there."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import deepspectra as ds
from deepspectra.errors import MissingNameError
from nets import CASES

RESULTS = {
    "collapse": ds.collapse,
    "compare": lambda p: ds.compare(p, p, num=3, num_whole=0),
    "dissect": lambda p: ds.dissect(p, num_whole=0),
    "kronecker_quality": lambda p: ds.kronecker_quality(p, ("kfac",), ks=(1,)),
    "layers": lambda p: ds.layers(p, hessian=False),
    "regions": lambda p: ds.regions(p, num_groups=0),
    "study": lambda p: ds.study({"alone": [p]}),
    "weights": ds.weights,
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_mappings_from_layers_in_their_order(name: str) -> None:
    found = RESULTS[name](CASES["relu_mlp"]().problem())
    assert isinstance(found, Mapping)
    assert list(found) == ["0", "2", "4", *(["all layers"] if name == "study" else [])]
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
    "study": lambda p, show: ds.study({"alone": [p, p]}, progress=show),
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
