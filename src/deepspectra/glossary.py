"""The terms of verdicts, tables and captions, explained once for the terminal and for the page."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """A term, what it means, and the words that stand for it in sentences."""

    name: str
    meaning: str
    words: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """Its place on a page."""
        return "term-" + "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())


GLOSSARY = (
    Term(
        "Hessian H, Gauss-Newton G, residual R",
        "H holds the second derivatives of the training loss by the parameters. H = G + R: G is what the "
        "curvature of the loss at the outputs contributes (for softmax cross-entropy also the Fisher "
        "matrix of the model), R is what the curvature of the network contributes.",
    ),
    Term(
        "bulk",
        "The mass of eigenvalues that lie close together, usually near zero. The bulk edge is where it "
        "ends: the largest eigenvalue without any class or cross-class mean.",
        ("bulk's edge", "bulk edge"),
    ),
    Term(
        "outlier",
        "An eigenvalue that stands clear of the bulk: above the outlier threshold, a stated multiple of "
        "the bulk edge.",
        ("outliers", "outlier"),
    ),
    Term(
        "bump",
        "A smaller, separate mass of eigenvalues beside the bulk, on a logarithmic axis.",
        ("bump",),
    ),
    Term(
        "class mean",
        "The weighted average, over the examples of one true class and over all wrong labels, of the "
        "gradient an example would give under that label.",
        ("class means", "class mean"),
    ),
    Term(
        "cross-class mean",
        "The same average for one true class and one wrong label: C(C − 1) of them for C classes.",
        ("cross-class means",),
    ),
    Term(
        "logit effect",
        "What the label alone contributes: mean gradients under one label (one logit, or output) over all "
        "true classes, beyond the class means.",
        ("logit means", "logit"),
    ),
    Term(
        "interaction",
        "What remains of the cross-class means once class and logit effects are taken out: the part "
        "specific to a pair of classes.",
        ("interaction",),
    ),
    Term(
        "within",
        "The scatter of single examples around their cross-class mean.",
        ("within",),
    ),
    Term(
        "true",
        "The means of the gradients under the true labels; small once the network fits its data.",
    ),
    Term(
        "share",
        "For an eigenpair (λ, u) and a part B, uᵀBu / λ. The shares of one eigenvalue sum to 1; a share "
        "of R can be negative.",
        ("shares",),
    ),
    Term(
        "knock-out",
        "Removing a part to see which eigenvalues go with it: by subtraction (A − B), or by projection "
        "(removing the directions that B spans from A).",
        ("Knocking out", "knock-outs", "knock-out", "by projection", "by subtraction"),
    ),
    Term(
        "deflation",
        "Taking known eigenpairs out of an operator, so that the rest of its spectrum can be seen.",
    ),
    Term(
        "probe",
        "A random start vector of the density estimate. Several probes give its standard error.",
        ("probes",),
    ),
    Term(
        "node, weight",
        "The density estimate itself: the fraction weight of the eigenvalues lies near the eigenvalue "
        "node. The smooth curves are views of nodes and weights.",
    ),
    Term(
        "overlap",
        "How much of one subspace lies in another, from 0 to 1: the mean squared cosine of their "
        "principal angles. Two random subspaces overlap by about their dimension divided by the number of "
        "parameters.",
        ("overlap",),
    ),
    Term(
        "residual norm",
        "‖Av − λv‖, measured for each eigenpair: an eigenvalue of A lies at most this far from λ.",
        ("residual norm",),
    ),
    Term(
        "gradient, as a unit of cost",
        "The time of one gradient of the loss over all examples of this analysis.",
        ("gradients",),
    ),
)


def terms_in(text: str) -> list[Term]:
    """The terms whose words stand in a text."""
    return [term for term in GLOSSARY if any(word in text for word in term.words)]
