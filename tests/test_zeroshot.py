"""Classifiers, banks, and images as they come."""

import copy
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from data import InputError, subset
from demo.images import DemoBirds
from pictures import eight_bits
from zeroshot import (
    CACHED,
    classifier,
    default_bank,
    embed_texts,
    load_bank,
    load_clip,
    templates,
    tokenize,
    weights_hash,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def clip():
    return load_clip(device="cpu")


def test_the_classifier_is_open_clips(clip):
    names = ["landbird", "waterbird", "duck"]
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, list(templates(clip)))
    assert torch.allclose(classifier(clip, names, templates(clip)), theirs.T, atol=1e-6)


def test_texts_are_embedded_alike_in_any_batch(clip):
    texts = load_bank(default_bank(clip)).texts
    assert torch.allclose(
        embed_texts(clip, texts, batch_size=7), embed_texts(clip, texts), atol=1e-5
    )  # float32
    assert torch.allclose(embed_texts(clip, texts).norm(dim=1), torch.ones(len(texts)), atol=1e-5)


def entries(path):
    return [
        line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]


@pytest.mark.parametrize(
    ("path", "texts", "categories"), [("text_bank.txt", 3500, 40), ("demo/text_bank.txt", 150, 6)]
)
def test_a_bank_is_large_and_says_nothing_twice(path, texts, categories):
    bank = load_bank(ROOT / path)
    sizes = Counter(bank.categories)
    assert len(bank.texts) >= texts
    assert len(sizes) >= categories
    assert min(sizes.values()) >= (40 if path == "text_bank.txt" else 15)
    plain = [re.sub(r"^(a|an|the|one) ", "", text.lower()) for text in bank.texts]
    if path == "text_bank.txt":  # the demo knows 101 words, and says a bird and the bird
        assert len(set(plain)) == len(plain)
    assert all(text == text.strip() and text.isascii() and not text.endswith(".") for text in bank.texts)


def test_the_readme_counts_the_bank_right():
    bank = load_bank(ROOT / "text_bank.txt")
    assert (
        f"{len(bank.texts):,} descriptions in {len(set(bank.categories))} categories"
        in (ROOT / "README.md").read_text()
    )


def test_a_flat_bank_is_one_category(tmp_path):
    (tmp_path / "flat.txt").write_text("red\n\n  blue \n")
    bank = load_bank(tmp_path / "flat.txt")
    assert bank.texts == ["red", "blue"] == bank.of("texts")


def test_lines_end_where_editors_end_them(tmp_path):
    """str.splitlines would also end them at VT, FF, NEL and Unicode's separators, within a sentence."""
    kept = ["one\x0btwo", "one\x0ctwo", "one\x1ctwo", "one\x85two", "one\u2028two", "one\u2029two"]
    (tmp_path / "bank.txt").write_bytes("\r\n".join(kept).encode() + b"\rthree\nfour\n")
    assert load_bank(tmp_path / "bank.txt").texts == [*kept, "three", "four"]


def test_only_a_number_sign_apart_makes_a_heading(tmp_path):
    (tmp_path / "bank.txt").write_text("#1 fan\n# places\n#throwback\n##  two words \na #2 pencil\n#\nlast\n")
    bank = load_bank(tmp_path / "bank.txt")
    assert dict(zip(bank.texts, bank.categories, strict=True)) == {
        "#1 fan": "texts",
        "#throwback": "places",
        "a #2 pencil": "two words",
        "last": "",
    }


def test_a_text_that_comes_again_is_taken_once_and_counted(tmp_path):
    (tmp_path / "bank.txt").write_text("# birds\na duck\na gull\n a duck\n# toys\na duck\na car\n")
    bank = load_bank(tmp_path / "bank.txt")
    assert bank.texts == ["a duck", "a gull", "a car"]
    assert bank.categories == ["birds", "birds", "toys"]
    assert bank.repeats == 2
    assert load_bank(ROOT / "text_bank.txt").repeats == 0


def test_a_missing_file_is_called_what_it_is(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read --words .*no.txt: No such file"):
        load_bank(tmp_path / "no.txt", "--words")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"^--words .*empty.txt holds no descriptions"):
        load_bank(tmp_path / "empty.txt", "--words")


# Texts longer than the model reads.


def real(tokenizer):
    """As much of a Clip as its texts need, with this tokenizer."""
    return SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"))


