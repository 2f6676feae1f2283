"""What tells a sweep's cell from others: never another cell's numbers, and the same in every run."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import inspect
import threading

import numpy as np
import pytest
import torch

import deepspectra as ds
import sweep_cells
from deepspectra import errors
from deepspectra.jobs.sweep_identity import identity


class Experiment:
    def __init__(self, rate, **others):
        self.rate, self.others = rate, others

    def run(self, x, factor=1):
        return {"y": x * self.rate * factor}

    def __call__(self, x):
        return {"y": x * self.rate}


class Slotted:
    __slots__ = ("rate",)

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, x):
        return {"y": x * self.rate}


@dataclasses.dataclass
class Told:
    rate: object
    root: str = dataclasses.field(default="", repr=False)

    def __call__(self, x):
        return {"y": x * self.rate}


def product(x, rate):
    return {"y": x * float(rate.sum() if hasattr(rate, "sum") else rate())}


def closing(rate):
    def cell(x):
        return {"y": x * rate}

    return cell


def defaulting(rate):
    def cell(x, rate=rate, *, other=rate):
        return {"y": x * rate}

    return cell


def wrapping(rate):
    @functools.wraps(sweep_cells.failing)
    def cell(x):
        return {"y": x * rate}

    return cell


def recursive(rate):
    def power(x, n=3):
        return {"y": rate * x if n == 1 else x * power(x, n - 1)["y"]}

    return power


def cyclic(rate):
    made = Experiment(rate)
    made.itself = [made]
    return made


def network(rate):
    return torch.nn.Linear(1, 1, bias=False).requires_grad_(False).apply(lambda one: one.weight.fill_(rate))


def long(rate):
    values = np.zeros(2000)
    values[1000] = rate
    return values


MAKERS = {
    "bound method": lambda rate: Experiment(rate).run,
    "object": Experiment,
    "object of an object": lambda rate: Experiment(1.0, inner={"of": [Experiment(rate)]}),
    "object that holds itself": cyclic,
    "slots": Slotted,
    "closure": closing,
    "defaults": defaulting,
    "wrapper": wrapping,
    "recursion": recursive,
    "cached": lambda rate: functools.cache(closing(rate)),
    "partial of a method": lambda rate: functools.partial(Experiment(rate).run, factor=2),
    "fixed function": lambda rate: functools.partial(product, rate=closing(rate)),
    "fixed function and number": lambda rate: functools.partial(product, abs, rate),
    "fixed long array": lambda rate: functools.partial(product, rate=long(rate)),
    "fixed tensor": lambda rate: functools.partial(product, rate=1 + 1e-6 * torch.tensor([rate])),
    "network": network,
    "data class of a tensor": lambda rate: Told(1 + 1e-6 * torch.tensor([rate])),
    "lambdas of a line": lambda rate: [lambda x: {"y": x}, lambda x: {"y": 10 * x}][rate == 10],
    "generator": lambda rate: Experiment(np.random.default_rng(int(rate))),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_cells_that_measure_other_numbers_are_told_apart(kind):
    make = MAKERS[kind]
    assert identity(make(1.0)) == identity(make(1.0))
    assert identity(make(1.0))[0] == identity(make(10.0))[0]
    assert identity(make(1.0))[1] != identity(make(10.0))[1]


@pytest.mark.parametrize("kind", ["bound method", "object", "closure"])
def test_a_sweep_never_gives_another_cells_numbers(kind, tmp_path):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    for rate in (1.0, 10.0):
        folder, axes = tmp_path / str(rate), {"x": [1, 2]}
        found = ds.sweep(MAKERS[kind](rate), axes, folder, executor=pool, progress=False)
        assert found.y.values.tolist() == [rate, 2 * rate]
    with pytest.raises(errors.FileError, match="of version"):
        ds.sweep(MAKERS[kind](1.0), {"x": [1]}, folder, executor=pool, progress=False)


def test_programs_typed_at_a_prompt_are_told_apart():
    def typed(text, name):
        found = {"__name__": "prompt"}
        exec(text, found)
        return identity(found[name])

    programs = {"cell": "def cell(x): return {'y': RATE * x}", "A": "class A:\n def run(self, x): return RATE * x"}
    for name, text in programs.items():
        versions = [typed(text.replace("RATE", rate), name)[1] for rate in ("1", "1", "10")]
        assert versions[0] == versions[1] != versions[2]


def test_the_order_in_which_a_set_happens_to_stand_tells_nothing():
    one, other = {0, 8}, {8, 0}
    assert repr(one) != repr(other)
    assert identity(Experiment(one)) == identity(Experiment(other)) != identity(Experiment({0, 9}))


def test_functions_and_texts_of_their_own_are_known_as_ever(tmp_path):
    """By digests of source, repr and fixed arguments, which stores of before have."""

    def before(source, *said):
        return hashlib.sha256((inspect.getsource(source) + "".join(said)).encode()).hexdigest()[:12]

    def said(cell):
        return identity(cell)[1]

    assert said(sweep_cells.failing) == before(sweep_cells.failing)
    assert said(Told(0.5, "elsewhere")) == before(Told, "Told(rate=0.5)")
    fixed = functools.partial(sweep_cells.training, tmp_path, 0.1, model=("u",), epochs={"a": [1, None]})
    told = f"({tmp_path!r}, 0.1)[('epochs', {{'a': [1, None]}}), ('model', ('u',))]"
    assert said(fixed) == before(sweep_cells.training, told)
    assert said(ds.ZooCell("root")) == ds.ZooCell().version


def test_a_cell_that_cannot_be_written_down_is_asked_for_its_version():
    made = Experiment(1.0, lock=threading.Lock())
    for cell in (made, made.run, functools.partial(made.run, factor=2), closing(made), closing(x for x in [1])):
        with pytest.raises(errors.OptionError, match=r"cannot pickle.*attribute version, a text.*that of its object"):
            identity(cell)
    made.version = "mine"
    assert identity(made)[1] == identity(made.run)[1] == "mine"
    fixed = functools.partial(closing(made))
    fixed.version = "2"
    assert identity(fixed)[1] == "2"
