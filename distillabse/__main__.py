"""`python -m distillabse` is the same as `distillabse`."""

from distillabse.cli import main

main()