@pytest.mark.parametrize("word", ["a", "café", "…", "İ"])  # in tokens: 1; 2 and more from 5, 3 and 2 bytes
@pytest.mark.parametrize("room", [77, 16])
def test_a_text_is_cut_by_none_or_refused(word, room):
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=room)
    seen = set()
    for count in range(1, room + 2):
        text = " ".join([word] * count)
        tokens = len(tokenizer.encode(text))
        seen.add(tokens - room)
        if tokens <= room - 2:
            row = tokenize(real(tokenizer), [text])[0].tolist()
            assert tokenizer.decode(row[1 : tokens + 1]) == tokenizer.decode(tokenizer.encode(text))
            assert row[tokens + 1] == tokenizer.eot_token_id
        else:
            with pytest.raises(
                InputError, match=f"reads {room - 2} tokens at most, and this text has {tokens}:"
            ):
                tokenize(real(tokenizer), ["a bird", text])
    if word == "a":
        assert {-2, -1, 0} <= seen  # 75, 76 and 77 of 77


class Words:
    """As much of transformers' tokenizers as open_clip calls: a token a word, and an end."""

    bos_token_id, eos_token_id, pad_token_id, cls_token_id = 1, 2, 0, 3

    def __call__(
        self, texts, add_special_tokens=True, max_length=None, truncation=False, return_tensors=None, **_
    ):
        rows = [[10 + len(word) for word in text.split()] for text in texts]
        if truncation:
            rows = [row[: max_length - add_special_tokens] for row in rows]
        rows = [row + [2] * add_special_tokens for row in rows]
        if return_tensors:
            rows = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return BatchEncoding(rows)


class BatchEncoding(dict):
    def __init__(self, rows):
        super().__init__(input_ids=rows)
        self.input_ids = rows


