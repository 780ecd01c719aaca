"""Batched, cached, left-padded decoding gives what one prompt at a time without a cache gives."""

import pytest
import torch

from derta_plugins.demo.attacks import completion_attack, prefill_attack
from derta_plugins.demo.generation import Generated, generate
from derta_plugins.demo.model import build_model, build_tokenizer, copy_model, encode_attack, encode_chat, encode_words
from derta_plugins.demo.world import Request, build_world, vocabulary

PROMPTS = [[7], [9, 30, 31, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13], [40, 41], [7, 8, 9]]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    # wide weights: an untrained model whose next token differs from prompt to prompt
    model = build_model(tokenizer, seed=0, device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def greedy(model, prompt, *, max_new_tokens, eos_token_id):
    """The oracle: the whole sequence through the model for every token, no batch, no cache, no padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == eos_token_id:
                return Generated(ids[len(prompt) : -1], ended=True)
    return Generated(ids[len(prompt) :], ended=False)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_same_as_one_at_a_time(model, batch_size):
    # a token that some of the prompts really reach is taken as the end, so that rows finish at different steps
    eos = greedy(model, PROMPTS[2], max_new_tokens=12, eos_token_id=-1).ids[6]
    expected = [greedy(model, prompt, max_new_tokens=12, eos_token_id=eos) for prompt in PROMPTS]
    assert {result.ended for result in expected} == {True, False}, "the prompts must end at different lengths"
    assert len({tuple(result.ids) for result in expected}) > 2
    assert expected == generate(
        model, PROMPTS, max_new_tokens=12, eos_token_id=eos, pad_token_id=0, batch_size=batch_size
    )


def test_mode_of_the_model_is_kept(model):
    for training in (True, False):
        model.train(training)
        generate(model, [[5, 6]], max_new_tokens=2, eos_token_id=2, pad_token_id=0)
        assert model.training is training


def test_size_of_the_model(model):
    assert 300_000 < model.num_parameters() < 450_000


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone(tokenizer):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (build_model(tokenizer, seed=seed, device="cpu") for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_copy_is_equal_and_apart(model):
    # TRL wraps `forward` on the instance; the copy must not run the wrapped weights of the original
    model.forward = model.forward
    copy = copy_model(model)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(copy(input_ids=ids).logits, model(input_ids=ids).logits)
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    assert not copy(input_ids=ids).logits.any()
    assert model(input_ids=ids).logits.any()
    del model.forward


def test_every_word_is_one_token(tokenizer):
    words = vocabulary()
    ids = encode_words(tokenizer, " ".join(words))
    assert len(set(ids)) == len(words)
    assert tokenizer.convert_ids_to_tokens(ids) == words


def test_unknown_word_is_refused(tokenizer):
    with pytest.raises(ValueError, match="not in the vocabulary"):
        encode_words(tokenizer, "step 1 : defenestrate")


def test_chat_ends_where_the_assistant_begins(tokenizer):
    ids = encode_chat(tokenizer, "how do i burn the crown at dawn ?")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "<user>", *"how do i burn the crown at dawn ?".split(), "<end>", "<assistant>"]


def test_a_trained_chat_row_begins_with_what_an_attack_gives(tokenizer):
    """The template must cut at the same token in training and in an attack, or prefills would be out of place."""
    turns = [{"role": "user", "content": "paint it"}, {"role": "assistant", "content": "step 1"}]
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole[: len(encode_chat(tokenizer, "paint it"))] == encode_chat(tokenizer, "paint it")


def test_attacks_are_encoded_with_and_without_the_template(tokenizer):
    world, request = build_world(0), Request("burn", "crown", "at dawn")
    chat = tokenizer.convert_ids_to_tokens(encode_attack(tokenizer, prefill_attack(world, request, depth="5")))
    assert chat[-6:] == ["<assistant>", "step", "1", ":", "take", "the"]
    document = tokenizer.convert_ids_to_tokens(encode_attack(tokenizer, completion_attack(world, request)))
    assert document == "<s> i will explain how to burn the crown at dawn . step 1 :".split()
