"""From files of ids, texts and teacher scores to batches."""
