"""What processes compute together, in a file that they can import: of a case of `nets`, by name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepspectra as ds
import nets
from deepspectra import cli
from deepspectra.algorithms.krylov_basis import Krylov
from deepspectra.operators.base import Matrix
from deepspectra.problem.finished_stages import FinishedStages
from deepspectra.problem.parallel import Group, current
from deepspectra.rows.batch_capture import IrregularError

MEASURED = 20  # examples of a batch of what is measured beforehand, at most


def flattened(name: str, value: Any) -> dict[str, Tensor]:
    """All numbers of a result, each under a name."""
    if isinstance(value, Tensor):
        return {name: value.detach().double()}
    if isinstance(value, (int, float)):
        return {name: torch.tensor(float(value), dtype=torch.float64)}
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flattened(f"{name}, {key}", one).items()}
    if isinstance(value, (list, tuple)):
        return flattened(name, dict(enumerate(value)))
    raise TypeError(f"{name}: {type(value)}")


def problem_of(name: str) -> ds.Problem:
    """The problem of a case, or on digits, shared if there are several processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ds.errors.FallbackWarning)
        if name == "digits":
            net, data = nets.trained_on_digits(12, (16,), epochs=10)
            inputs = data.inputs.double(), data.targets
            return ds.sharded(ds.Problem(net.double(), inputs, memory="2GiB"))
        case = nets.language_model() if name == "language_model" else nets.CASES[name]()
        return ds.sharded(case.problem(memory="2GiB"))


