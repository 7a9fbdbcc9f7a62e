"""The exceptions a user may meet. Each message names the file, row or field at fault and what was expected there."""


class LongtrailError(Exception):
    """Base of every error that is the input's fault, not the program's: commands print it without a traceback and exit 1."""


class ConfigError(LongtrailError):
    """params.yaml holds a key or value that is not understood."""


class DatasetError(LongtrailError):
    """A source file is missing, altered, or not in the layout its reader expects."""


class QuarantineError(LongtrailError):
    """More rows of a log were rejected than `ingest.max_quarantined_share` allows."""


class ValidationError(LongtrailError):
    """A critical expectation failed, so the tables must not be used."""


class HistoryError(LongtrailError):
    """A history store is damaged, or was asked for a user or length it does not hold."""


class NothingNewError(HistoryError):
    """Nothing in the training period happened from the time on that training was to learn from."""


class ModelError(LongtrailError):
    """A model folder is damaged, or does not fit the data it is used with."""


class StateError(LongtrailError):
    """A stored user state is damaged, or was made by other weights than those that are to read it."""


class StorageError(LongtrailError):
    """A folder in an object store cannot be reached, is not whole, or is not what its manifest says."""


class EvaluationError(LongtrailError):
    """An evaluation was asked of data that cannot answer it."""
