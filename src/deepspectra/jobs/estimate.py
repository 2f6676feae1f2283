"""What a job will take, stage by stage, foreseen from one measured batch: the program of every plan that is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspectra.analysis.regions import NUM_GROUPS
from deepspectra.analysis.regions import OF as KINDS_OF_REGIONS
from deepspectra.argument_checks import check_choice
from deepspectra.certificates.priors import Prior, priors_of
from deepspectra.certificates.settings import Settings
from deepspectra.dataframes import Tabular, text_table
from deepspectra.derivatives.way_choice import FAILURES
from deepspectra.errors import DeepSpectraError, MemoryBudgetError, OptionError
from deepspectra.jobs.effort import EFFORTS, MOST_CLASSES, Effort, count_operations, described, effort_for
from deepspectra.jobs.effort import NUM_GROUPS as GROUPS_OF_CLASSES
from deepspectra.jobs.pace import Pace, Stage
from deepspectra.jobs.plan_of_analysis import is_exact, of_analysis
from deepspectra.jobs.plan_of_certificate import of_certificate
from deepspectra.jobs.plan_of_factors import of_factors
from deepspectra.jobs.plan_of_rows import of_comparison, of_layers, of_regions
from deepspectra.problem.memory_budget import share
from deepspectra.problem.problem import Problem, check_problem
from deepspectra.results import Result, origin
from deepspectra.rows.gradients import check_labelled, has_labels, refuse_one_output

JOBS = ("analyze", "layers", "regions", "compare", "certify")
UNCLASSED_PAIRS = 10  # eigenpairs of a problem without classes
MINUTE = 60
INSTEAD = {  # of more memory
    "analyze": "lower batch_size, or look at part of the network by parameters=",
    "certify": "or lower batch_size",
}


@dataclass(frozen=True, repr=False)
class Plan(Result, Tabular):
    """What a job will take.

    Attributes:
        job: "analyze" | "layers" | "regions" | "compare" | "certify".
        effort: of an analysis.
        stages: in the order in which they run.
        gradient_seconds: of a gradient of all the data, foreseen from one batch.
        memory: of the problem, in bytes.
        advice: what to change where it does not fit, or takes long; "" where nothing is to be said.
        what: the job does; "" where its name says it.
    """

    job: str
    effort: str
    stages: tuple[Stage, ...]
    gradient_seconds: float
    memory: int
    advice: str = ""
    what: str = ""

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> float:
        """Of the stage that holds most, beside model and data."""
        return max(stage.whole_bytes for stage in self.stages)

    @property
    def num_products(self) -> int:
        """Of all stages."""
        return sum(stage.products for stage in self.stages)

    @property
    def seconds_at_most(self) -> float:
        """Of all stages, where the spectrum has no gaps and searches for eigenpairs give up."""
        return sum(stage.seconds_at_most for stage in self.stages)

    @property
    def products_at_most(self) -> int:
        """The same."""
        return sum(stage.products_at_most for stage in self.stages)

    @property
    def bytes_at_most(self) -> float:
        """Of the stage that then holds most."""
        return max(stage.bytes_at_most for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether no stage needs more memory than it may have."""
        return all(stage.fits for stage in self.stages)

    def work(self, of: str = "") -> dict[str, float]:
        """Seconds of the steps of the job's progress, by their names; of a kind of rows, if there are several."""
        return {stage.step: stage.seconds for stage in self.stages if stage.step is not None and stage.of == of}

    @property
    def told(self) -> str:
        """In words: what is done, how long it takes and what it holds, and what to change."""
        total = (
            f"About {duration(self.total_seconds)} and {size_of(self.peak_bytes)} beside model and data, foreseen "
            f"from one batch; {self.num_products:,} products, where a gradient of all the data takes "
            f"{self.gradient_seconds:.2g} s."
        )
        slow = (
            f"Where the spectrum has no gaps behind the top eigenpairs, at most {duration(self.seconds_at_most)} and "
            f"{size_of(self.bytes_at_most)}."
            if self.seconds_at_most > self.total_seconds
            else ""
        )
        hosted = max(stage.host_bytes for stage in self.stages)
        beside = f"Of a basis {size_of(hosted)} lie in host memory, and are brought for each step." if hosted else ""
        return " ".join(filter(None, [self.what, total, slow, beside, self.advice]))

    def to_dataframe(self) -> Any:
        """A row a stage, as a `pandas.DataFrame`: name, products, seconds, bytes, whether they fit; each at most."""
        import pandas  # noqa: PLC0415  (its import takes a while)

        return pandas.DataFrame(
            {
                "stage": [one.name for one in self.stages],
                "products": [one.products for one in self.stages],
                "seconds": [one.seconds for one in self.stages],
                "bytes": [one.whole_bytes for one in self.stages],
                "fits": [one.fits for one in self.stages],
                "products_at_most": [one.products_at_most for one in self.stages],
                "seconds_at_most": [one.seconds_at_most for one in self.stages],
                "bytes_at_most": [one.bytes_at_most for one in self.stages],
            }
        )

    def __str__(self) -> str:
        rows = [
            (
                one.name,
                _range(one.products, one.products_at_most, "{:,}".format),
                _range(one.seconds, one.seconds_at_most, "{:.2g}".format),
                _range(one.whole_bytes, one.bytes_at_most, size_of) + ("" if one.fits else " !"),
            )
            for one in self.stages
        ]
        rows.append(
            (
                "in all",
                _range(self.num_products, self.products_at_most, "{:,}".format),
                _range(self.total_seconds, self.seconds_at_most, "{:.2g}".format),
                _range(self.peak_bytes, self.bytes_at_most, size_of),
            )
        )
        return text_table(("stage", "products", "seconds", "memory"), rows, self.told)


