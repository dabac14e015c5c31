"""What is done with a finished checkpoint.

verify  sound to the last bit and symbol?
export  back to a plain checkpoint
push    to the hub
card    the model card
"""
