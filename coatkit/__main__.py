"""`python -m coatkit`, which launchers such as `accelerate launch -m coatkit` start."""

from coatkit.cli import main

main()