def estimate(
    problem: Problem,
    job: str = "analyze",
    effort: str = "standard",
    *,
    of: str | Sequence[str] = KINDS_OF_REGIONS,
    num_groups: int = NUM_GROUPS,
    kronecker: Sequence[str] = (),
    prior: str | Prior | Sequence[str | Prior] = "isotropic",
    **settings: Any,
) -> Plan:
    """What a job will take in time and memory, without running it.

    Gradients, products with H, R and G, their graphs, features and errors and their inner products are timed on
    one batch and scaled to all of them. How many products pairs take depends on the gaps of the spectrum: told are
    a typical number, and at most how many, after which a search gives up. `analyze` tells the same plan before it
    begins. Times are those of this machine as it is now, and were within a factor of two of what jobs took on the
    networks of docs/planning.md.

    Args:
        problem: to be looked at.
        job: "analyze" | "layers" | "regions" | "compare" (with another of the same size) | "certify".
        effort: of an analysis.
        of: kinds of rows whose regions are looked at, or one of them,
        num_groups: of examples left out in turn, there.
        kronecker: approximations that `layers` judges besides.
        prior: of a certificate, or several, as `certify` takes them, and
        **settings: by name.

    Returns:
        A plan: `.stages`, `.total_seconds` and `.seconds_at_most`, `.peak_bytes` and `.bytes_at_most`, whether it
        `.fits`, and `.advice`; `str()` is a table.

    Raises:
        OptionError: an unknown job, effort or kind of rows, or settings of a certificate that there are not.
        CertificateError: the network or its data can have no certificate.
        LossError: the job needs class labels, or the loss is the cross-entropy of a single output.
        CurvatureError: the network has no right second derivative, or its examples cannot be told apart, where the
            job needs it.

    Cost: up to about 70 products with one batch, a second or so for small networks; of a certificate an epoch of
        training and two of descent on some of the examples, and two bases.
    """
    began = time.perf_counter()
    check_problem(problem)
    check_choice("job", job, JOBS)
    check_choice("effort", effort, tuple(EFFORTS))
    kinds = (of,) if isinstance(of, str) else of
    for kind in kinds:
        check_choice("of", kind, KINDS_OF_REGIONS)
    if job == "analyze":
        refuse_one_output(problem)
        _, operations = count_operations(problem, problem.loss)
        chosen = effort_for(problem, operations, effort)
        classed = has_labels(problem)
        num_classes = GROUPS_OF_CLASSES if problem.num_classes > MOST_CLASSES else problem.num_classes
        num = num_classes + chosen.spare_pairs if classed else UNCLASSED_PAIRS
        return plan_of_analysis(problem, chosen, num, num_classes if classed else 0)
    if job == "certify":
        chosen_settings, priors = Settings.of(**settings), priors_of(prior)
        return _plan(Pace(problem), job, began, of_certificate(problem, priors, chosen_settings))
    if settings:
        raise OptionError(f"{', '.join(settings)}: settings of a certificate, and not of job={job!r}.")
    if job != "compare":
        check_labelled(problem)
    pace = Pace(problem)
    return _plan(pace, job, began, _of_rows(pace, job, kinds, num_groups, kronecker))


