"""Checkpoints of training projects -> directories that transformers loads.

``IMPORTERS[kind](source, destination)`` writes config, weights and, where the source has one, the
tokenizer, in the source's dtypes and without holding more than one expert's matrices in memory.

openmoe, fairseq, megablocks  one project each
gpt2_bpe                      fairseq's tokenizer
pickles                       torch pickles, without running code
writing                       the directory, checked against the model to load it
report                        what `qmoe import` says
"""

from collections.abc import Callable
from pathlib import Path

from qmoe.models.importers.fairseq import import_fairseq
from qmoe.models.importers.megablocks import import_megablocks
from qmoe.models.importers.openmoe import import_openmoe
from qmoe.models.importers.writing import Imported

IMPORTERS: dict[str, Callable[[str | Path, str | Path], Imported]] = {
    "openmoe": import_openmoe,
    "fairseq": import_fairseq,
    "megablocks": import_megablocks,
}
