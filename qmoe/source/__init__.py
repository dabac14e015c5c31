"""Any published checkpoint, local or on the hub, as dense tensors that are read when asked for.
Read-only; opening costs the headers, reading the bytes asked for.

checkpoint  `open_checkpoint`: dense tensors by name
stored      tensors as the files hold them, checked with the index
shards      one weight file
hub         files that are downloaded when first read
index       which files hold weights and configuration
selection   parts of tensors
foreign     checkpoints that look like transformers' and are not
formats/    low-precision formats -> dense tensors
"""
