"""Mistakes of the user, told in one line."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_LONGEST = 2000  # characters of an instruction: what a library says of a file may quote the file


def one_line(text: str) -> str:
    """``text`` on one line, each run of white space as one space; what would steer a terminal (control and format
    characters, also those that turn the direction of writing) as its escape sequence."""
    flat = " ".join(text.split())
    return flat if flat.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in flat)


def shorten(value: object) -> str:
    """`repr(value)` on one line of at most 120 characters."""
    try:
        text = one_line(_SHORT.repr(value))
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__} too long to be shown>"
    return _cut(text, 120)


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
        self.key = _cut(one_line(key), 120)
        self.value = value
        self.right = _cut(one_line(right), _LONGEST)
        super().__init__(f"{self.key}: {shorten(value)} is invalid: {self.right}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, object, str]]:
        # Exceptions cross process borders by pickle, which would otherwise call UserError(message).
        return UserError, (self.key, self.value, self.right)


def first_line(error: BaseException) -> str:
    """What a library's error says, without what it adds below; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
