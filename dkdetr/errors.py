"""Errors that a user can meet, each with the exit code the command line documents.

The cache package, which imports nothing of this one, keeps its own in `cache.spec`; they carry
`exit_code` in the same way, and the command line asks only for that attribute.
"""


class DkdetrError(ValueError):
    """An error whose message is for the user: what happened, where, why it matters, what next."""

    exit_code = 1


class UsageError(DkdetrError):
    """The command cannot mean anything: unknown split or setting, missing extra."""

    exit_code = 2


class DataError(DkdetrError):
    """A data set is missing, malformed, or would leak what must stay hidden."""

    exit_code = 3


class MismatchError(DkdetrError):
    """Two artefacts do not belong together: another teacher, vocabulary or configuration."""

    exit_code = 4


class CorruptArtefactError(DkdetrError):
    """A file of ours is not what its marker or its hash says."""

    exit_code = 5


class NonFiniteLossError(DkdetrError):
    """A loss or a gradient is not finite where no scaler explains it."""

    exit_code = 8


class PeerFailedError(DkdetrError):
    """Another rank has an error of its own and reports it; this one only ends with it."""

    exit_code = 8


class PeerLostError(DkdetrError):
    """Another rank died, or has not answered for `compute.rank_timeout_s`."""

    exit_code = 1


class PreemptedError(DkdetrError):
    """SIGTERM came; everything is saved and the same command goes on from here."""

    exit_code = 75
