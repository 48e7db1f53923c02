"""The demo world: what its pictures, captions and words promise, that training learns, and its checkpoint."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import demo
from demo import captions, scenes, train
from demo.sources import Signs
from demo.writing import WORDS, place
from zeroshot import load_bank

FACTS = scenes.sample(64, seed=5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 63))
def test_a_picture_depends_on_its_seed_and_index_alone(index):
    alone = {name: values[index : index + 1] for name, values in scenes.sample(64, seed=5).items()}
    picture, mask = scenes.render(FACTS, index, seed=5)
    again, _ = scenes.render(FACTS, index, seed=5)
    assert (picture == again).all()
    assert (scenes.render(FACTS, index, seed=6)[0] != picture).any()
    assert len(alone["kind"]) == 1
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == mask.dtype == np.uint8


@pytest.mark.parametrize("index", range(12))
def test_the_mask_is_where_the_colour_of_the_bird_shows(index):
    """Another colour of the bird changes pixels inside the mask only (edges of sketches: one further)."""
    changed = {name: values.copy() for name, values in FACTS.items()}
    changed["colour"][index] = (changed["colour"][index] + 1) % 8
    changed["style"][index] = FACTS["style"][index] = 0
    (before, mask), (after, _) = scenes.render(FACTS, index, 5), scenes.render(changed, index, 5)
    differs = (before != after).any(-1)
    assert differs[mask > 0].mean() > 0.3  # wing, bill and legs keep the kind's own colours
    assert not differs[mask == 0].any()


@pytest.mark.parametrize("alignment", [0.5, 0.9, 1.0])
def test_alignment_is_the_share_of_birds_where_they_live(alignment):
    facts = scenes.sample(4000, seed=1, alignment=alignment)
    at_home = (facts["kind"] >= 4) == (facts["place"] >= 4)
    assert at_home.mean() == pytest.approx(alignment, abs=0.03)  # four standard errors of 4,000 draws at 0.5


def test_factors_are_independent_of_each_other_on_a_balanced_split():
    facts = scenes.sample(20000, seed=2)
    for a in facts:
        for b in facts:
            if a < b:
                joint = np.zeros((8, 8))
                np.add.at(joint, (facts[a], facts[b]), 1 / 20000)
                product = np.outer(joint.sum(1), joint.sum(0))
                # Four standard errors of a cell at its largest, 1/16.
                assert abs(joint - product).max() < 0.008


def test_no_two_splits_share_a_seed():
    from demo.images import DemoBirds, DemoSigns
    from demo.score import WATCHED

    training = [1000, 2000, 4000, 4500]  # and up, by the seed of the training
    seeds = [*DemoBirds.seeds.values(), *DemoSigns.seeds.values(), WATCHED, *training]
    assert len(set(seeds)) == len(seeds)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 63), st.integers(0, 2**32 - 1), st.sampled_from([captions.GUIDE, captions.WEB]))
def test_a_caption_says_what_is_true_and_only_what_it_states(index, seed, habits):
    truth = captions.true_facts(FACTS)[index]
    text, stated = captions.write(truth, habits, np.random.default_rng(seed))
    for column, name in enumerate(captions.STATED):
        # Snowy is a colour, snowy peaks are a place.
        words = text.replace("snowy peaks", "peaks") if name == "colour" else text
        said = [
            v for v, phrases in enumerate(captions.PHRASES[name]) for p in phrases if f" {p} " in f" {words} "
        ]
        assert set(said) == ({int(truth[column])} if stated[column] >= 0 else set())
        assert stated[column] in (-1, truth[column])


def test_the_guide_never_says_landbird_and_the_web_never_names_a_kind():
    rng = np.random.default_rng(0)
    truth = captions.true_facts(FACTS)
    guide = " ".join(captions.write(truth[i % 64], captions.GUIDE, rng)[0] for i in range(500)).split()
    web = " ".join(captions.write(truth[i % 64], captions.WEB, rng)[0] for i in range(500)).split()
    assert not {"landbird", "waterbird"} & set(guide)
    assert not set(scenes.FACTORS["kind"]) & set(web)
    assert {"landbird", "waterbird"} <= set(web)  # the test would see them
    assert set(scenes.FACTORS["kind"]) <= set(guide)


@pytest.mark.parametrize(("name", "written"), [(demo.NAME, False), (demo.WRITTEN, True)])
def test_the_vocabulary_files_are_what_captions_are_made_of(name, written):
    assert (demo.FOLDER / demo.VOCABULARIES[name]).read_text().split() == captions.vocabulary(written)


def test_the_tokenizer_is_one_number_per_word_and_the_end_is_the_largest():
    _, _, tokenizer = demo.load(weights=None)
    tokens = tokenizer(["a red bird", "A bird."])
    assert tokens.shape == (2, 24)
    assert tokens[0, 1] == tokens[1, 1]  # "a"
    assert tokens[0, 3] == tokens[1, 2]  # "bird"
    assert tokens.argmax(dim=1).tolist() == [4, 3]
    assert tokens.max() == len(captions.vocabulary()) + 2


@pytest.mark.parametrize(
    ("text", "message"), [("a zebra", "'zebra'"), ("bird " * 23, "22 words at most, got 23")]
)
def test_the_tokenizer_refuses_what_the_model_cannot_read(text, message):
    _, _, tokenizer = demo.load(weights=None)
    with pytest.raises(ValueError, match=message):
        tokenizer([text])


def test_the_demos_bank_speaks_the_demos_words_and_covers_every_factor():
    bank = load_bank(demo.FOLDER / "text_bank.txt")
    assert {word for text in bank.texts for word in text.split()} <= set(captions.vocabulary())
    for values in captions.PHRASES.values():
        for phrases in values:
            assert any(f" {phrase} " in f" {text} " for phrase in phrases for text in bank.texts), phrases


def test_the_bank_of_the_written_world_adds_texts_about_words():
    bank, more = (load_bank(demo.FOLDER / demo.BANKS[name]) for name in (demo.NAME, demo.WRITTEN))
    assert more.texts[: len(bank.texts)] == bank.texts
    assert set(more.categories[len(bank.texts) :]) == {"words"}
    assert {word for text in more.texts for word in text.split()} <= set(captions.vocabulary(written=True))
    for word in WORDS:
        assert any(f" {word} " in f" {text} " for text in more.of("words"))


def test_without_a_bird_only_the_place_is_drawn():
    with_bird, mask = scenes.render(FACTS, 3, 5)
    without, nothing = scenes.render(FACTS, 3, 5, bird=False)
    assert mask.any()
    assert not nothing.any()
    assert (with_bird != without).any(axis=2)[mask > 127].mean() > 0.5


@pytest.fixture(scope="module")
def signs():
    _, _, tokenizer = demo.load(weights=None, name=demo.WRITTEN)
    return Signs(64, 4000, np.random.default_rng(0), tokenizer)


@pytest.mark.parametrize("step", [0, 1, 500, 3000, 3001])
def test_an_explicit_caption_fits_its_own_word_and_a_plain_noun_what_is_seen_or_written(signs, step):
    """Every match worked out from the words of the captions, and what the pictures show and bear."""
    drawn, explicit, plain = [], signs.explicit, signs.plain

    def keep(draw, name):
        return lambda *args: drawn.append((name, *draw(*args))) or drawn[-1][1:]

    signs.explicit, signs.plain = keep(explicit, "explicit"), keep(plain, "plain")
    try:
        _, tokens, matches = signs.batch(32, step)
    finally:
        del signs.explicit, signs.plain
    assert tokens.shape[0] == len(drawn) == 32
    kinds = scenes.FACTORS["kind"]
    nouns = 0
    for i, (sort, _, text, _, _) in enumerate(drawn):
        noun = next((kinds.index(word) for word in text.split() if word in kinds), None)
        for j, (_, _, _, _, truth) in enumerate(drawn):
            seen, word = int(truth[0]), int(truth[-1])
            if sort == "plain" and noun is not None and noun not in (seen, word):
                assert not matches[i, j]
                nouns += 1
            said = [
                kind
                for kind in kinds
                if any(p.format(kind) in text for p in captions.BESIDE + captions.ALONE)
            ]
            if sort == "explicit" and kinds.index(said[0]) != word:
                assert not matches[i, j]
                nouns += 1
        assert matches[i, i]
    assert nouns > 100


def test_letters_lie_within_a_row_of_patches_at_first_and_anywhere_later(signs):
    def phases(jitter):
        tops = [place("gull", np.random.default_rng(i), jitter)[0] for i in range(300)]
        return {(top + 1) % 8 for top in tops if 0 < top < 55}

    assert phases(0) == {0}
    assert phases(1) == {7, 0, 1}
    assert phases(8) == set(range(8))
    assert (
        len({tuple(signs.write(np.zeros((64, 64, 3), np.uint8), 5, 0).max(axis=(0, 1))) for _ in range(20)})
        == 1
    )


def test_a_caption_that_states_less_matches_more_pictures():
    rng = np.random.default_rng(0)
    _, _, tokenizer = demo.load(weights=None)
    source = train.Source(64, 7, 0.5, dict.fromkeys(captions.STATED, 0.0), rng, tokenizer)
    _, _, matches = source.batch(32)
    assert (matches == 1).all()  # "a bird" is true of every picture
    source.habits = captions.GUIDE
    _, _, matches = source.batch(32)
    assert (matches.diagonal() == 1).all()
    assert 0.03 < matches.mean() < 0.5


def test_the_loss_is_zero_where_probability_lies_evenly_on_the_matches():
    images = torch.eye(4)
    texts = torch.stack([images[0] + images[1], images[0] + images[1], images[2], images[3]])
    matches = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).float()
    assert train.contrastive_loss(images, texts, torch.tensor(100.0), matches) < 1e-6
    assert train.contrastive_loss(images, texts.flip(0), torch.tensor(100.0), matches) > 1


def test_normalise_is_the_demos_image_transform():
    from PIL import Image

    _, preprocess, _ = demo.load(weights=None)
    picture, _ = scenes.render(FACTS, 0, 5)
    assert torch.allclose(demo.normalise(picture[None])[0], preprocess(Image.fromarray(picture)), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_training_learns_and_writes_a_checkpoint_that_loads(tmp_path, capsys, monkeypatch):
    score = train.score
    monkeypatch.setattr(train, "score", lambda model, tokenizer, count: score(model, tokenizer, count=256))
    out = tmp_path / "model.safetensors"
    train.main(["--steps", "20", "--pictures", "300", "--batch-size", "32", "--out", str(out)])
    model, _, _ = demo.load(weights=out)
    fresh, _, _ = demo.load(weights=None)
    assert not torch.equal(model.visual.proj, fresh.visual.proj)
    assert not list(tmp_path.glob("*.partial"))
    assert "light 0." in capsys.readouterr().out


@pytest.mark.slow
def test_the_checkpoint_tells_kinds_places_colours_light_and_styles():
    """On the split that training watched; those of the test split are reported (python -m demo.score)."""
    from demo.score import score

    model, _, tokenizer = demo.load()
    scores = score(model, tokenizer, count=512)
    floors = {
        "kind": 0.88,
        "place": 0.98,
        "colour": 0.90,
        "light": 0.95,
        "style": 0.95,
        "land-land": 0.95,
        "water-water": 0.95,
    }
    # Two standard errors of 512 at 0.9.
    assert {name: scores[name] for name in floors if scores[name] < floors[name] - 0.03} == {}
    chance, _, _ = demo.load(weights=None)
    assert score(chance, tokenizer, count=512)["kind"] < 0.3
