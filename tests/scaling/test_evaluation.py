"""The loss is a mean over tokens, and its fingerprint tells texts, tokenizers and families apart."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.tables.evaluation import Fingerprint, evaluate, fingerprint, mapped_loss

from ..models import some_tokens, tiny_config, tiny_model

ROWS = [{"input_ids": some_tokens(1, length, seed=length)[0].tolist()} for length in (17, 5, 17, 30, 2)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def letters(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters (`size` 1) or of pairs of them, too."""
    words = [" ", *"abcdefgh"] if size == 1 else [" ", *"abcdefgh", *(a + b for a in "abcdefgh" for b in "abcdefgh")]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token=" "))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Split("", "isolated") if size == 1 else pre_tokenizers.Split(" ", "isolated")
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", clean_up_tokenization_spaces=False)


def test_every_token_counts_once_whatever_its_row(model):
    found = evaluate(model, ROWS, batch_size=2)
    losses = []
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            losses.append(cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found.loss != pytest.approx(float(torch.stack([x.mean() for x in losses]).mean()), rel=1e-3)
    assert found.fingerprint.tokens == sum(len(row["input_ids"]) - 1 for row in ROWS) and 0 < found.error < 1
    assert found.fingerprint.family == "llama" and found.fingerprint.vocab_size == 97


def test_padding_and_masked_labels_do_not_count(model):
    ids = ROWS[0]["input_ids"]
    padded = {"input_ids": ids + [0] * 9, "attention_mask": [1] * len(ids) + [0] * 9}
    masked = {"input_ids": ids + [0] * 9, "labels": ids + [-100] * 9}
    plain = evaluate(model, ROWS[:1]).loss
    assert evaluate(model, [padded]).loss == pytest.approx(plain, rel=1e-6)
    assert evaluate(model, [masked]).loss == pytest.approx(plain, rel=1e-6)


def test_a_tensor_of_rows_is_a_data_set_and_the_model_keeps_its_mode(model):
    tokens = some_tokens()
    model.train()
    assert evaluate(model, tokens, max_rows=2).fingerprint.tokens == 2 * 16
    assert model.training
    model.eval()


def test_fingerprints_tell_texts_and_families_apart():
    one, other = fingerprint(ROWS), fingerprint(ROWS[:-1])
    assert one == fingerprint(ROWS) and one.tokens_digest != other.tokens_digest
    assert fingerprint(ROWS, config=tiny_config("opt")).family == "opt"
    assert Fingerprint.from_dict(one.to_dict()) == one


def test_the_same_text_under_another_tokenizer_is_mapped_by_bits_per_byte():
    law = Fingerprint("ids-1", 100, text="t", bytes=400)
    mine = Fingerprint("ids-2", 200, text="t", bytes=400)
    loss = 1.5
    mapped = mapped_loss(loss, mine, law)
    assert mapped * law.tokens / law.bytes == pytest.approx(loss * mine.tokens / mine.bytes)  # nats per byte
    assert mapped == 3.0 and mapped_loss(loss, law, law) == loss
    assert mapped_loss(loss, Fingerprint("ids-3", 200, text="u", bytes=400), law) is None
    assert mapped_loss(loss, Fingerprint("ids-3", 200), law) is None


def test_rows_of_text_are_tokenised_and_their_text_is_known():
    rows = [{"text": "abcabh"}, {"text": "hag"}]
    found = fingerprint(rows, tokenizer=letters(1))
    assert found.tokens == 5 + 2 and found.bytes > 0 and found.text and found.tokenizer
    assert found.text != fingerprint(rows[:1], tokenizer=letters(1)).text
    assert found.tokenizer != fingerprint(rows, tokenizer=letters(2)).tokenizer


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"words": "a"}], r"need 'input_ids'.*\['words'\]"),
        ([{"text": "a"}], "with tokenizer="),
        ([3], "int"),
        (7, "no evaluation set"),
        ([{"input_ids": [1]}], "No token"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "No token"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, rows, words):
    with pytest.raises(WarmstartError, match=words):
        evaluate(model, rows)


def test_the_error_is_that_of_the_mean_over_rows(model):
    many = evaluate(model, some_tokens(64, 9))
    few = evaluate(model, some_tokens(16, 9))
    assert few.error / many.error == pytest.approx(math.sqrt(4), rel=0.4)
