"""The compressed directory: written whole or not at all, read without trust.

writer          the directory, block by block; resumes, locks, publishes
block           one durable block
manifest        ``qmoe_manifest.json``: sealed, verified
claims          whether what a manifest says can be true
reader          an opened directory
stored_experts  the encoded form of an experts module
stored_dense    the encoded form of a dense matrix
inspect         sizes, bits and coverage
coverage        bits and tokens of single experts
"""
