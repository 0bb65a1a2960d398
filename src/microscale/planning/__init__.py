"""Questions about a model or a file."""
