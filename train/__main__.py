"""`python -m train`, for torchrun; use PYTHONSAFEPATH=1 so that a train.py in the current folder is not run instead."""

from train.cli import main

main()
