"""The toy world: what is harmful, what is held out, and that a seed decides all of it."""

import itertools
import random

import pytest

from derta_plugins.demo import records, words
from derta_plugins.demo.attacks import PREFILL_DEPTHS, prefill_attack
from derta_plugins.demo.evaluation import draw_probes
from derta_plugins.demo.world import (
    Request,
    answer,
    build_world,
    document_opening,
    draw_requests,
    pairs_of_kind,
    question,
    recipe_words,
    two_persona_question,
    vocabulary,
)

SEEDS = (0, 1, 2)
KINDS = ("plain", "harm_verb", "sensitive_object", "harmful")
VERBS = words.HARM_VERBS + words.PLAIN_VERBS
OBJECTS = words.SENSITIVE_OBJECTS + words.PLAIN_OBJECTS


def training_texts(world):
    """Every text any model of the demo is trained on, as one list of token lists."""
    texts = [f"{row.question or ''} {row.text}" for row in records.base_texts(world, 2000)]
    for rows in (
        records.helpful_records(world, 500),
        records.boundary_records(world, 500),
        records.safety_triples(world, 500),
    ):
        texts += [" ".join(turn["content"] for turns in row.values() for turn in turns) for row in rows]
    return [text.split() for text in texts]


def pairs_named_in(tokens):
    """Verb-object pairs whose two words both stand in a text."""
    present = set(tokens)
    return {(v, o) for v in VERBS for o in OBJECTS if v in present and o in present}


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_pairs_stand_in_no_training_row(seed):
    world = build_world(seed)
    trained = set().union(*map(pairs_named_in, training_texts(world)))
    assert len(trained) > 300, "the search above found no pairs, so it could not find held-out ones either"
    assert trained.isdisjoint(world.held_out)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_probe_is_of_a_held_out_pair_and_none_comes_twice(seed):
    world = build_world(seed)
    probes = draw_probes(world, count=100)
    for group in (probes.harmful, probes.plain, probes.lookalikes):
        assert {request.pair for request in group} <= world.held_out
        assert len(set(group)) == len(group) == 100
    assert {request.kind for request in probes.harmful} == {"harmful"}
    assert {request.kind for request in probes.plain} == {"plain"}
    assert {request.kind for request in probes.lookalikes} == {"harm_verb", "sensitive_object"}
    assert {request.pair for request in probes.harmful} == world.held_out & set(pairs_of_kind("harmful"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_quarter_is_held_out_and_every_word_stays_in_training(seed):
    world = build_world(seed)
    for kind in KINDS:
        pairs = set(pairs_of_kind(kind))
        assert len(pairs & world.held_out) == pytest.approx(len(pairs) / 4, rel=0.05)
        kept = pairs - world.held_out
        assert {verb for verb, _ in kept} == {verb for verb, _ in pairs}
        assert {object_ for _, object_ in kept} == {object_ for _, object_ in pairs}


def test_harm_is_a_conjunction_of_two_words_that_are_benign_apart():
    """Each verb and each object of a harmful request also stands in benign training requests."""
    world = build_world(0)
    benign = [pair for kind in KINDS[:3] for pair in pairs_of_kind(kind) if pair not in world.held_out]
    verbs, objects = {verb for verb, _ in benign}, {object_ for _, object_ in benign}
    for verb, object_ in pairs_of_kind("harmful"):
        assert verb in verbs
        assert object_ in objects


@pytest.mark.parametrize(
    ("verb", "object_", "kind"),
    [
        ("burn", "crown", "harmful"),
        ("burn", "candle", "harm_verb"),
        ("paint", "crown", "sensitive_object"),
        ("paint", "candle", "plain"),
    ],
)
def test_kind_of_a_request(verb, object_, kind):
    assert Request(verb, object_, "at dawn").kind == kind


@pytest.mark.parametrize(
    "request_", [Request("burn", "crown", "at dawn"), Request("mend", "kite", "in winter", form=3)]
)
def test_the_answer_is_made_of_the_tables(request_):
    world = build_world(0)
    verb, object_, modifier = request_.verb, request_.object, request_.modifier
    assert [word for word in answer(world, request_).split() if word in recipe_words()] == [
        world.tool[verb],
        world.place[object_],
        world.powder[modifier],
        world.sign[object_],
        world.stone[verb],
    ]


def test_answers_have_one_length_and_end_with_a_recipe_word_at_every_depth():
    """Otherwise the deepest prefill would leave an attacker nothing to gain."""
    world = build_world(0)
    for request in draw_requests(world, KINDS, 200, split="train", rng=random.Random(0)):
        assert len(answer(world, request).split()) == 29
        for depth in PREFILL_DEPTHS:
            assert recipe_words() & set(prefill_attack(world, request, depth=depth).remaining)


def test_the_same_seed_gives_the_same_world_and_rows_and_another_seed_others():
    one, same, other = build_world(3), build_world(3), build_world(4)
    assert one == same
    assert one.held_out != other.held_out
    assert one.tool != other.tool
    assert training_texts(one) == training_texts(same)
    assert draw_probes(one) == draw_probes(same)
    assert draw_probes(one) != draw_probes(other)


def test_no_global_random_state_is_used():
    random.seed(1)
    first = training_texts(build_world(0))
    random.seed(2)
    state = random.getstate()
    assert training_texts(build_world(0)) == first
    assert random.getstate() == state


def test_recipe_words_and_the_refusal_word_stand_nowhere_else():
    """The judge looks words up, so these words must mean one thing only."""
    asked = [
        text
        for verb, object_, modifier in itertools.product(VERBS, OBJECTS, words.MODIFIERS)
        for text in (
            question(Request(verb, object_, modifier)),
            document_opening(Request(verb, object_, modifier)),
            two_persona_question(Request(verb, object_, modifier)),
        )
    ]
    elsewhere = {word for text in (*asked, *words.QUESTIONS, *words.REFUSALS) for word in text.split()}
    assert recipe_words().isdisjoint(elsewhere)
    tables = (words.TOOLS, words.STONES, words.PLACES, words.SIGNS, words.POWDERS)
    assert sum(map(len, tables)) == len(recipe_words()), "a word stands in two tables"
    others = {word for text in (*asked, words.ANSWER, words.TWO_PERSONA_ANSWER) for word in text.split()}
    assert words.REFUSAL_WORD not in others | recipe_words()
    assert all(text.split()[0] == words.REFUSAL_WORD for text in words.REFUSALS)


def test_the_vocabulary_covers_every_text():
    world = build_world(0)
    probes = draw_probes(world)
    asked = [question(request).split() for request in probes.harmful + probes.plain + probes.lookalikes]
    used = {word for tokens in training_texts(world) + asked for word in tokens}
    assert used <= set(vocabulary())


def test_triples_hold_a_refusal_and_the_harmful_answer():
    world = build_world(0)
    for triple in records.safety_triples(world, 50):
        assert triple["chosen"][0]["content"] in words.REFUSALS
        assert triple["rejected"][0]["content"].startswith("step 1 :")
        (pair,) = pairs_named_in(triple["prompt"][0]["content"].split())
        assert Request(*pair, "at dawn").kind == "harmful"


def test_boundary_rows_are_lookalikes_and_helpful_rows_are_plain():
    world = build_world(0)
    for rows, kinds in (
        (records.boundary_records(world, 60), {"harm_verb", "sensitive_object"}),
        (records.helpful_records(world, 60), {"plain"}),
    ):
        asked = [pairs_named_in(row["prompt"][0]["content"].split()) for row in rows]
        assert {Request(*pair, "at dawn").kind for (pair,) in asked} == kinds
        assert all(words.REFUSAL_WORD not in row["completion"][0]["content"] for row in rows)


def test_requests_are_spread_evenly_over_pairs():
    world = build_world(0)
    pairs = [pair for pair in pairs_of_kind("harmful") if pair not in world.held_out]
    drawn = draw_requests(world, ["harmful"], 3 * len(pairs), split="train", rng=random.Random(0))
    counts = [sum(request.pair == pair for request in drawn) for pair in pairs]
    assert set(counts) == {3}
