"""One absl script per job: `python -m experiments.<name>` from the repository's root (DESIGN §12)."""
