"""The command `megatransformer prepare`; see --help."""

from megatransformer_jax.cli.commands import main

if __name__ == "__main__":
    main("prepare")
