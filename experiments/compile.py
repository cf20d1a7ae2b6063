"""The command `megatransformer compile`; see --help."""

from megatransformer_jax.cli.commands import main

if __name__ == "__main__":
    main("compile")
