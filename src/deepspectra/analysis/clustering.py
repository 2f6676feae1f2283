"""How gradients of single examples cluster: by logit, by class, or by both."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.argument_checks import check_count, seeded
from deepspectra.dataframes import text_table
from deepspectra.problem.example_subsets import problem_of_rows
from deepspectra.problem.problem import Problem
from deepspectra.results import Result, origin
from deepspectra.rows.captures import Captures
from deepspectra.rows.example_sampling import systematic
from deepspectra.rows.features_and_errors import counted
from deepspectra.rows.gradients import GradientRows
from deepspectra.rows.held_rows import HeldRows, gram_of, refuse_beyond_memory

PIECES = 16  # of the examples, a piece at a time
GROUPS = ("both", "logit", "class", "neither")


@dataclass(frozen=True, repr=False)
class Clustering(Result):
    """Mean cosines between gradients of different examples, by what the two share.

    Attributes:
        groups: "both" the logit k and the true class c, the "logit" alone, the "class" alone, or "neither".
        logits: (4,) of logit gradients ∇z_k(x_i).
        logits_standard_error: (4,) by the jackknife over examples.
        gradients: (4,) of g_{i,k} = J_iᵀ(p_i − y_k), k ≠ c(i).
        gradients_standard_error: (4,).
        num_examples: compared with each other.
    """

    logits: Tensor
    logits_standard_error: Tensor
    gradients: Tensor
    gradients_standard_error: Tensor
    num_examples: int
    groups: tuple[str, ...] = GROUPS

    def __str__(self) -> str:
        columns = (self.logits, self.logits_standard_error, self.gradients, self.gradients_standard_error)
        rows = zip(self.groups, *(column.tolist() for column in columns), strict=True)
        note = f"mean cosines among {self.num_examples} examples, {self.seconds:.3g} s"
        return text_table(("the same", "∇z_k", "±", "g_{i,k}", "±"), rows, note)


def clustering(problem: Problem, *, num_examples: int = 200, seed: int = 0) -> Clustering:
    """Whether gradients of single examples cluster by logit, by class or by both.

    Early in training they cluster by the logit k, later also by the true class c. Cosines are averaged over all
    pairs of different examples among those drawn, the same number of each class as far as the data allow.

    Args:
        problem: one with cross-entropy and class labels.
        num_examples: to compare; all if there are fewer.
        seed: of the draw.

    Raises:
        OptionError: num_examples below 2, or data that cannot be drawn from.
        LossError: the loss is not the cross-entropy of class labels.
        CurvatureError: features and errors cannot be told apart by example.
        MemoryBudgetError: num_examples · C gradients' inner products, or one layer's features, do not fit.

    Cost: on the examples drawn C backward passes without weight gradients, and inner products of
    num_examples · C gradients.

    Source: Fort and Ganguli 2019, arXiv 1910.05929, section 3 (the cosines q_SLSC, q_SL and q_DL of logit
    gradients); Papyan 2019, arXiv 1901.08244, section 4, for g.
    """
    began = time.perf_counter()
    check_count("num_examples", num_examples, smallest=2)
    if problem.num_examples > num_examples:
        problem = _drawn(problem, num_examples, seed)
    rows = HeldRows(problem)
    size = rows.weights.shape[1]
    gram = _gram_of_logits(problem, rows.weights.numel())
    live = (counted(rows) > 0).nonzero()[:, 0].to(gram.device)
    num = len(rows.labels)
    inner = gram.view(num, size, num, size)
    p, labels = rows.probabilities[live].to(inner), rows.labels[live]
    identity = torch.eye(size).to(inner).expand(len(live), -1, -1)
    every = torch.ones_like(p, dtype=torch.bool)
    other = torch.arange(size, device=labels.device) != labels[:, None]
    logits, logits_error = _mean_cosines(inner, live, identity, every, labels)
    mixing = p[:, None, :] - identity  # g_i = mixing_i J_i
    gradients, gradients_error = _mean_cosines(inner, live, mixing, other, labels)
    return Clustering(
        logits=logits,
        logits_standard_error=logits_error,
        gradients=gradients,
        gradients_standard_error=gradients_error,
        num_examples=len(live),
        **origin(began, problem, seed=seed),
    )


def _gram_of_logits(problem: Problem, num_rows: int) -> Tensor:
    """Inner products (N C, N C) of the gradients ∇z_k(x_i)."""

    def weigh(outputs: Tensor, _: Tensor) -> Tensor:
        return torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)

    refuse_beyond_memory(num_rows, problem)
    return gram_of((uses for _, uses in Captures(problem, weigh).by_layer()), problem.batches.group)


def _drawn(problem: Problem, num_examples: int, seed: int) -> Problem:
    """Examples drawn evenly, class by class."""
    rows = GradientRows(problem)
    weight = counted(rows)
    per_class = weight.new_zeros(rows.weights.shape[1]).index_add_(0, rows.labels, weight)
    chance = weight / per_class.clamp_min(1)[rows.labels] * num_examples / int((per_class > 0).sum())
    order = rows.labels.argsort(stable=True).cpu()
    generator = seeded(seed)
    chosen = order[systematic(chance.cpu().clamp_max(1)[order], generator)].sort().values
    return problem_of_rows(problem, chosen, len(rows.labels))


def _mean_cosines(
    inner: Tensor, live: Tensor, mixing: Tensor, valid: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Means over pairs of different examples in each group, (4,), and their standard errors.

    A few examples at a time, beside all, so that no second array is as large as the inner products.

    Args:
        inner: (N, C, N, C) inner products of gradients of logits.
        live: (n,) which examples count.
        mixing: (n, C, C) the rows that are compared, as combinations of these gradients.
        valid: (n, C) which of them count.
        labels: (n,).
    """
    own = torch.stack([inner[i, :, i, :] for i in live.tolist()])
    norms = torch.einsum("ika,iab,ikb->ik", mixing, own, mixing).clamp_min(0).sqrt()
    scale = (1 / norms.where(norms > 0, math.inf)) * valid
    units, there = scale[:, :, None] * mixing, (scale > 0).to(inner)
    equal, unequal = inner.new_zeros(2, len(live), len(live)), inner.new_zeros(2, len(live), len(live))
    equal[1] = there @ there.T  # how many pairs of rows
    unequal[1] = torch.outer(there.sum(1), there.sum(1)) - equal[1]
    for some in torch.arange(len(live), device=live.device).chunk(PIECES):
        halves = torch.einsum("ika,iajb->ikjb", units[some], inner[live[some]][:, :, live])
        cosines = torch.einsum("ikjb,jlb->ikjl", halves, units)
        equal[0, some] = torch.einsum("ikjk->ij", cosines)
        unequal[0, some] = cosines.sum((1, 3)) - equal[0, some]
    same = labels[:, None] == labels
    pair = ~torch.eye(len(labels), dtype=torch.bool, device=inner.device)
    groups = (equal, same & pair), (equal, ~same), (unequal, same & pair), (unequal, ~same)  # as `GROUPS`
    found = torch.tensor([_jackknife(*(some * classes)) for some, classes in groups], dtype=torch.float64)
    return found[:, 0], found[:, 1]


def _jackknife(total: Tensor, count: Tensor) -> tuple[float, float]:
    """Σ total / Σ count over pairs (n, n) of examples, and its standard error, leaving out one example at a time."""
    num = len(total)
    without = total.sum() - total.sum(0) - total.sum(1), count.sum() - count.sum(0) - count.sum(1)
    left = without[0] / without[1]
    mean = float(total.sum() / count.sum())
    return mean, float(((num - 1) / num * (left - left.mean()).square().sum()).sqrt())
