"""What both directions of the codec share.

geometry  how a matrix is cut into streams
classes   classes of rows and columns
symbols   what a code word does
huffman   canonical codes
tables    the header of a group
sidedata  classes, scales and lengths of runs
bits      bit strings
arrays    names of array types
"""
