"""XLA's flags for tests, which compile much and compute little. Imports no JAX."""

import importlib.metadata

# The cheapest machine code is three times as fast to make.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jax").startswith("0.10."):
    # Takes another third of the time away; later versions have no such flag.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    # A program is cut into 32 parts for as many threads, and each part costs. The tests run in a
    # process per core already; in one part a program takes a fifth less. Not tried with others.
    _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
CHEAP_COMPILATION = " ".join(_FLAGS)
