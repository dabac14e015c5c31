"""The exceptions that a user may meet. Each text says what is wrong, where, and what to do; values
are in the text.

Every one of them ends a command with its message on stderr and exit code 2.
"""


class QmoeError(Exception):
    """Base of all errors that are the input's fault, not the program's.

    Attributes:
        exit_code: of the command that it ends.
    """

    exit_code = 2


class SourceError(QmoeError):
    """A source checkpoint is missing, incomplete, inconsistent or of an unsupported kind."""


class UnsupportedModelError(SourceError):
    """A model type, layout or option that is not supported; nothing is guessed."""


class CalibrationError(QmoeError):
    """Calibration text that is too short or unusable, or non-finite activations."""


class NonFiniteError(QmoeError):
    """NaN or Inf in weights, activations or Hessians; the text names the tensor."""


class OutputError(QmoeError):
    """The output directory exists, is in use, or cannot be written."""


class CorruptError(QmoeError):
    """Compressed data that fails validation or a checksum; the text names file and tensor."""


class FormatVersionError(QmoeError):
    """A compressed checkpoint written in a format version that this release does not read."""


class CapacityError(QmoeError):
    """The run does not fit in the memory or disk it was given; the text has both numbers."""


class HubError(QmoeError):
    """The hub cannot be reached, refuses, or holds something else under the name."""


class LostProcessError(QmoeError):
    """Another process of a run on several processes ended or does not answer."""


class InterruptedRunError(QmoeError):
    """The user stopped a run that can be continued; the text says where it goes on."""

    exit_code = 130


def reason(error: BaseException) -> str:
    """What went wrong in one line of at most 200 characters: the type's name and the text's first
    line."""
    text = str(error).strip()
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0][:160]}" if text else name
