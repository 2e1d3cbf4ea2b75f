"""The folder of a run: its files, its journal, and where results come from."""
