"""Refusing a value that is not in a list or not in a range, in the same words everywhere."""

from qdm_deploy.errors import InputError

__all__ = ["one_of", "within"]


def one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not in a list, and say which one was probably meant.

    Raises:
        InputError: it is not.
    """
    if value in allowed:
        return
    from difflib import get_close_matches

    close = get_close_matches(value.lower(), [name.lower() for name in allowed], n=1)
    meant = next((name for name in allowed if close and name.lower() == close[0]), None)
    hint = f" (did you mean {meant}?)" if meant else ""
    raise InputError(f"unknown {what} {value!r}{hint}; choose one of {', '.join(allowed)}")


def within(what: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high].

    Raises:
        InputError: it is outside, or no number.
    """
    if not low <= value <= high:
        raise InputError(f"{what} is {value}; it must be from {low} to {high}")
