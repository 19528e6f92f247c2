"""`python -m moextend_jax` is the command `moextend`."""

from moextend_jax.cli import main

main()
