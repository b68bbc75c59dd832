"""Mistakes of the user, each shown on one line."""

import reprlib
from collections.abc import Iterable

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
    """The end of a run, on all ranks, that no setting is to blame for: shown on one line, exit code 1.

    Its ``__cause__``, where it has one, is this rank's own error.
    """


class UserError(Exception):
    """Something that the user can put right: the command line prints it as one line and exits with status 2.

    Attributes:
        key: the full name of the setting (`optim.rank`), or of whatever else is at fault.
        value: the value that was given.
        right: what would be right ("expected an integer of at least 1").
    """

    def __init__(self, key: str, value: object, right: str) -> None:
        self.key = _cut(one_line(key), 120)
        self.value = value
        self.right = _cut(one_line(right), _LONGEST)
        super().__init__(f"{self.key}: {shorten(value)} is invalid: {self.right}")

    @property
    def errors(self) -> "tuple[UserError, ...]":
        """This one; of `UserErrors` all."""
        return (self,)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Exceptions cross process borders by pickle, which would otherwise call UserError(message).
        return UserError, (self.key, self.value, self.right)

    def within(self, prefix: str) -> "UserError":
        """The same with ``prefix`` before each key."""
        return joined(UserError(f"{prefix}{one.key}", one.value, one.right) for one in self.errors)


class UserErrors(UserError):
    """Several mistakes, a line each; key, value and right are those of the first."""

    def __init__(self, errors: tuple[UserError, ...]) -> None:
        super().__init__(errors[0].key, errors[0].value, errors[0].right)
        self._errors = errors

    @property
    def errors(self) -> tuple[UserError, ...]:
        return self._errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return UserErrors, (self._errors,)


def joined(errors: Iterable[UserError]) -> UserError:
    """One error of all of them, which are at least one."""
    found = tuple(one for error in errors for one in error.errors)
    return found[0] if len(found) == 1 else UserErrors(found)


def raise_all(errors: Iterable[UserError]) -> None:
    """Raise all of them as one error; nothing where there are none."""
    if found := list(errors):
        raise joined(found)


def first_line(error: BaseException) -> str:
    """What a library's error says, without what it adds below; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
