"""Integers -> words.

encode        a group of matrices -> header and blobs
contexts      classes, non-zeros by stream, statistics by context
table_choice  which contexts share a table, and of which kind
loops         compiled loops
ideal         what the integers should cost
"""
