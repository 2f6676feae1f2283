"""What `deepspectra` starts: it says how threads wait before PyTorch is loaded, which asks once."""

import os


def main() -> None:
    """Run the command line with threads that sleep while they wait for each other.

    By default they spin, which on cores that other programs use takes the time from the thread they wait for:
    products of a small network take several times as long. What is set already stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from deepspectra.cli import main as run  # noqa: PLC0415  (loads PyTorch)

    run()
