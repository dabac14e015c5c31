"""The compressed directory: written whole or not at all, read without trust."""
