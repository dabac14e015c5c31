"""Integers <-> words: small-integer matrices near their entropy, decodable inside a kernel.

`encode_group` writes a group header and one blob per matrix; `parse_tables` and `parse_matrix`
validate them; `decode_codes`, `decode_dense`, `linear`, `matvec`, `matvec_pairs` and `matmul_few`
use them. Knows nothing about experts, models or files. The bits: docs/format-codec.md.

format/   what both directions share
encoder/  integers -> words
decoder/  words -> integers, weights or products
"""

from qmoe.codec.decoder.decode import decode_codes, decode_dense, linear, matvec
from qmoe.codec.decoder.integers import Integers
from qmoe.codec.decoder.matmul import matmul_few
from qmoe.codec.decoder.matrix import ParsedMatrix, parse_matrix
from qmoe.codec.decoder.matvec import matvec_pairs
from qmoe.codec.decoder.vector_loops import FEW
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
    "encode_group",
    "ideal_bits",
    "linear",
    "matmul_few",
    "matvec",
    "matvec_pairs",
    "parse_matrix",
    "parse_tables",
]
