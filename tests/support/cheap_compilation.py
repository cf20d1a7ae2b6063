"""XLA's flags for runs in processes of their own, which compile much and compute little."""

# As in tests/conftest.py: the cheapest machine code is three times as fast to make.
CHEAP_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
