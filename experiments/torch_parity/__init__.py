"""What `experiments.compare_torch` compares, part by part: the JAX models against experiments/torch_reference."""
