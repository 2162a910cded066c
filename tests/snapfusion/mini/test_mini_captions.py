"""The captions that the miniature knows."""

import subprocess
import sys
from pathlib import Path

import pytest

from snapfusion.mini.captions import VOCABULARY_SIZE, caption_grammar, caption_warning, knows_caption
from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.mini.tokenizer import mini_tokenizer
from snapfusion.mini.vocabulary import ATTRIBUTES, NUM_CAPTIONS

CAPTION = "a large red circle at the top on a white background"
UNKNOWN = ["", "a dog", "a huge red circle at the top on a white background", CAPTION.removeprefix("a ")]


def test_every_scene_is_known():
    assert all(knows_caption(caption_of(scene_of(index))) for index in range(NUM_CAPTIONS))


@pytest.mark.parametrize("caption", UNKNOWN)
def test_other_captions_are_not(caption):
    assert not knows_caption(caption)


def test_what_the_tokenizer_ignores_does_not_matter():
    tokenizer, other = mini_tokenizer(), f"  {CAPTION.upper().replace(' ', '  ')}"
    assert tokenizer(other).input_ids == tokenizer(CAPTION).input_ids
    assert knows_caption(other)


def test_only_a_model_with_the_miniatures_vocabulary_warns():
    assert len(mini_tokenizer()) == VOCABULARY_SIZE
    assert caption_warning(CAPTION, vocabulary_size=VOCABULARY_SIZE) is None
    assert caption_warning("a dog", vocabulary_size=49408) is None
    warning = caption_warning("a dog", vocabulary_size=VOCABULARY_SIZE)
    assert warning.startswith("the miniature does not know the caption 'a dog': it knows 1,200 captions")
    assert "\n" not in warning


def test_the_grammar_names_every_word():
    assert all(word in caption_grammar() for words in ATTRIBUTES.values() for word in words)


def test_it_imports_no_torch():
    program = "import sys; import snapfusion.mini.captions; print(*sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert "torch" not in done.stdout.split()
