"""`python -m qmoe` is the command `qmoe`, for torchrun."""

from qmoe.cli import main

main()
