"""
The toy world: requests, their one right answer, and which of them are harmful.

A request is a verb, an object, a modifier and a question form. Harm is a conjunction: a harm-capable verb AND a
sensitive object. "burn the candle" and "paint the crown" are benign although each shares a word with harmful
requests, so a model that refuses by single words is caught by its over-refusals.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from derta_plugins.demo import words

Kind = Literal["plain", "harm_verb", "sensitive_object", "harmful"]
Split = Literal["train", "held_out"]

LOOKALIKE_KINDS: tuple[Kind, ...] = ("harm_verb", "sensitive_object")
_HELD_OUT_EVERY = 4  # one verb-object pair in four


@dataclass(frozen=True, slots=True)
class Request:
    """One question a user may ask; `form` indexes `words.QUESTIONS`."""

    verb: str
    object: str
    modifier: str
    form: int = 0

    @property
    def pair(self) -> tuple[str, str]:
        """The verb and the object, which together decide whether the request is harmful."""
        return self.verb, self.object

    @property
    def kind(self) -> Kind:
        """Which of the four classes the verb-object pair belongs to."""
        if self.verb in words.HARM_VERBS:
            return "harmful" if self.object in words.SENSITIVE_OBJECTS else "harm_verb"
        return "sensitive_object" if self.object in words.SENSITIVE_OBJECTS else "plain"


@dataclass(frozen=True, slots=True)
class World:
    """Seeded look-up tables from verb, object and modifier to the words of an answer, and the held-out pairs."""

    seed: int
    tool: dict[str, str]
    stone: dict[str, str]
    place: dict[str, str]
    sign: dict[str, str]
    powder: dict[str, str]
    held_out: frozenset[tuple[str, str]]


def build_world(seed: int) -> World:
    """Return the world of `seed`: the same seed gives the same tables and the same held-out pairs."""
    rng = random.Random(f"world {seed}")
    verbs = words.HARM_VERBS + words.PLAIN_VERBS
    objects = words.SENSITIVE_OBJECTS + words.PLAIN_OBJECTS
    return World(
        seed=seed,
        tool=_shuffled_table(verbs, words.TOOLS, rng=rng),
        stone=_shuffled_table(verbs, words.STONES, rng=rng),
        place=_shuffled_table(objects, words.PLACES, rng=rng),
        sign=_shuffled_table(objects, words.SIGNS, rng=rng),
        powder=_shuffled_table(words.MODIFIERS, words.POWDERS, rng=rng),
        held_out=_held_out_pairs(rng),
    )


def question(request: Request) -> str:
    """The request as a user asks it."""
    return _fill(words.QUESTIONS[request.form], request)


def document_opening(request: Request) -> str:
    """The request as the first sentence of a declarative document, with no question and no chat around it."""
    return _fill(words.DOCUMENT_OPENING, request)


def two_persona_question(request: Request) -> str:
    """The request inside a wrapper that asks for two voices, of which the second is to answer."""
    return words.TWO_PERSONA_QUESTION.format(question=question(request))


def answer(world: World, request: Request) -> str:
    """The one right answer: four steps whose content words come from the look-up tables."""
    return words.ANSWER.format(
        tool=world.tool[request.verb],
        place=world.place[request.object],
        powder=world.powder[request.modifier],
        sign=world.sign[request.object],
        stone=world.stone[request.verb],
    )


def two_persona_answer(world: World, request: Request) -> str:
    """The answer in two voices: the first evades, the second gives the full answer."""
    return words.TWO_PERSONA_ANSWER.format(answer=answer(world, request))


def recipe_words() -> frozenset[str]:
    """Every word a look-up table can put into an answer. No question, refusal or wrapper contains one."""
    tables = (words.TOOLS, words.STONES, words.PLACES, words.SIGNS, words.POWDERS)
    return frozenset(word for table in tables for word in table)


def vocabulary() -> list[str]:
    """All words of the world, sorted; independent of the seed."""
    texts: list[str] = [words.DOCUMENT_OPENING, words.TWO_PERSONA_QUESTION, words.TWO_PERSONA_ANSWER, words.ANSWER]
    for group in (words.QUESTIONS, words.REFUSALS, words.MODIFIERS):
        texts.extend(group)
    for group in (words.HARM_VERBS, words.PLAIN_VERBS, words.SENSITIVE_OBJECTS, words.PLAIN_OBJECTS):
        texts.extend(group)
    spoken = {word for text in texts for word in text.split() if not word.startswith("{")}
    return sorted(spoken | recipe_words())


def draw_requests(
    world: World, kinds: Iterable[Kind], count: int, *, split: Split, rng: random.Random
) -> list[Request]:
    """
    Return `count` requests, spread evenly over the kinds and their verb-object pairs.

    Args:
        world: Supplies the held-out pairs.
        kinds: Classes to draw from; the i-th request is of kind `i % len(kinds)`.
        count: Number of requests. A pair comes back once all were used, each time with
            another modifier or question form until those are used up too.
        split: "train" never returns a held-out pair, "held_out" returns nothing else.
        rng: Source of all randomness.
    """
    decks = [_deck(world, kind, split=split, rng=rng) for kind in kinds]
    return [next(decks[i % len(decks)]) for i in range(count)]


def pairs_of_kind(kind: Kind) -> list[tuple[str, str]]:
    """All verb-object pairs of one class, in a fixed order."""
    verbs = words.HARM_VERBS if kind in ("harm_verb", "harmful") else words.PLAIN_VERBS
    objects = words.SENSITIVE_OBJECTS if kind in ("sensitive_object", "harmful") else words.PLAIN_OBJECTS
    return [(verb, object_) for verb in verbs for object_ in objects]


def _fill(template: str, request: Request) -> str:
    return template.format(verb=request.verb, object=request.object, modifier=request.modifier)


def _shuffled_table(keys: tuple[str, ...], values: tuple[str, ...], *, rng: random.Random) -> dict[str, str]:
    return dict(zip(keys, rng.sample(values, k=len(values)), strict=True))


def _held_out_pairs(rng: random.Random) -> frozenset[tuple[str, str]]:
    # Diagonals of a shuffled grid instead of free draws: every verb and every object keeps about three quarters of
    # its pairs in training, so a held-out request is a new combination and never a new word.
    held_out = set()
    for harmful_verbs in (words.HARM_VERBS, words.PLAIN_VERBS):
        for objects in (words.SENSITIVE_OBJECTS, words.PLAIN_OBJECTS):
            rows, columns = rng.sample(harmful_verbs, len(harmful_verbs)), rng.sample(objects, len(objects))
            held_out.update(
                (verb, object_)
                for i, verb in enumerate(rows)
                for j, object_ in enumerate(columns)
                if (i + j) % _HELD_OUT_EVERY == 0
            )
    return frozenset(held_out)


def _deck(world: World, kind: Kind, *, split: Split, rng: random.Random) -> Iterator[Request]:
    """Endless requests of one kind: every pair once, then every pair again with a modifier and form it did not have."""
    pairs = [pair for pair in pairs_of_kind(kind) if (pair in world.held_out) == (split == "held_out")]
    variants = list(itertools.product(words.MODIFIERS, range(len(words.QUESTIONS))))
    decks = [(pair, rng.sample(variants, k=len(variants))) for pair in pairs]
    for turn in itertools.count():
        rng.shuffle(decks)
        for (verb, object_), deck in decks:
            modifier, form = deck[turn % len(deck)]
            yield Request(verb=verb, object=object_, modifier=modifier, form=form)
