"""What every exception of the library is, beside what else it is."""


class AudioLensError(Exception):
    """Anything the library raises under a name of its own.

    Each of them is also a built-in exception (`ValueError`, `KeyError` ...), by what went wrong.
    """
