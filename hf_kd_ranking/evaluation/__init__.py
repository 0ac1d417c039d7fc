"""How well a ranker ranks, and whether a difference is one."""
