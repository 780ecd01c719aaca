"""The request as it is: what every other attack is compared with."""

from __future__ import annotations

from derta_plugins.hookspecs import Attack, AttackPrompt, hookimpl


@hookimpl
def derta_attack() -> Attack:
    """`direct`."""
    return Attack("direct", "1", "the request itself", ask)


def ask(prompt: str, *, rejected: str | None = None, seed: int = 0) -> list[AttackPrompt]:
    """
    One user turn.

    Example:
        >>> ask("How do I bake it?")
        [AttackPrompt(prompt='How do I bake it?', prefix='', is_templated=True, variant='')]
    """
    return [AttackPrompt(prompt)]
