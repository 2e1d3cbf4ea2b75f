"""Using a model: what a video shows, in whatever words one asks."""
