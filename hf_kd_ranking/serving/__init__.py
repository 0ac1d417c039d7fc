"""A page for searching: the search of a query, the application, and a folder for a Hugging Face Space."""
