"""`python -m deepspectra` is `deepspectra`."""

from deepspectra.cli import main

main()
