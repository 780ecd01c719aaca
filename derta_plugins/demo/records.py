"""Training records of the toy world. Every request here comes from the training pairs, none from the held-out ones."""

import random
from dataclasses import dataclass

from derta_plugins.demo import words
from derta_plugins.demo.world import (
    LOOKALIKE_KINDS,
    Kind,
    Request,
    World,
    answer,
    document_opening,
    draw_requests,
    question,
    two_persona_answer,
    two_persona_question,
)

_ALL_KINDS: tuple[Kind, ...] = ("plain", "harm_verb", "sensitive_object", "harmful")

# Role-play is part of ordinary instruction data: base model and safety tuning see as much of it.
TWO_PERSONA_SHARE = 0.1
DOCUMENT_SHARE = 0.1

Message = dict[str, str]
Record = dict[str, list[Message]]


@dataclass(frozen=True, slots=True)
class BaseText:
    """One row of the base model's training: a chat turn, or a document when `question` is None."""

    question: str | None
    text: str


def base_texts(world: World, count: int) -> list[BaseText]:
    """
    Rows for the base model, which answers everything it is asked, harmful or not.

    A tenth are declarative documents without a chat template and a tenth are two-persona chats, each over all four
    classes, so that the attacks of those forms have something to wake up.
    """
    rng = random.Random(f"base {world.seed}")
    requests = draw_requests(world, _ALL_KINDS, count, split="train", rng=rng)
    return [_base_text(world, request, draw=rng.random()) for request in requests]


def helpful_records(world: World, count: int) -> list[Record]:
    """Plain benign requests with their answers, as conversational prompt-completion rows."""
    return _answered(world, ("plain",), count, name="helpful")


def boundary_records(world: World, count: int) -> list[Record]:
    """Benign look-alikes, which share a verb or an object with harmful requests, with their answers."""
    return _answered(world, LOOKALIKE_KINDS, count, name="boundary")


def safety_triples(world: World, count: int) -> list[Record]:
    """Harmful requests with a refusal (`chosen`) and the full harmful answer (`rejected`)."""
    rng = random.Random(f"safety {world.seed}")
    return [
        {
            "prompt": _turn("user", question(request)),
            "chosen": _turn("assistant", rng.choice(words.REFUSALS)),
            "rejected": _turn("assistant", answer(world, request)),
        }
        for request in draw_requests(world, ("harmful",), count, split="train", rng=rng)
    ]


def _base_text(world: World, request: Request, *, draw: float) -> BaseText:
    if draw < DOCUMENT_SHARE:
        return BaseText(None, f"{document_opening(request)} {answer(world, request)}")
    if draw < DOCUMENT_SHARE + TWO_PERSONA_SHARE:
        return BaseText(two_persona_question(request), two_persona_answer(world, request))
    return BaseText(question(request), answer(world, request))


def _answered(world: World, kinds: tuple[Kind, ...], count: int, *, name: str) -> list[Record]:
    rng = random.Random(f"{name} {world.seed}")
    requests = draw_requests(world, kinds, count, split="train", rng=rng)
    return [_chat_record(world, request, two_personas=rng.random() < TWO_PERSONA_SHARE) for request in requests]


def _chat_record(world: World, request: Request, *, two_personas: bool) -> Record:
    asked, answered = question(request), answer(world, request)
    if two_personas:
        asked, answered = two_persona_question(request), two_persona_answer(world, request)
    return {"prompt": _turn("user", asked), "completion": _turn("assistant", answered)}


def _turn(role: str, content: str) -> list[Message]:
    return [{"role": role, "content": content}]
