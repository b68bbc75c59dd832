"""Mistakes of the user, told in one line."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shorten(value: object) -> str:
    """`repr(value)` on one line of at most 120 characters."""
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= 120 else text[:117] + "..."


class Failed(Exception):
    """The end of a run, on all processes, that no setting is to blame for: told in one line, exit code 1.

    Its ``__cause__``, where it has one, is this process's own error.
    """


class UserError(Exception):
    """Something that the user can put right: the command line prints it as one line and exits with status 2.

    Attributes:
        key: the full name of the setting (`optim.rank`), or of whatever else is at fault.
        value: the value that was given.
        right: what would be right, as an instruction ("give an integer of at least 1").
    """

    def __init__(self, key: str, value: object, right: str) -> None:
        self.key = " ".join(key.split())
        self.value = value
        self.right = " ".join(right.split())
        super().__init__(f"{self.key}: {shorten(value)} is not right: {self.right}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, object, str]]:
        # Exceptions cross process borders by pickle, which would otherwise call UserError(message).
        return UserError, (self.key, self.value, self.right)
