"""Which tensors of a run start from weights: names and shapes of both, laid side by side."""

from __future__ import annotations

import glob
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from attrs import frozen

from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import Problem, first_few, summarize_names

Shapes = Mapping[str, Shape]


@frozen
class Match:
    """Names of tensors, each in the order of its owner."""

    loaded: Sequence[str]  # what both have
    new: Sequence[str]  # of the run: they keep their initial values
    unused: Sequence[str]  # of the weights: the run has no place for them

    def counts(self) -> str:
        return f"{len(self.loaded):,} loaded, {len(self.new):,} new, {len(self.unused):,} unused"

    def of(self, part: str) -> Match:
        """The tensors of one network part, such as ``backbone``; names keep their prefix."""
        return Match(*(_within(part, names) for names in (self.loaded, self.new, self.unused)))

    def parts(self) -> list[str]:
        """The parts that the run or the weights have, in the run's order."""
        names = (*self.loaded, *self.new, *self.unused)
        return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _within(part: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{part}.")]


def match(
    run: Shapes,
    weights: Shapes,
    *,
    new: Sequence[str],
    unused: Sequence[str],
    table: str = "init_from",
) -> tuple[Match, list[Problem]]:
    """Match a run's tensors with those of weights, and say all that is not allowed by name.

    ``new`` and ``unused`` are the names and patterns that the recipe's ``table`` allows.
    """
    reset = {n for n in run if matches(n, new) and matches(n, unused)}
    common = run.keys() & weights.keys()
    misshapen = {n for n in common if tuple(run[n]) != tuple(weights[n])} - reset
    loaded = common - misshapen - reset
    found = Match(
        [name for name in run if name in loaded],
        [name for name in run if name not in loaded],
        [name for name in weights if name not in loaded],
    )
    missing = {n for n in found.new if n not in misshapen and not matches(n, new)}
    extra = {n for n in found.unused if n not in misshapen and not matches(n, unused)}
    problems = [
        *_typos(table, "new", new, run),
        *_typos(table, "unused", unused, weights),
    ]
    if missing or extra or misshapen:
        lines = [
            summarize_names("of this run that the weights do not have", missing),
            summarize_names("of the weights that this run has no place for", extra),
            summarize_names(
                "of another shape",
                [f"{n}: {list(weights[n])} in the weights, {list(run[n])} here" for n in misshapen],
            ),
        ]
        hint = _advice(table, new, unused, run, weights, missing | misshapen, extra | misshapen)
        problems.append(Problem(table, "tensors differ" + "".join(lines), hint))
    return found, problems


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor is one of those that names, or patterns with ``*``, allow."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _typos(
    table: str, key: str, patterns: Sequence[str], names: Collection[str]
) -> Iterator[Problem]:
    owner = "this run" if key == "new" else "the weights"
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            beginnings = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            yield Problem(
                f"{table}.{key}",
                f"{pattern!r} matches no tensor of {owner}",
                f"its names begin with {first_few(beginnings, 8) or '(there are none)'}",
            )


def _advice(
    table: str,
    new: Sequence[str],
    unused: Sequence[str],
    run: Shapes,
    weights: Shapes,
    missing: Collection[str],
    extra: Collection[str],
) -> str:
    """The lines that would allow all of it, ready to be copied."""
    lines = [
        f"{key} = {patterns_text([*given, *patterns_for(names, owner)])}"
        for key, given, names, owner in (
            ("new", new, missing, run),
            ("unused", unused, extra, weights),
        )
        if names
    ]
    return f"if this is meant, say so in [{table}]:" + "".join(f"\n      {x}" for x in lines)


def patterns_for(names: Collection[str], among: Iterable[str]) -> list[str]:
    """The fewest patterns of whole name parts that match ``names`` and no other of ``among``."""
    wanted = set(names)
    blocked = {prefix for name in among if name not in wanted for prefix in _prefixes(name)}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(wanted):
        free = next((prefix for prefix in _prefixes(name) if prefix not in blocked), name)
        groups[free].append(name)
    return [
        f"{glob.escape(free)}*" if len(inside) > 1 else inside[0] for free, inside in groups.items()
    ]


def patterns_text(patterns: Sequence[str]) -> str:
    """Patterns as both a recipe and Python take them."""
    return json.dumps(patterns, ensure_ascii=False)


def _prefixes(name: str) -> list[str]:
    """``a.`` and ``a.b.`` of ``a.b.c``, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]
