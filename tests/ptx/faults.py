"""What a GPU must not be asked for."""


class Fault(Exception):
    """An access or a synchronization that is wrong on a GPU, in one sentence."""