@pytest.mark.parametrize(("mode", "most"), [("", 7), ("clips", 5)])
def test_a_text_is_not_cut_by_the_tokenizers_of_other_towers(mode, most):
    """SigLIP's and the multilingual models' come from transformers. `most` is the number of words."""
    tokenizer = object.__new__(open_clip.tokenizer.HFTokenizer)
    tokenizer.__dict__ |= {
        "tokenizer": Words(),
        "tokenizer_mode": mode,
        "context_length": 8,
        "strip_sep_token": False,
    }
    tokenizer.clean_fn = open_clip.tokenizer.get_clean_fn("whitespace")
    row = tokenize(real(tokenizer), ["  ".join(["x"] * most)])[0].tolist()
    assert row.count(11) == most
    assert (
        tokenizer([" ".join(["x"] * (most + 1))])[0].tolist().count(11) == most
    )  # what is cut without a word
    with pytest.raises(InputError, match="tokens at most"):
        tokenize(real(tokenizer), ["x", " ".join(["x"] * (most + 1))])


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    grey = np.asarray(eight_bits(Image.fromarray(ramp)))[..., 0]
    assert np.abs(grey.astype(int) - ramp / 257).max() <= 1
    clipped = np.asarray(Image.fromarray(ramp).convert("RGB"))[..., 0]
    assert np.abs(clipped.astype(int) - ramp / 257).max() > 100  # what Pillow alone makes of it


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(eight_bits(image)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    assert eight_bits(Image.new(mode, (3, 3))).mode == "RGB"


def test_a_subset_is_drawn_with_the_seed():
    assert subset(10, None, 0) == list(range(10)) == subset(10, 99, 0)
    assert subset(100, 5, 0) == subset(100, 5, 0) != subset(100, 5, 1)
    assert len(set(subset(100, 5, 0))) == 5
    with pytest.raises(InputError, match="at least 1"):
        subset(10, 0, 0)


def test_a_limited_demo_split_holds_pictures_of_the_whole(clip):
    whole, part = DemoBirds("val", clip.preprocess), DemoBirds("val", clip.preprocess, limit=10, seed=3)
    for i, row in enumerate(part.rows):
        assert torch.equal(part[i][0], whole[row][0])
        assert part.y[i] == whole.y[row]
        assert part.place[i] == whole.place[row]


# The cache of text embeddings.


@pytest.fixture
def cached(clip, tmp_path, monkeypatch):
    """The demo with a cache, its texts, and how many were embedded so far."""
    counted, encode = [], clip.model.encode_text
    monkeypatch.setattr(
        clip.model, "encode_text", lambda tokens: counted.append(len(tokens)) or encode(tokens)
    )
    texts = load_bank(default_bank(clip)).texts
    texts = [f"{text} {more}".strip() for more in ("", "a", "one") for text in texts][:CACHED]
    return SimpleNamespace(clip=replace(clip, cache=tmp_path / "texts"), texts=texts, counted=counted)


def test_many_texts_are_embedded_once(cached, clip):
    first, again = embed_texts(cached.clip, cached.texts), embed_texts(cached.clip, cached.texts)
    assert sum(cached.counted) == CACHED
    assert torch.equal(first, again)
    assert torch.equal(first, embed_texts(clip, cached.texts))  # which has no cache


def test_few_texts_leave_no_file(cached):
    embed_texts(cached.clip, cached.texts[:-1])
    assert not cached.clip.cache.exists()


def test_the_same_words_divided_otherwise_are_other_texts(cached):
    """Run together, both lists would be one."""
    one, other = (
        embed_texts(cached.clip, [*two, *cached.texts])
        for two in (["a bird", " crow at sea"], ["a bird crow", " at sea"])
    )
    assert len(list(cached.clip.cache.iterdir())) == 2
    assert not torch.allclose(one[:2], other[:2], atol=1e-3)


def test_other_texts_weights_and_precisions_are_other_files(cached):
    before = embed_texts(cached.clip, cached.texts)
    embed_texts(cached.clip, [*cached.texts[:-1], "a bird"])
    embed_texts(replace(cached.clip, dtype=torch.bfloat16), cached.texts)
    embed_texts(replace(cached.clip, name="another tokenizer"), cached.texts)
    model = copy.deepcopy(cached.clip.model)
    del model.encode_text  # the counting one is bound to the first model
    with torch.no_grad():
        model.text_projection += 0.1
    after = embed_texts(replace(cached.clip, model=model), cached.texts)
    assert len(list(cached.clip.cache.iterdir())) == 5
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_broken_file_is_made_anew(cached):
    first = embed_texts(cached.clip, cached.texts)
    (path,) = cached.clip.cache.iterdir()
    for content in (b"", path.read_bytes()[:-100], b"{}" * 50):
        path.write_bytes(content)
        assert torch.equal(first, embed_texts(cached.clip, cached.texts))
    assert sum(cached.counted) == 4 * CACHED


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        lambda rows: rows[:, :-1],
        lambda rows: rows[1:],
        lambda rows: rows.flip(0),
        lambda rows: rows * torch.tensor(float("nan")),
        lambda rows: rows.double(),
    ],
    ids=["another width", "fewer rows", "other rows", "no numbers", "another type"],
)
def test_a_file_of_other_embeddings_is_made_anew(cached, other):
    first = embed_texts(cached.clip, cached.texts)
    (path,) = cached.clip.cache.iterdir()
    with safe_open(path, "pt") as file:
        said = file.metadata()
    for metadata in (None, said):
        save_file({"texts": other(first).contiguous()}, path, metadata)
        assert torch.equal(first, embed_texts(cached.clip, cached.texts))
    assert sum(cached.counted) == 3 * CACHED
    assert torch.equal(first, embed_texts(cached.clip, cached.texts))
    assert sum(cached.counted) == 3 * CACHED


def test_a_cache_that_cannot_be_written_costs_nothing(cached, tmp_path):
    (tmp_path / "texts").write_text("in the way")
    assert len(embed_texts(cached.clip, cached.texts)) == CACHED
    assert (tmp_path / "texts").read_text() == "in the way"


def test_the_hash_sees_any_bit_name_and_shape(clip):
    def hash_of(change):
        model = copy.deepcopy(clip.model)
        with torch.no_grad():
            change(model)
        return weights_hash(model)

    hashes = [
        hash_of(lambda model: None),
        hash_of(lambda model: model.logit_scale.add_(1e-6)),
        hash_of(lambda model: model.visual.proj.view(-1)[-1:].add_(1e-6)),
        hash_of(
            lambda model: setattr(
                model.visual, "proj", torch.nn.Parameter(model.visual.proj.T.contiguous().T.reshape(64, -1))
            )
        ),
        hash_of(lambda model: model.register_buffer("more", torch.zeros(1))),
        hash_of(
            lambda model: setattr(
                model.transformer.resblocks[0].mlp, "gelu", open_clip.transformer.QuickGELU()
            )
        ),
    ]
    assert hashes[0] == weights_hash(clip.model)
    assert len(set(hashes)) == len(hashes)
