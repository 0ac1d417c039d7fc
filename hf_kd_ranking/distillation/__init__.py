"""From a collection to the best ranker within a latency budget: the other parts in order, stage by stage."""
