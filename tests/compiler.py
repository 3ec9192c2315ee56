"""XLA's CPU compiler without LLVM's optimisations: what a short test would wait for longer than it runs."""

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
