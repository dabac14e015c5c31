"""Integers <-> words: small-integer matrices near their entropy, decodable inside a kernel.

`encode_group` writes a group header and one blob per matrix; `parse_tables` and `parse_matrix`
validate them; `decode_codes`, `decode_dense`, `matvec`, `matvec_pairs` and `matmul_few` use them.
Knows nothing about experts, models or files. The bits: docs/format-codec.md.

format/   what both directions share
encoder/  integers -> words
decoder/  words -> integers, weights or products
"""

from qmoe.codec.decoder.decode import decode_codes, decode_dense, decodes_inside, matvec
from qmoe.codec.decoder.integers import Integers
from qmoe.codec.decoder.matmul import FEW, matmul_few
from qmoe.codec.decoder.matrix import ParsedMatrix, parse_matrix
from qmoe.codec.decoder.matvec import matvec_pairs
from qmoe.codec.encoder.encode import EncodedGroup, encode_group
from qmoe.codec.encoder.ideal import class_entropy_bits, ideal_bits
from qmoe.codec.format.tables import Tables, parse_tables

__all__ = [
    "FEW",
    "EncodedGroup",
    "Integers",
    "ParsedMatrix",
    "Tables",
    "class_entropy_bits",
    "decode_codes",
    "decode_dense",
    "decodes_inside",
    "encode_group",
    "ideal_bits",
    "matmul_few",
    "matvec",
    "matvec_pairs",
    "parse_matrix",
    "parse_tables",
]
