"""What the machine gives. Knows no model.

files        durable files and directories, locks, checksums
tensors      the reader and the writer of the safetensors layout
spill        tensors whose size is known at the end, on the way into such files
processes    several processes that work on one run
machine      devices
heap         peak memory; free memory back to the system
hub          names on the hub, and its failures
text         sizes and tables for people
loops_cache  where numba keeps compiled loops
imports      acting when a module has been imported
"""
