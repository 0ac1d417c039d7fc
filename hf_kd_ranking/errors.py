"""Exceptions for bad input. The command line prints them as one line and ends with status 2."""

from .models.errors import InputError as InputError


class UnknownIdError(InputError, KeyError):
    """An id that is in one input and not in another."""

    __str__ = ValueError.__str__  # that of a KeyError is in quotes
