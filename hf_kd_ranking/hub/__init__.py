"""Cards and publishing on the Hugging Face Hub; results and arguments arrive as plain dictionaries."""
