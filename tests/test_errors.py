"""The error tree, and what an error says in one line."""

from __future__ import annotations

from deepspectra import errors

BUILTINS = {
    errors.ShapeError: ValueError,
    errors.DataError: ValueError,
    errors.NonFiniteError: ArithmeticError,
    errors.NondeterminismError: RuntimeError,
    errors.ParameterError: ValueError,
    errors.LossError: ValueError,
    errors.CurvatureError: RuntimeError,
    errors.MemoryBudgetError: MemoryError,
    errors.OptionError: ValueError,
    errors.MissingNameError: KeyError,
    errors.FileError: OSError,
    errors.CertificateError: ValueError,
    errors.WorkerError: RuntimeError,
    errors.ProcessError: RuntimeError,
    errors.TargetError: ImportError,
}


def test_every_error_is_also_the_builtin_a_caller_expects() -> None:
    tree = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.DeepSpectraError)}
    assert tree - {errors.DeepSpectraError} == set(BUILTINS)
    for kind, builtin in BUILTINS.items():
        assert issubclass(kind, builtin)
    assert issubclass(errors.FallbackWarning, errors.DeepSpectraWarning)
    assert issubclass(errors.DeepSpectraWarning, UserWarning)


def test_an_error_says_itself_in_one_line() -> None:
    assert errors.first_line(ValueError("no room\non the device")) == "no room"
    assert errors.first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
