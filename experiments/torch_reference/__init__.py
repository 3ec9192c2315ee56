"""The same models in PyTorch, written from the paper and the design: the measuring rod of numerics and of speed.

Nothing here imports JAX or `pointillist_jax`: configs are any objects with the fields of `pointillist_jax.configs`
(`settings.py`), weights go over as named arrays (`layers.load_arrays`, `pointillist_jax.convert`), and parameters have
the names of the JAX side. Everything runs in float32, bf16 (float32 parameters) and float64. Needs torch
(`pip install -e '.[test]'`). tests/parity compares every module with its twin.

Beyond the paper it has what the shipped weights use: one step per point (`point_step.py`, `decode.PointDecoder`), the
loss of marginals (`condition.Marginals`) and the portrait's colours (`gaussian_decoder.Copy`). Tokens in the space of
the mean head (`data.space=template`) need nothing here: models see tokens and points whatever head they lie on, and
between the two heads points are placed before and after them (`pointillist_jax.data.template_space`, NumPy).
"""
