"""deepspectra splits the spectrum of a deep network into the parts that cause it."""

from deepspectra.algorithms.density import density
from deepspectra.algorithms.diagonal import diagonal
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.norm import frobenius_norm
from deepspectra.algorithms.subspace import overlap
from deepspectra.algorithms.trace import trace
from deepspectra.analysis.attribution import attribute
from deepspectra.analysis.gram import gram_spectrum
from deepspectra.analysis.layers import layers
from deepspectra.analysis.means import class_means, principal_subspace
from deepspectra.apps.analyze import Analysis, analyze, load
from deepspectra.operators.curvature import EmpiricalFisher, GaussNewton, Hessian, Residual
from deepspectra.operators.parts import decompose
from deepspectra.problem import Problem

__all__ = [
    "Analysis",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Problem",
    "Residual",
    "analyze",
    "attribute",
    "class_means",
    "decompose",
    "density",
    "diagonal",
    "eigenpairs",
    "frobenius_norm",
    "gram_spectrum",
    "layers",
    "load",
    "overlap",
    "principal_subspace",
    "trace",
]
