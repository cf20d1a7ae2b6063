"""Depth-recurrent transformers in JAX: a prelude, a core that is iterated, a coda."""

__version__ = "0.1.0"
