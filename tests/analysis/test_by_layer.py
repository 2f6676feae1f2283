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
