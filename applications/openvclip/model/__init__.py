"""The video encoder and the text classifier, on open_clip's models."""
