"""What is raised here beside Python's own errors; both are `ValueError`s."""


class WeightMismatchError(ValueError):
    """Two sets of weights do not belong to the same architecture; the message lists the differences."""


class CheckpointError(ValueError):
    """A file is not a checkpoint, not a whole one, or not of a kind that is read here."""
