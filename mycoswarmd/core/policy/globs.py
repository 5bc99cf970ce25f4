"""Which combinations of shell globs can match one name, and a shortest name for each.

The globs become one automaton whose state is a set of positions, kept as the bits of a number. Walking
every reachable state finds exactly the combinations that some name satisfies: `gpt-*` with `*-mini`
yes, `gpt-*` with `qwen*` no. Source: Baeza-Yates and Gonnet, "A new approach to text searching", 1992.
"""

import re
import string
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Final

# One element of a glob, as fnmatch divides it: a star, a bracket set, or one character (`?` included).
_ELEMENT: Final = re.compile(r"\*+|\[!?+\]?+[^\]]*\]|.", re.DOTALL)
# What a name that no glob spells out is made of: one of these looks like a name.
_LETTERS: Final = f"xyz{string.ascii_letters}{string.digits}"
# More states than this come only from globs with many stars each; refused rather than waited for.
MAX_STATES: Final = 20_000


class TooManyGlobs(ValueError):
    """Globs, groups or tags can be combined in more ways than can be walked."""


def shortest_names(globs: Sequence[str]) -> list[str]:
    """Return one shortest name for each combination of the globs; the empty one only if no other has it."""
    step = _Automaton(globs)
    names = {step.start: ""}
    signatures: dict[int, str] = {}
    queue = [step.start]
    for state in queue:
        for char in step.alphabet:
            following = step.after(state, char)
            signatures.setdefault(following & step.accepting, names[state] + char)
            if following not in names:
                if len(names) >= MAX_STATES:
                    raise TooManyGlobs(f"more than {MAX_STATES} combinations of {len(globs)} globs")
                names[following] = names[state] + char
                queue.append(following)
    signatures.setdefault(step.start & step.accepting, "")
    return list(signatures.values())


class _Automaton:
    """Bit i of a state: the elements before element i have been matched by what was read."""

    def __init__(self, globs: Sequence[str]) -> None:
        elements: list[str] = []
        self.start = self.accepting = 0
        for glob in globs:
            self.start |= 1 << len(elements)
            elements += [one[:1] if one[0] == "*" else one for one in _ELEMENT.findall(glob)]
            self.accepting |= 1 << len(elements)
            elements.append("")  # the end: nothing more is matched
        self.stars = sum(1 << i for i, one in enumerate(elements) if one == "*")
        self.start = self._close(self.start)
        self.alphabet = _alphabet(elements)
        self.matches = {
            char: sum(
                1 << i for i, one in enumerate(elements) if one not in {"", "*"} and fnmatchcase(char, one)
            )
            for char in self.alphabet
        }

    def after(self, state: int, char: str) -> int:
        return self._close(((state & self.matches[char]) << 1) | (state & self.stars))

    def _close(self, state: int) -> int:
        return state | ((state & self.stars) << 1)  # a star may match nothing; two never stand together


def _alphabet(elements: Sequence[str]) -> list[str]:
    """Return characters that tell all elements apart: those written, and a few that are not."""
    written = {char for one in elements for char in one if one not in {"*", "?"}}
    # With a bracket set such as [1-5], what lies between two written characters differs from both, and
    # begins right after one of them: with 1, 2, 4 and 5 written elsewhere, only 3 tells the set apart.
    has_sets = any(len(one) > 1 for one in elements)
    beside = {
        chr(ord(char) + by)
        for char in written
        for by in (-1, 1)
        if has_sets and 0 < ord(char) + by <= sys.maxunicode
    }
    other = next(char for char in chain(_LETTERS, map(chr, range(0x100, 0x20000))) if char not in written)
    # Letters and digits first, so that the names that people see look like names.
    return sorted(written | beside | {other}, key=lambda char: (not char.isalnum(), char))
