"""The teacher side: score with any model, average, look into the scores, and write them out as texts."""
