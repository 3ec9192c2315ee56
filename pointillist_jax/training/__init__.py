"""The training runtime of both stages: state and step, the loop, checkpoints, metrics (DESIGN §10)."""
