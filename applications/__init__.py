"""Applications built on `interpolate`."""
