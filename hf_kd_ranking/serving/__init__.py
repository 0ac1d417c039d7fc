"""The API server: engine, endpoints, page, and a folder for Docker or a Hugging Face Space."""
