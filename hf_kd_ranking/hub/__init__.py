"""Cards and publishing; results and arguments reach it as plain dicts."""
