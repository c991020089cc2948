"""Errors that a user can act on: the command line prints them as one line and exits with 1."""


class UserError(Exception):
    """Something the user can put right; the message says what was wrong and what to do."""


class NotMeasurable(UserError):
    """A measurement that has no meaning for a model, such as one that needs two layers for a model of one."""
