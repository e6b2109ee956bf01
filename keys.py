"""Reads the keys of a published JSON file, each checked for type and range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cli import UserError

MAX_SIZE = 2**24  # of a count; the largest published one is 10,485,760 positions
NUMBERS = (1e-12, 1e12)  # no frequency in this range overflows float32
AGAIN = "fetch the file again"


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and NUMBERS[0] <= value <= NUMBERS[1]


class Keys:
    """The keys of a JSON object; a missing or wrong one is a `UserError` that names it.

    A null is an absent key: it reads as the default, or is an error if there is none.
    """

    def __init__(self, values: dict, where: str = "config.json", section: str = ""):
        self.values, self.where, self.path = values, where, section and f"{section}."

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default=None):
        value = self.values[key] if self.has(key) else default
        if value is None:
            raise UserError(f"{self.where} lacks {self.path}{key}; {AGAIN}")
        return value

    def refusal(self, key: str, what: str, advice: str = AGAIN) -> UserError:
        value = f"{self.values.get(key)!r:.60}"
        return UserError(f"{self.where}: {self.path}{key} is {value}, {what}; {advice}")

    def count(
        self, key: str, most: int = MAX_SIZE, default: int | None = None, least: int = 1
    ) -> int:
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.refusal(key, f"not a count from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not is_number(value):
            raise self.refusal(key, f"not a number from {NUMBERS[0]:g} to {NUMBERS[1]:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "not true or false")
        return value

    def choice(self, key: str, known: tuple, default: str | float) -> str | float:
        value = self.get(key, default)
        if value not in known:
            names = ", ".join(map(str, known))
            raise self.refusal(key, f"which is not supported (known: {names})", "use another model")
        return value

    def entries(self, key: str, length: int, what: str, fits: Callable[[Any], bool]) -> list:
        """The first `length` items of a list, all of which satisfy `fits`."""
        value = self.get(key)
        if type(value) is not list or len(value) < length or not all(map(fits, value)):
            raise self.refusal(key, f"not a list of {length} {what}")
        return value[:length]

    def section(self, *names: str) -> Keys:
        """The object under the first of these names that is not empty; an empty one if none is."""
        key = next((name for name in names if self.has(name) and self.values[name] != {}), None)
        value = self.values[key] if key else {}
        if not isinstance(value, dict):
            raise self.refusal(key, "not an object")
        return Keys(value, self.where, self.path + (key or names[0]))
