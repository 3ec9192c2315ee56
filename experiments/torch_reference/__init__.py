"""The same models in PyTorch, written from the paper and the design: the measuring rod of numerics and of speed.

Nothing here imports JAX or `pointillist_jax`: configs are any objects with the fields of `pointillist_jax.configs`
(`settings.py`), weights go over as named arrays (`layers.load_arrays`, `pointillist_jax.convert`), and parameters have
the names of the JAX side. Everything runs in float32, bf16 (float32 parameters) and float64. Needs torch
(`pip install -e '.[test]'`). tests/parity compares every module with its twin.
"""
