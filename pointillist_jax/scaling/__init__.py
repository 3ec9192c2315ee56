"""What a training step costs on many devices, before it runs there (`experiments.scaling_study`)."""
