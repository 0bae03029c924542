"""Errors that a user can mend. The command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """Something the caller gave is wrong; the message says what to do about it, in one line."""


class BackendUnavailableError(UserError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message carries the reason."""
