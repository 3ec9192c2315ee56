"""How the open head is derived from MakeHuman's CC0 data (facts/open_head.md); run by `experiments.build_open_head`."""
