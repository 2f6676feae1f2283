"""The three-level hierarchy as a map: class means and cross-class means of gradients, placed by their distances."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspectra.algorithms.long_vectors import inner_products
from deepspectra.analysis.class_means import ClassMeans
from deepspectra.errors import OptionError
from deepspectra.results import Result
from deepspectra.rows.averages import positive

MOST_MEANS = 2500  # cross-class means that are placed
FEWEST_MEANS = 4
EXACT_POINTS = 500  # up to which all pairs are as fast as approximations
ITERATIONS = 1000  # of the descent, at most


@dataclass(frozen=True, repr=False)
class ThreeLevelMap(Result):
    """Places in the plane for the means δ_c and δ_{c,k}; only who is near whom has a meaning.

    Attributes:
        classes: (C, 2) places of δ_c; NaN for an absent class.
        cross_classes: (C, C, 2) places of δ_{c,k}; NaN where there is none.
    """

    classes: Tensor
    cross_classes: Tensor

    def __str__(self) -> str:
        count = int(self.cross_classes[..., 0].isfinite().sum())
        return f"places of {len(self.classes)} class means and {count} cross-class means, {self.seconds:.3g} s"


def three_level_map(means: ClassMeans, seed: int = 0) -> ThreeLevelMap:
    """Place class means and cross-class means in the plane by t-SNE of their distances, perplexity C.

    The means are those of √p_{i,k} g_{i,k} up to weights within a cell: δ_{c,k} = √(w_{c,k} / Σ_l w_{c,l}) g_{c,k}
    and δ_c, the average of δ_{c,k} over k ≠ c. Early in training the δ_{c,k} cluster by k, later by c.

    Args:
        means: of gradients or errors, of the whole network or of a layer, with their cross-class means.
        seed: of t-SNE's start.

    Raises:
        OptionError: no means, no cross-class means, fewer than 4 of them, or more than 2,500.

    Cost: inner products of C² means, and t-SNE of C² + C points: about a second for 10 classes.

    Source: Papyan 2019, arXiv 1901.08244, section 4, figures 3 to 5. Departure: the weighted form.
    """
    if not isinstance(means, ClassMeans):
        raise OptionError(f"means is {type(means).__name__}; expected those of class_means(problem, of='gradients').")
    if means.cross_class_means is None or means.cross_class_weights is None:
        raise OptionError(
            "the map is of cross-class means; pass class_means(problem, of='gradients') or of='errors'."
        )
    began = time.perf_counter()
    cells = means.cross_class_weights.cpu()
    flat = means.cross_class_means.flatten(0, 1)
    gram = inner_products(flat, flat)
    root = cells.flatten().sqrt()
    classes, crossed = place(root[:, None] * gram * root, cells, seed)
    return ThreeLevelMap(classes, crossed, seconds=time.perf_counter() - began, provenance=means.provenance)


def drawable(cells: Tensor) -> bool:
    """Whether there are as many cross-class means as a map takes."""
    return FEWEST_MEANS <= int((cells > 0).sum()) <= MOST_MEANS


def place(gram: Tensor, cells: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Places (C, 2) and (C, C, 2) from inner products (C², C²) of √w_{c,k} g_{c,k}.

    Raises:
        OptionError: fewer than 4 means, or more than 2,500.
    """
    from sklearn.manifold import TSNE  # noqa: PLC0415  (scikit-learn's import takes a while)

    size, cells = len(cells), cells.cpu()
    present = cells > 0
    if not drawable(cells):
        raise OptionError(
            f"{int(present.sum()):,} cross-class means: a map takes {FEWEST_MEANS} to {MOST_MEANS:,} of them."
        )
    share = positive(cells.sum(1)).rsqrt().repeat_interleave(size)
    scaled = share[:, None] * gram.cpu().double() * share
    off = (present & ~torch.eye(size, dtype=torch.bool)).double()
    mixing = torch.zeros(size, size, size, dtype=torch.float64)
    mixing[range(size), range(size)] = off / positive(off.sum(1))[:, None]
    rows = torch.cat([mixing.flatten(1), torch.eye(size * size, dtype=torch.float64)])
    there = torch.cat([off.any(1), present.flatten()])
    rows = rows[there]
    inner = rows @ scaled @ rows.T
    squares = inner.diagonal()
    distances = (squares[:, None] + squares - 2 * inner).clamp_min(0).fill_diagonal_(0).sqrt()
    tsne = TSNE(
        metric="precomputed",
        method="exact" if len(rows) <= EXACT_POINTS else "barnes_hut",
        init="random",
        perplexity=min(size, (len(rows) - 1) / 3),
        max_iter=ITERATIONS,
        random_state=seed % 2**32,  # of scikit-learn, whose seeds are shorter
    )
    largest = float(distances.max()) or 1.0
    places = torch.full((len(there), 2), torch.nan, dtype=torch.float64)
    places[there] = torch.from_numpy(tsne.fit_transform((distances / largest).numpy())).double()
    return places[:size], places[size:].view(size, size, 2)
