"""Number formats in which checkpoints are published -> dense tensors.

recognise  from a config's settings to the virtual tensors of a checkpoint
settings   where a checkpoint says how it is quantized
virtual    dense tensors that exist only while they are read
fp8, fp4, mxfp4, int4, awq  one format each
loops      compiled loops
"""
