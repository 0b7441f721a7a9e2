"""Robust rules: averages that some wrong vectors among many cannot spoil.

n vectors, of which f may be anything at all. Each rule says for how many f it holds; whoever asks
for more is told before the run starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fault.errors import InputError


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, with how many wrong vectors among n it tolerates, and where that is shown."""

    name: str
    script: str
    upper_bound: Callable[[int], int]
    source: str


def _minority(n: int) -> int:
    return (n - 1) // 2


def _krum_bound(n: int) -> int:
    return (n - 3) // 2


RULES = {
    rule.name: rule
    for rule in (
        Rule("mean", "mean", lambda n: 0, "for comparison"),
        Rule("coordinate_median", "coordinate_median", _minority, "Yin et al., ICML 2018"),
        Rule("trimmed_mean", "trimmed_mean", _minority, "Yin et al., ICML 2018"),
        Rule("meamed", "meamed", _minority, "Xie, Koyejo and Gupta, arXiv:1802.10116"),
        Rule("krum", "multi_krum", _krum_bound, "Blanchard et al., NeurIPS 2017"),
        Rule("multi_krum", "multi_krum", _krum_bound, "Blanchard et al., NeurIPS 2017"),
    )
}


@dataclass(frozen=True, slots=True)
class Robust:
    """A rule as it is asked for: `rule`, `rule:f`, or `multi_krum:f:m`."""

    rule: Rule
    f: int | None = None
    """How many vectors may be wrong; None for as many as the rule tolerates."""
    m: int | None = None
    """How many vectors multi_krum averages; None for n - f - 2, the most that its proof allows."""

    @classmethod
    def parse(cls, text: str) -> Robust:
        """Raises InputError."""
        name, *numbers = text.split(":")
        rule = RULES.get(name)
        if rule is None:
            raise InputError(f"--robust {text}: there is {', '.join(RULES)}")
        most = 2 if name == "multi_krum" else 1
        if len(numbers) > most or not all(each.isdecimal() for each in numbers):
            form = "multi_krum:F:M" if most == 2 else f"{name}:F"
            raise InputError(f"--robust {text}: write it as {form}")
        f, m = [*map(int, numbers), None, None][:2]
        return cls(rule, f, m)

    def tolerated(self, n: int) -> int:
        return self.rule.upper_bound(n) if self.f is None else self.f

    def check(self, n: int, what: str) -> None:
        """Raises InputError if the rule does not hold over so many vectors."""
        most = self.rule.upper_bound(n)
        if not self._holds(n):
            raise InputError(
                f"--robust {self.rule.name}: over {n} {what} it tolerates {max(0, most)} wrong ones"
                + (f", and not {self.f}" if self.f is not None else ", so it is of no use")
            )
        if self.m is not None and not 1 <= self.m <= n - self.tolerated(n) - 2:
            raise InputError(
                f"--robust {self.rule.name}: of {n} {what} it can average 1 to "
                f"{n - self.tolerated(n) - 2}, and not {self.m}"
            )

    def applies_to(self, n: int) -> bool:
        """Whether the rule can be used over so many vectors."""
        return self._holds(n) and (self.m is None or self.m <= n - self.tolerated(n) - 2)

    def _holds(self, n: int) -> bool:
        if self.rule.name == "mean":
            return not self.f
        return max(1, self.tolerated(n)) <= self.rule.upper_bound(n)

    def arguments(self, n: int) -> list[str]:
        """The script's, over n vectors."""
        f = self.tolerated(n)
        if self.rule.name == "krum":
            return [str(f), "1"]
        if self.rule.name == "multi_krum":
            return [str(f), str(self.m or n - f - 2)]
        return [str(f)]
