"""The command `megatransformer export-program`; see --help."""

from megatransformer_jax.cli.commands import main

if __name__ == "__main__":
    main("export-program")
