"""A page to search with rankers: what a query does, the application, a folder for a Hugging Face Space."""
