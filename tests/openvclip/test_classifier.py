import pytest
import torch

from applications.openvclip.miniature import glyphs, tiny_clip
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.prompts import ACTION_TEMPLATES, OBJECT_TEMPLATES


def test_the_published_templates_are_28() -> None:
    assert len(set(ACTION_TEMPLATES)) == 28
    assert "a video of a person performing {}." in ACTION_TEMPLATES
    assert "a example of {}." in ACTION_TEMPLATES
    assert all(template.startswith("a ") for template in ACTION_TEMPLATES)


def test_a_class_embedding_is_the_normalised_mean_over_templates(source) -> None:
    classes = glyphs.names()[:3]
    embeddings = class_embeddings(source.clip, source.tokenizer, classes, OBJECT_TEMPLATES)
    for name, embedding in zip(classes, embeddings, strict=True):
        tokens = source.tokenizer([template.format(name) for template in OBJECT_TEMPLATES])
        with torch.no_grad():
            sentences = source.clip.encode_text(tokens, normalize=True)
        expected = torch.nn.functional.normalize(sentences.mean(dim=0), dim=0)
        torch.testing.assert_close(embedding, expected)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], ["a {}"], "got 0 and 1"),
        (["cloud", "cloud"], ["a {}"], "'cloud'"),
        (["cloud"], ["a {}", "a photo"], "'a photo'"),
        (["cloud"], ["a {} in {}"], "'a {} in {}' must have one"),
        (["cloud"], ["a {} of {size}"], "no other brace"),
    ],
)
def test_label_sets_that_make_no_sense_are_refused(source, classes, templates, message) -> None:
    with pytest.raises(ValueError, match=message):
        class_embeddings(source.clip, source.tokenizer, classes, templates)


def test_a_word_that_the_tiny_clip_never_read_is_named(source) -> None:
    with pytest.raises(ValueError, match=r"'clod' in 'a clod' is not in the vocabulary.*'cloud'"):
        source.tokenizer(["a clod"])


def test_tokens_are_words_between_start_and_end() -> None:
    tokenizer = tiny_clip.WordTokenizer(["a", "cloud"], context_length=5)
    assert tokenizer(["a cloud", "A cloud a cloud a cloud."]).tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 2, 4]]
