"""What a job held is free as soon as its result is let go: memory of large tensors hurries no garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import deepspectra as ds
from deepspectra.algorithms.stored_rows import StoredRows
from nets import classified

JOBS: dict[str, Callable[[ds.Problem], Any]] = {
    "density": lambda problem: ds.density(ds.Hessian(problem), 2, 10),
    "eigenpairs": lambda problem: ds.eigenpairs(ds.Hessian(problem), 3),
    "attribute": lambda problem: ds.attribute(ds.Hessian(problem), ds.decompose(problem, effects="two-way")),
    "layers": lambda problem: ds.layers(problem, kronecker=("kfac", "cfac")),
    "regions": lambda problem: ds.regions(problem, num_groups=2),
    "analyze": lambda problem: ds.analyze(problem, effort="quick", progress=False),
}


@pytest.mark.parametrize("job", JOBS)
def test_nothing_waits_for_the_garbage_collector(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[weakref.ref[StoredRows]] = []
    made = StoredRows.__init__

    def noted(self: StoredRows, *args: Any) -> None:
        bases.append(weakref.ref(self))
        made(self, *args)

    monkeypatch.setattr(StoredRows, "__init__", noted)
    JOBS[job](classified())  # what is made once a process, such as modules that are read, is there
    bases.clear()
    problem = classified()
    first = weakref.ref(problem)
    gc.collect()
    gc.disable()
    try:
        found = JOBS[job](problem)
        assert not any(basis() for basis in bases)
        del problem, found
        assert first() is None
    finally:
        gc.enable()
    assert bases or job == "regions"
