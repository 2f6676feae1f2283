"""Groups of classes that the network treats alike, for averages over thousands of classes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from deepspectra.argument_checks import check_count
from deepspectra.errors import FallbackWarning
from deepspectra.problem.example_subsets import evenly_spread
from deepspectra.problem.problem import Problem
from deepspectra.rows.gradients import labelled_loss

NUM_ROWS = 512  # on which logits are compared
LARGE = 2000  # classes, from which on fewer restarts of k-means are made


def class_groups(problem: Problem, num: int, *, num_rows: int = NUM_ROWS, seed: int = 0) -> Tensor:
    """The group of each class (C,), numbered from 0: classes whose logits rise and fall together.

    Each class is described by its logits on some rows, less their mean over classes and scaled to length one;
    k-means with `num` centres puts similar ones together. So every class has a group, whether examples of it are
    there or not. For `groups=` of `decompose`, `class_means` and `principal_subspace`.

    Args:
        problem: one with cross-entropy and class labels.
        num: how many groups, at most C; fewer, with a FallbackWarning, where the logits of classes coincide; and
            arbitrary ones of equal size, with such a warning, where those of all do, as of a head that starts at 0.
        num_rows: rows that logits are taken from, spread evenly over the data.
        seed: of k-means.

    Raises:
        OptionError: num or num_rows out of range.
        LossError: the loss is not the cross-entropy of class labels.

    Cost: a forward pass; k-means of C points in num_rows dimensions.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415  (scikit-learn's import takes a while)
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    loss = labelled_loss(problem)
    check_count("num", num, largest=problem.num_classes)
    check_count("num_rows", num_rows)
    kept = evenly_spread(problem.num_examples, num_rows)
    logits, seen = [], 0
    for every, targets in problem.row_batches():
        outputs = every[loss.weights(every, targets) > 0]  # not of rows that are ignored
        logits.append(outputs[kept[seen : seen + len(outputs)].to(outputs.device)].double().cpu())
        seen += len(outputs)
    points = torch.cat(logits)
    points = (points - points.mean(1, keepdim=True)).T
    points = points / points.norm(dim=1, keepdim=True).clamp_min(torch.finfo(points.dtype).tiny)
    restarts = 1 if problem.num_classes > LARGE else 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told below
        found = KMeans(num, n_init=restarts, random_state=seed).fit_predict(points.numpy())
    present, labels = torch.unique(torch.from_numpy(found).long(), return_inverse=True)
    if len(present) == 1 < num:
        warnings.warn(
            f"the logits of all classes coincide; their {num} groups are arbitrary, stretches of equal length.",
            FallbackWarning,
            stacklevel=2,
        )
        return torch.arange(problem.num_classes) * num // problem.num_classes
    if len(present) < num:
        warnings.warn(
            f"the logits of classes coincide, so that there are {len(present)} groups and not {num}.",
            FallbackWarning,
            stacklevel=2,
        )
    return torch.as_tensor(labels)
