"""`python -m nabla`: the `nabla` command."""

from nabla.cli import main

main()
