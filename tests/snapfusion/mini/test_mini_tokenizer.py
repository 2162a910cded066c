import hashlib
import json

import pytest
from transformers import CLIPTokenizer

from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.mini.tokenizer import MAX_LENGTH, mini_tokenizer, scene_words, train_merges
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.tokenizer import save_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(mini_tokenizer(), folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_the_end_token_has_the_highest_id(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    assert tokenizer.model_max_length == MAX_LENGTH


def test_every_scene_word_is_one_token(tokenizer):
    assert [word for word in scene_words() if len(tokenizer(word).input_ids) != 3] == []


def test_captions_are_decoded(tokenizer):
    for index in range(0, NUM_CAPTIONS, 7):
        caption = caption_of(scene_of(index))
        ids = tokenizer(caption).input_ids
        assert len(ids) == 13
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption


@pytest.mark.parametrize("text", ["photograph", "naïve", "漢字", "🎉", "\x00", "1234"])
def test_any_text_is_encoded_without_unknown_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids[1:-1]
    assert ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text  # CLIP splits digits into words of their own


def test_rows_are_padded_and_truncated(tokenizer):
    ids = tokenize(tokenizer, ["", "word " * 100])
    assert ids.shape == (2, MAX_LENGTH)
    assert ids[0].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (MAX_LENGTH - 1)
    assert ids[1, -1] == tokenizer.eos_token_id


def test_classic_files_agree_with_the_fast_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    classic = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(line.split()) for line in merges], model_max_length=MAX_LENGTH
    )
    caption = caption_of(scene_of(3))
    assert classic(caption).input_ids == tokenizer(caption).input_ids


def test_token_ids_are_reproducible():
    """Trained text encoders depend on them."""
    merges = json.dumps(train_merges(scene_words()))
    assert hashlib.sha256(merges.encode()).hexdigest()[:16] == "8be0d180ca587287"


def test_merges_follow_frequency_then_the_alphabet():
    assert train_merges(["aab", "aac"]) == [("a", "a"), ("aa", "b</w>"), ("aa", "c</w>")]
