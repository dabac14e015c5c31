"""Integers -> words."""
