"""Cards, publishing and export; results and arguments reach it as plain dicts."""
