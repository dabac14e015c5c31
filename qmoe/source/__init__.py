"""Files of published checkpoints <-> lazily read tensors. Knows nothing about models, experts or
quantizers of ours.

Everything here is read-only and lazy: opening costs the headers, reading costs the bytes asked for.
"""
