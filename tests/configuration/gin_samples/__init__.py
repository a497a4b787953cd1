"""Small configs and jobs of every shape that gin files may set."""
