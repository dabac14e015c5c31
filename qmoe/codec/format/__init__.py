"""What both directions of the codec share: bits, codes, classes, side data, tables."""
