"""The command `megatransformer find-lr`; see --help."""

from megatransformer_jax.cli.commands import main

if __name__ == "__main__":
    main("find-lr")
