"""The built-in small world: a tiny CLIP, and videos to fine-tune and test it on, all made on this machine."""
