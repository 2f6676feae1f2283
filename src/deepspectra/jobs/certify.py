"""The command `certify`: from its options to a certificate, kept as it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspectra import zoo
from deepspectra.argument_checks import LayerProgress, check_choice
from deepspectra.certificates.certify import Certificate, certify
from deepspectra.certificates.priors import KINDS
from deepspectra.errors import TargetError
from deepspectra.jobs.certify_dataset import identity
from deepspectra.jobs.command_targets import Choice, load_function
from deepspectra.problem.finished_stages import FinishedStages
from deepspectra.problem.problem import Problem


def named_priors(words: str) -> list[str]:
    """Priors of --prior, with commas.

    Raises:
        OptionError: there is no such prior.
    """
    names = [name.strip() for name in words.split(",")]
    for name in names:
        check_choice("--prior", name, KINDS)
    return names


def certified(
    problem: Problem,
    priors: Sequence[str],
    test: tuple[Tensor, Tensor] | None,
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: LayerProgress | None = None,
) -> Certificate:
    """`certify`, kept in a folder as it is made.

    Raises:
        OptionError: there is no such setting.
        CertificateError: see `certify`.
        FileError: the folder holds unfinished work of another certificate.
    """
    store = None if folder is None else FinishedStages(folder, identity(problem, priors, settings, seed))
    return certify(problem, priors, test=test, seed=seed, progress=progress, store=store, **settings)


def unseen(target: str | None, test: str | None, chosen: Choice) -> tuple[Tensor, Tensor] | None:
    """Test data: what a function of the user's returns, or the test split of the zoo's data."""
    if test is not None:
        found = load_function(test, "that takes nothing and returns tensors (x, y)")()
        if not isinstance(found, tuple) or len(found) != 2:
            raise TargetError(f"--test {test!r} returned {type(found).__name__}; expected tensors (x, y).")
        return found
    if target is not None:
        return None
    model, data = chosen.model or "mlp", chosen.data or "digits"
    loaded = zoo.load(data, root=chosen.data_root, split="test", size=zoo.paper_side(model, data))
    return loaded.inputs, loaded.targets