def foreseen(planned: Callable[..., Plan], *given: Any, **asked: Any) -> Plan | None:
    """The plan of a job that is about to run; None where there is none, which shall not stop the job."""
    try:
        return planned(*given, **asked)
    except (DeepSpectraError, *FAILURES):  # the job says why, if it cannot do without what failed
        return None


def plan_of_analysis(problem: Problem, effort: Effort, num: int, num_classes: int, of: str = "") -> Plan:
    """The plan of an analysis of so many pairs, and classes or groups of them; 0 if there are none.

    Of test data, which stages name by `of`, there are no averages and no attribution.
    """
    began, pace = time.perf_counter(), Pace(problem)
    exact = bool(num_classes) and is_exact(pace, effort)
    what = described(problem, effort, num, exact=exact, averaged=bool(num_classes) and not of)
    return _plan(
        pace, "analyze", began, of_analysis(pace, effort, num, num_classes, of, exact=exact), effort.name, what
    )


def _plan(pace: Pace, job: str, began: float, stages: Iterator[Stage], effort: str = "", what: str = "") -> Plan:
    found, problem = tuple(stages), pace.problem
    advice = _advice(problem, job, effort, found)
    given = origin(began, problem)
    return Plan(job, effort, found, pace.gradient, problem.memory, advice, what, **given)


def _advice(problem: Problem, job: str, effort: str, stages: Sequence[Stage]) -> str:
    """What to lower, where something does not fit or takes minutes that grow with the rows."""
    broken = [stage for stage in stages if not stage.fits]
    seconds = sum(stage.seconds for stage in stages)
    if broken:
        worst = max(broken, key=lambda stage: stage.num_bytes / max(1, stage.limit))
        told = (
            f"It does not fit: {size_of(worst.num_bytes)} for {worst.name}, which may have {size_of(worst.limit)} of "
            f"the {size_of(problem.memory)} of memory. "
        )
        if job in INSTEAD:
            return f"{told}Raise memory, {INSTEAD[job]}."
        most, fewest = min(stage.most for stage in broken), max(2, problem.num_classes)
        return told + (
            f"Raise memory, or pass --limit {int(most)}." if fewest <= most < math.inf else "Raise memory."
        )
    if job in ("layers", "regions") and seconds > MINUTE:
        return _fewer(problem, stages)
    if job == "certify" and seconds > 10 * MINUTE:
        return "For less: --minutes, after which descent ends, or --descent-epochs."
    if job == "analyze" and seconds > 10 * MINUTE:
        quicker = "" if effort == "quick" else "--effort quick, or "
        return f"For less: {quicker}--limit for fewer examples."
    return ""


def _fewer(problem: Problem, stages: Sequence[Stage]) -> str:
    """With how many examples it would take ten seconds; of fewer than there are classes there is no structure."""
    left, fewest = 1.0, max(2, problem.num_classes)
    while sum(stage.seconds * left**stage.grows for stage in stages) > MINUTE / 6:
        left *= 0.95
    num = int(problem.num_examples * left)
    return f"Ten seconds or less with --limit {num}." if num >= fewest else f"For less: --limit {fewest} or more."


def _of_rows(pace: Pace, job: str, of: Sequence[str], num_groups: int, kronecker: Sequence[str]) -> Iterator[Stage]:
    """Of a job that looks at features and errors; only what they take, where that is too much to be measured."""
    problem, limit = pace.problem, share(pace.problem.memory, "factors")
    try:
        _ = pace.rows
    except MemoryBudgetError:
        size, seconds = problem.num_examples * pace.row_bytes, pace.scalars * pace.gradient
        yield Stage("features and errors", 0, seconds, size, limit, limit / pace.row_bytes)
        return
    if job == "regions":
        yield from of_regions(pace, of, num_groups)
    elif job == "compare":
        yield from of_comparison(pace)
    else:
        yield from of_layers(pace)
        if kronecker:
            yield from of_factors(pace, kronecker)


# -- words


def _range(typical: float, most: float, worded: Callable[[float], str]) -> str:
    """A typical number, and at most which."""
    low, high = worded(typical), worded(most)
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 2 * MINUTE:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / MINUTE:.0f} minutes" if seconds < 120 * MINUTE else f"{seconds / 3600:.0f} hours"


def size_of(num_bytes: float) -> str:
    """Bytes in MB or GB."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
