"""The exception for bad input. It stands here because the files of `models` run without the rest of the package."""


class InputError(ValueError):
    """Bad input: a file, a value or an option that the package cannot use; the message says which, and what to do.

    Example:
        >>> try:
        ...     kd.read_run("bm25.trec", k=0)
        ... except kd.InputError as error:
        ...     print(error)
        k is the number of documents to keep of every query, at least 1; got 0.
    """
