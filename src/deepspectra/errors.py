"""The error tree: what was given, what was expected, what to do.

Every error is a `DeepSpectraError` and also the built-in exception a caller would expect, so that
``except ValueError`` keeps working. Every warning is a `DeepSpectraWarning`.
"""

from collections.abc import Iterable


class DeepSpectraError(Exception):
    """Base of every error this library raises on purpose."""


class ShapeError(DeepSpectraError, ValueError):
    """A tensor has the wrong shape."""


class DataError(DeepSpectraError, ValueError):
    """The data cannot be used: empty, ragged beyond repair, labels out of range, values not finite."""


class NonFiniteError(DeepSpectraError, ArithmeticError):
    """A weight, an output, the loss or a product is NaN or infinite."""


class NondeterminismError(DeepSpectraError, RuntimeError):
    """Two evaluations of the same thing differ, so the operator is not one operator."""


class ParameterError(DeepSpectraError, ValueError):
    """A parameter selection matches nothing, or selects what has no gradient."""


class LossError(DeepSpectraError, ValueError):
    """The loss is unknown, is not a mean over examples, or does not fit the requested analysis."""


class CurvatureError(DeepSpectraError, RuntimeError):
    """Second derivatives are missing or wrong for this network."""


class MemoryBudgetError(DeepSpectraError, MemoryError):
    """The request does not fit the memory budget; the message says what to lower."""


class OptionError(DeepSpectraError, ValueError):
    """An option has a value outside its range."""


class CertificateError(DeepSpectraError, ValueError):
    """A network, loss or data of which nothing can be certified in this way."""


class MissingNameError(DeepSpectraError, KeyError):
    """A name that is asked for, such as a layer's, is not among those there are."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        super().__init__(kind, name, tuple(known))

    def __str__(self) -> str:
        kind, name, known = self.args
        return f"no {kind} {name!r}; there are {', '.join(known)}."


class FileError(DeepSpectraError, OSError):
    """A result file, checkpoint or data file is missing, truncated or of another format."""


class WorkerError(DeepSpectraError, RuntimeError):
    """What runs the cells of a sweep has stopped taking them."""


class ProcessError(DeepSpectraError, RuntimeError):
    """Another process of those that share the work ended, failed or did not answer."""


class TargetError(DeepSpectraError, ImportError):
    """A command-line target cannot be imported or does not return a `Problem`."""


class DeepSpectraWarning(UserWarning):
    """Base of every warning this library gives."""


class ConvergenceWarning(DeepSpectraWarning, RuntimeWarning):
    """A result did not reach its tolerance; its error is in the result."""


class OptionWarning(DeepSpectraWarning):
    """An option was given that changes nothing here."""


class FallbackWarning(DeepSpectraWarning, RuntimeWarning):
    """Something given could not be used as it stands and a stated substitute was."""


class DependenceWarning(DeepSpectraWarning):
    """Examples are not independent, and what is concluded from their number does not hold."""


class SweepWarning(DeepSpectraWarning):
    """Cells of a sweep failed; their errors are in the result."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
