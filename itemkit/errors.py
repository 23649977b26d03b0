"""The few kinds of error a user can meet; every message says what was got, what was expected, what to do."""


class ItemkitError(Exception):
    """Base of all errors that itemkit raises on purpose; the command line prints them without a trace."""


class InputError(ItemkitError, ValueError):
    """Something the user handed over (a file, a table, an option) is not usable as it is."""


class ModelNotFound(ItemkitError):
    """A model cannot be had; what is known of it stands in fields, so that nobody parses the message.

    Parameters
    ----------
    what : str
        What was asked for, e.g. ``captioner 'Salesforce/blip'``; or the whole message, if there is no more.
    reason : str
        What is wrong with it, as the rest of a sentence; that it is not here, by default.
    looked, remedy : str
        Where it was looked for, and what to do, in whole sentences. ``fact`` is the message without that.
    """

    def __init__(self, what: str, *, reason: str = "", looked: str = "", remedy: str = "") -> None:
        self.what, self.reason, self.looked, self.remedy = what, reason, looked, remedy
        self.fact = what
        if looked:
            self.fact += f" {reason or 'is not on this machine'} (looked in {looked})"
        elif reason:
            self.fact += f" {reason}"
        super().__init__(f"{self.fact.rstrip('. ')}. {remedy}" if remedy else self.fact)


class StoreError(ItemkitError):
    """A feature store is incomplete, of another schema, locked, or not writable."""


class MissingExtra(ItemkitError, ImportError):
    """A feature needs an optional package; the message holds the exact install line."""
