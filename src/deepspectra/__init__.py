"""deepspectra splits the spectrum of a deep network into the parts that cause it."""

from deepspectra.algorithms.density import density
from deepspectra.algorithms.eigenpairs import eigenpairs
from deepspectra.algorithms.estimates import diagonal, frobenius_norm, trace
from deepspectra.algorithms.overlap import overlap
from deepspectra.analysis.attribute import attribute
from deepspectra.analysis.class_groups import class_groups
from deepspectra.analysis.class_means import class_means
from deepspectra.analysis.clustering import clustering
from deepspectra.analysis.collapse import collapse
from deepspectra.analysis.compare import compare
from deepspectra.analysis.dissect import dissect
from deepspectra.analysis.gram_spectrum import gram_spectrum
from deepspectra.analysis.kronecker_quality import kronecker_quality
from deepspectra.analysis.layers import layers
from deepspectra.analysis.principal_subspace import principal_subspace
from deepspectra.analysis.regions import regions
from deepspectra.analysis.tail import tail
from deepspectra.analysis.three_level_map import three_level_map
from deepspectra.analysis.weights import weights
from deepspectra.certificates.binomial_bounds import kl_inverse
from deepspectra.certificates.certify import certify
from deepspectra.certificates.priors import Prior
from deepspectra.jobs.analyze import Analysis, analyze, load, save_series
from deepspectra.jobs.estimate import Plan, estimate
from deepspectra.jobs.executors import RayExecutor
from deepspectra.jobs.sweep import sweep
from deepspectra.jobs.sweep_store import gather
from deepspectra.jobs.sweep_zoo import ZooCell
from deepspectra.kfac.kronecker import kronecker
from deepspectra.kfac.operators import Kronecker
from deepspectra.operators.base import Identity
from deepspectra.operators.curvature import EmpiricalFisher, GaussNewton, Hessian, Residual
from deepspectra.operators.parts import decompose
from deepspectra.problem.problem import Problem
from deepspectra.problem.shared_problems import sharded
from deepspectra.results import versions as _versions

__version__ = _versions()["deepspectra"]

__all__ = [
    "Analysis",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Kronecker",
    "Plan",
    "Prior",
    "Problem",
    "RayExecutor",
    "Residual",
    "ZooCell",
    "analyze",
    "attribute",
    "certify",
    "class_groups",
    "class_means",
    "clustering",
    "collapse",
    "compare",
    "decompose",
    "density",
    "diagonal",
    "dissect",
    "eigenpairs",
    "estimate",
    "frobenius_norm",
    "gather",
    "gram_spectrum",
    "kl_inverse",
    "kronecker",
    "kronecker_quality",
    "layers",
    "load",
    "overlap",
    "principal_subspace",
    "regions",
    "save_series",
    "sharded",
    "sweep",
    "tail",
    "three_level_map",
    "trace",
    "weights",
]