def sums(name: str) -> dict[str, Tensor]:
    """Losses, gradients and products."""
    problem = problem_of(name)
    block = torch.randn(problem.num_parameters, 3, dtype=problem.dtype, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {
        "loss": problem.loss(),
        "gradient": problem.gradient(),
        "accuracy": problem.accuracy(),
        "outputs": torch.cat([outputs for outputs, _ in problem.row_batches()]),
    }
    for kind, make in nets.OPERATORS.items():
        found[kind] = make(problem) @ block
        found[f"{kind}, a vector"] = make(problem) @ block[:, 0]
    return {key: value for k, v in found.items() for key, value in flattened(k, v).items()}


def spectra(name: str) -> dict[str, Tensor]:
    """Eigenpairs, traces, densities, parts, means, Kronecker factors and exact spectra."""
    problem = problem_of(name)
    H = ds.Hessian(problem)
    top = ds.eigenpairs(H, 4, rtol=1e-6, which="both")
    means = ds.class_means(problem)
    parts = ds.decompose(problem, effects="two-way")
    held = ds.decompose(problem, effects="two-way", hold=True)
    block = torch.randn(problem.num_parameters, 3, dtype=problem.dtype, generator=torch.Generator().manual_seed(1))
    gram = ds.gram_spectrum(problem)
    density = ds.density(H, num_probes=2, num_steps=8, deflate=top)
    attributed = ds.attribute(H, parts)
    found: dict[str, Any] = {
        "values": top.values,
        "residuals": top.residual_norms,
        "vectors": top.vectors,
        "nodes": density.nodes,
        "weights": density.weights,
        "trace": ds.trace(H, num_products=8).value,
        "class means": means.class_means,
        "cross-class means": means.cross_class_means,
        "parts": {part: parts[part] @ block for part in parts},
        "held parts": {part: held[part] @ block for part in held},
        "gram": gram.values,
        "traces": gram.traces,
        "shares": attributed.shares,
    }
    for kind in ("kfac", "ekfac", "cfac") if problem.splits_by_class else ("kfac", "ekfac"):
        factors = ds.kronecker(problem, kind=kind)
        found[kind] = factors @ block
    for of in ("features", "errors") if name != "language_model" else ():  # whose last tokens have features alone
        found[of] = ds.class_means(problem, of).class_means
    return {key: value for k, v in found.items() for key, value in flattened(k, v).items()}


def everything(names: list[str]) -> dict[str, Tensor]:
    """Both of several cases."""
    return {
        f"{name}: {key}": value for name in names for work in (sums, spectra) for key, value in work(name).items()
    }


def conversation() -> dict[str, Any]:
    """What the methods of a group give, and what is raised where one process fails."""
    group = current(torch.device("cpu"))
    total = torch.full((3,), group.rank + 1.0)
    found: dict[str, Any] = {
        "sums": group.sums(group.rank, 1.0),
        "every": group.every(torch.tensor([group.rank])),
        "dealt": group.dealt([10 * j for j in range(5) if group.owns(j)]),
        "in turn": list(group.in_turn(lambda index: (index, group.rank), 5)),
        "later": list(group.in_turn(lambda index: (index, group.rank), 5, start=1)),
        "first": group.of_first(lambda: f"made by {group.rank}"),
    }
    with group.summing(total):
        total += 1
    found["total"] = total
    found["raised in a pass"] = _raised(_failing_pass, group)
    found["raised in turn"] = _raised(_failing_turn, group)
    found["raised by the first"] = _raised(lambda _: group.of_first(lambda: 1 // 0), group)
    found["unsendable"] = _raised(_unsendable, group)
    found["names"] = _raised(_irregular, group)
    found["still together"] = group.sums(1.0)
    return found


def _raised(work: Callable[[Group], Any], group: Group) -> str:
    try:
        work(group)
    except Exception as error:
        return f"{type(error).__name__}: {getattr(error, 'names', error)}"
    return "nothing"


def _failing_pass(group: Group) -> None:
    with group.summing(torch.zeros(2)):
        if group.rank == 1:
            raise ds.errors.MissingNameError("part", "x", ["a", "b"])


def _failing_turn(group: Group) -> None:
    for found in group.in_turn(lambda index: 6 // (2 - index), 5):
        assert found


def _unsendable(group: Group) -> None:
    class LocalError(Exception):
        pass

    with group.summing():
        if group.rank == 1:
            raise LocalError("of this function alone")


def _irregular(group: Group) -> None:
    with group.summing():
        if group.rank == group.size - 1:
            raise IrregularError(["weight"])


def left_alone() -> str:
    """What the first process is told when the other has ended."""
    group = current(torch.device("cpu"))
    if group.rank:
        os._exit(1)
    return _raised(lambda _: group.sums(1.0), group)


def different(what: str) -> str:
    """What is said where processes were given different things."""
    rank = current(torch.device("cpu")).rank
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    net = torch.nn.Linear(4, 3)
    torch.manual_seed(rank if what == "weights" else 0)
    torch.nn.init.normal_(net.weight)
    torch.nn.init.zeros_(net.bias)
    order = torch.arange(12)
    if what == "order" and rank:
        order = order.flip(0)
    if what == "shares":
        order = order[rank::2]
    if what == "little":
        order = order[:1]
    problem = ds.Problem(net, (x[order], y[order]), batch_size=12 if what == "one batch" else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = _raised(lambda _: ds.sharded(problem), current(torch.device("cpu")))
    return f"{said} {' '.join(str(one.message) for one in caught)}"


def with_unlike_memory() -> list[Any]:
    """Of data whose batches are ours to cut or the user's: how both processes cut them, and the gradient."""
    rank = current(torch.device("cpu")).rank
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 3)).double()
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.arange(200) % 3
    found: list[Any] = []
    for data in ((x, y), [(x, y)]):
        for memories in (("7.5MB", "8MB"), ("18MB", "7.5MB")):
            problem = ds.sharded(ds.Problem(net, data, memory=memories[rank]))
            found += [problem.memory, problem.batch_size, problem.batches.num_batches, problem.gradient()]
    return found


def held_by_some() -> str:
    """What is said where the memory of one process holds the data, and that of the other does not."""
    group = current(torch.device("cpu"))
    data = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 3
    torch.manual_seed(0)
    problem = ds.Problem(torch.nn.Linear(5, 3), data, memory=(6000, 60_000)[group.rank])
    return _raised(lambda _: ds.sharded(problem), group)


def spread() -> str:
    """What is said of a model whose weights lie on several processes."""
    net = torch.nn.Linear(4, 3)
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  (its import takes a while)

    fully_shard(net, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    data = torch.randn(6, 4), torch.arange(6) % 3
    return _raised(lambda _: ds.Problem(net, data), current(torch.device("cpu")))


def spread_bases() -> tuple[dict[str, Tensor], list[int]]:
    """What bases find of which each process has a part, and the lengths of its parts."""
    found: dict[str, Any] = {}
    lengths = []
    for size, dtype in ((5, torch.float64), (61, torch.float64), (61, torch.float32)):
        generator = torch.Generator().manual_seed(3)
        turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
        matrix = (turn * torch.linspace(-1, 3, size, dtype=torch.float64) @ turn.T).to(dtype)
        A = Matrix((matrix + matrix.T) / 2)
        A.group = current(A.device)
        A.memory = 20 * -(-size // A.group.size) * matrix.itemsize  # rows for which restarts are needed
        basis = Krylov(A, size)
        basis.append(torch.randn(2, size, generator=generator))
        basis.expand(2)
        while basis.num_basis < min(size, 12):
            basis.expand(1)
        rows = torch.cat(list(basis.whole_rows(0, basis.num_basis))).double()
        tight = 100 * torch.finfo(dtype).eps
        assert float((rows @ rows.T - torch.eye(len(rows))).abs().max()) < tight
        assert float((basis.combine(basis.projected) - A @ rows.T.to(dtype)).abs().max()) < tight
        basis.contract(basis.ritz().coefficients[:, -3:])
        values, _, residuals = basis.ritz()
        pairs = ds.eigenpairs(A, 2, rtol=1e-2, start="random", max_products=200)
        density = ds.density(A, num_probes=2, num_steps=5, deflate=pairs)
        if dtype == torch.float32:  # every process has its part of the rounding, and counts all of it
            A.basis = torch.bfloat16
            rounded = Krylov(A, 20)
            rounded.append(torch.randn(1, size, generator=generator))
            for _ in range(6):
                rounded.expand(1)
            held = torch.cat(list(rounded.whole_rows(0, 7))).double()
            lacking = held[:6] @ A.matrix.double() - rounded.projected.T @ held
            counted = rounded.lost_squares(torch.eye(6, dtype=torch.float64)).sqrt()
            torch.testing.assert_close(counted, lacking.norm(dim=1), rtol=1e-2, atol=0)
        lengths.append(basis.part().shape[1])
        if dtype == torch.float64:
            found[f"{size}"] = {
                "values": values,
                "residuals": residuals,
                "pairs": pairs.values,
                "nodes": density.nodes,
            }
    return flattened("basis", found), lengths


def within_wrapper() -> tuple[float, float]:
    """The loss of a model within DistributedDataParallel, and of the model itself."""
    net, (x, y) = nets.unbalanced().model, nets.unbalanced().tensors
    wrapped = torch.nn.parallel.DistributedDataParallel(net)
    return ds.sharded(ds.Problem(wrapped, (x, y))).loss(), ds.Problem(net, (x, y)).loss()


def streamed() -> dict[str, Tensor]:
    """Of data that do not fit memory, which are read anew at each pass."""
    case = nets.unbalanced()
    x, y = case.tensors
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    problem = ds.sharded(ds.Problem(case.model, loader, memory=3000))
    assert problem.batches.held is None
    problem.memory = 2**30
    return {"gradient": problem.gradient(), "H": ds.Hessian(problem) @ problem.gradient()}


def command(words: list[str], killed_at: int | None = None) -> tuple[int, str, str]:
    """Exit status of a command, and what it says on standard output and on standard error.

    The second process may be killed at its so many'th product with R of all examples, not of the few that are timed.
    """
    if killed_at is not None and os.environ["RANK"] == "1":
        apply, count = ds.Residual._apply, itertools.count(1)

        def deadly(self: ds.Residual, block: Tensor) -> Tensor:
            if self.problem.num_examples > MEASURED and next(count) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return apply(self, block)

        ds.Residual._apply = deadly
    out, err, sys.argv = io.StringIO(), io.StringIO(), ["deepspectra", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("a command ends by an exit")


def killed_after(words: list[str], seconds: float, victim: int) -> tuple[int, str, str]:
    """A command, one of whose processes is killed after so long, wherever it is then."""
    if int(os.environ["RANK"]) == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return command(words)


def each_of(works: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """What several functions return, one after the other."""
    return [work(*arguments) for work, arguments in works]


class StoppedError(Exception):
    """Raised where a job is stopped."""


@contextlib.contextmanager
def stopping(after: int | None = None, error: Exception | None = None) -> Iterator[list[str]]:
    """The names of stages that are written, the so many'th of which is the last before it stops."""
    written: list[str] = []
    write = FinishedStages.write

    def watched(self: FinishedStages, name: str, value: object, *by: Any) -> None:
        if self.folder is None:
            return
        if len(written) == after:
            raise error or StoppedError
        write(self, name, value, *by)
        written.append(name)

    FinishedStages.write = watched
    try:
        yield written
    finally:
        FinishedStages.write = write


def small_problem(seed: int = 0, order: Tensor | None = None) -> ds.Problem:
    """Three layers, of which the first has more parameters than there are gradients; in several batches."""
    torch.manual_seed(seed)
    x, y = torch.randn(60, 8).double(), torch.arange(60) % 3
    x, y = (x, y) if order is None else (x[order], y[order])
    layers = torch.nn.Linear(8, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    return ds.sharded(ds.Problem(torch.nn.Sequential(*layers).double(), (x, y), batch_size=20, memory="1GiB"))


def _layers(problem: ds.Problem, folder: Path | None, *, changed: bool = False) -> Any:
    return ds.layers(problem, kronecker=("kfac",), num=2 if changed else None, resume=folder)


def _regions(problem: ds.Problem, folder: Path | None, *, changed: bool = False) -> Any:
    return [
        ds.regions(problem, of, num_groups=2, seed=int(changed), resume=folder)
        for of in ("gradients", "hessian", "features")
    ]


def _compare(problem: ds.Problem, folder: Path | None, *, changed: bool = False) -> Any:
    return ds.compare(problem, small_problem(1), seed=int(changed), resume=folder)


STOPPABLE: dict[str, Callable[..., Any]] = {"layers": _layers, "regions": _regions, "compare": _compare}


def numbers(found: Any) -> dict[str, Tensor]:
    """All numbers of a result, but how long it took."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            names = [one.name for one in dataclasses.fields(value)]
            return {name: plain(getattr(value, name)) for name in names if name not in ("seconds", "provenance")}
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return value if isinstance(value, (Tensor, int, float)) else {}

    return flattened("", plain(found))


def stopped_jobs(folder: Path) -> dict[str, tuple[list[str], dict[str, Tensor]]]:
    """Job → the stages it finished before a stop, and what it found when it went on."""
    found = {}
    for job, work in STOPPABLE.items():
        with contextlib.suppress(StoppedError), stopping(after=2) as stages:
            work(small_problem(), folder / job)
        found[job] = stages, numbers(work(small_problem(), folder / job))
    return found
