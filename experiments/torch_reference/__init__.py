"""The same models in PyTorch, written from the paper and the design: the measuring rod of numerics and of speed.

Nothing here imports the JAX models; weights go over as named NumPy arrays. Needs torch (`pip install -e '.[test]'`).
"""
