"""The few kinds of error a user can meet; every message says what was got, what was expected, what to do."""


class ItemkitError(Exception):
    """Base of all errors that itemkit raises on purpose; the command line prints them without a trace."""


class InputError(ItemkitError, ValueError):
    """Something the user handed over (a file, a table, an option) is not usable as it is."""


class ModelNotFound(ItemkitError):
    """A model cannot be had: says what was asked for, where it was looked for and what to do."""


class StoreError(ItemkitError):
    """A feature store is incomplete, of another schema, locked, or not writable."""


class MissingExtra(ItemkitError, ImportError):
    """A feature needs an optional package; the message holds the exact install line."""
