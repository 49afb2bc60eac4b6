"""How responses are scored."""
