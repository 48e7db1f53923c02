"""--task typographic: its maps, covered patches, other rules and counts, and a run from the command line."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import assert_refused, run
from small import EXACT, FAR
from test_decompose import build, far, pictures, sentences
from test_written import save

import demo
from attention import attention_calls
from decompose import decompose, head_maps
from demo.images import DemoSigns
from demo.writing import WORDS, letters
from tasks.attribution import map_of_heads
from tasks.reading import Rules, cover, overlap, picks
from tasks.typographic import Tally, other_heads
from written import SAYS

HEADS = [(0, 2), (2, 0), (2, 3)]


def test_a_map_sums_to_what_these_heads_write_of_the_patches():
    """The rest of their terms has the class token as its source, which the decomposition gives apart."""
    model = build()
    images, texts = pictures(model, batch=5), sentences(model)
    terms, maps = decompose(model, images), head_maps(model)
    of_patches = torch.einsum("bLHe,LHed->bLHd", terms.values - terms.own, maps)
    expected = sum((of_patches[:, layer, head] * texts).sum(dim=-1) for layer, head in HEADS)
    heat = map_of_heads(model, images, HEADS, texts, chunk=2)
    assert heat.shape == (5, 2, 3)
    assert far(heat.sum(dim=(1, 2)), expected) < EXACT
    assert far(heat, map_of_heads(model, images, HEADS, texts, chunk=5)) < EXACT
    assert far(map_of_heads(model, images, HEADS[:2], texts).sum(dim=(1, 2)), expected) > FAR


def test_covered_patches_take_the_mean_of_the_others_and_the_others_stay():
    """The patches left and right of a hot one are covered, too; those above and below it stay."""
    images = torch.randn(2, 3, 12, 20)  # 3 x 5 patches
    heat = torch.zeros(2, 3, 5)
    heat[0, 1, 0], heat[0, 1, 4], heat[1] = 0.6, 0.4, -1.0
    covered = cover(images, heat, bar=0.5)
    hidden = torch.zeros(12, 20, dtype=torch.bool)
    hidden[4:8, :8] = True
    expected = torch.where(hidden, images[0][:, ~hidden].mean(dim=1)[:, None, None], images[0])
    torch.testing.assert_close(covered[0], expected)
    assert torch.equal(covered[1], images[1])
    assert not torch.equal(cover(images, heat, bar=0.3)[0], covered[0])


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 64)] * 4), st.sampled_from([(4, 4), (8, 8), (2, 7)]))
def test_a_patch_overlaps_a_box_if_they_share_a_pixel(edges, grid):
    top, bottom = sorted(edges[:2])
    left, right = sorted(edges[2:])
    assume(top < min(bottom, 56) and left < min(right, 56))
    side = 56  # divisible by every grid
    box = torch.tensor([[top, left, bottom, right]]).clamp(max=side)
    pixels = torch.zeros(side, side)
    pixels[top:bottom, left:right] = 1
    patches = pixels.unflatten(0, (grid[0], -1)).unflatten(2, (grid[1], -1)).amax(dim=(1, 3))
    assert overlap(box / side, grid).tolist() == [patches.flatten().tolist()]


def test_the_rules_measures_are_those_of_loops_over_heads_and_directions():
    model, inside = build(), torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]])
    images = pictures(model)
    rules = Rules(depth=3, prefix=1, width=8, seed=0)
    rules.update(model, images, inside)
    with torch.no_grad(), attention_calls() as calls:
        model.encode_image(images)
    for layer in range(3):
        for head in range(4):
            attended, sampled = [], []
            for b in range(2):
                A, v = calls[layer].attention()[b, head, 0], calls[layer].v[b, head]
                attended.append(float((A[1:] * inside[b]).sum() / A[1:].sum()))
                for d in rules.directions.double():
                    heat = [
                        float(A[t] * (v[t] @ d - sum(A[s] * (v[s] @ d) for s in range(7)))) for t in range(7)
                    ]
                    heat = np.clip(heat, 0, 1)[1:]
                    sampled.append((heat * inside[b].numpy()).sum() / max(heat.sum(), 1e-12))
            assert float(rules.mean("attention")[layer, head]) == pytest.approx(np.mean(attended), abs=1e-6)
            assert float(rules.mean("sampled")[layer, head]) == pytest.approx(np.mean(sampled), abs=1e-6)


def test_each_rule_takes_its_heads():
    measures = {name: torch.zeros(5, 4) for name in ("attention", "sampled", "word")}
    measures["attention"][1, 2], measures["attention"][4, 0], measures["attention"][0, 3] = 0.9, 0.8, 0.7
    measures["sampled"][2, 1], measures["sampled"][4, 3] = 9.0, 1.0  # layer 2 is too early
    measures["word"][4, 3], measures["word"][3, 3] = 0.31, 0.29
    found = picks(measures, 2)
    assert found["attention to the word's patches"] == [(1, 2), (4, 0)]
    assert found["sampled directions"] == [(4, 3)]
    assert found["true word"] == [(4, 3)]


def test_other_heads_are_drawn_from_those_that_were_not_chosen():
    found = other_heads([(0, 1), (1, 2)], (2, 3), draws=50, seed=0)
    assert len(found) == 50
    assert all(len({*heads}) == 2 for heads in found)
    assert {head for heads in found for head in heads} == {(0, 0), (0, 2), (1, 0), (1, 1)}
    assert found != other_heads([(0, 1), (1, 2)], (2, 3), draws=50, seed=1)
    assert other_heads([(0, i) for i in range(3)] + [(1, 0)], (2, 3), 5, 0) == []  # two are left for four


def test_the_shares_are_counted_over_images():
    class Test:
        seen, written = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
        variants = ("clean", "attacked")

    tally = Tally(Test)
    eye = torch.eye(3)
    twice = lambda rows: torch.cat([rows, rows], dim=1)  # noqa: E731 of the classes, and that they are written
    tally.update("clean", torch.stack([twice(eye[[0, 1, 1]]), twice(eye)]), torch.tensor([0, 1, 2]))
    # base says what is written; without the reading heads the first two are seen, and the third is not
    tally.update("attacked", torch.stack([twice(eye[[1, 2]]), twice(eye[[0, 1]])]), torch.tensor([0, 1]))
    tally.update("attacked", torch.stack([twice(eye[[0]]), twice(eye[[1]])]), torch.tensor([2]))
    base, ablated = tally.rows()
    assert base == {"clean": pytest.approx(2 / 3), "attacked": 0, "read": 1}
    assert ablated == {"clean": 1, "attacked": pytest.approx(2 / 3), "read": 0}
    assert tally.answers() == {"seen": pytest.approx(2 / 3), "written": 1, "both": pytest.approx(2 / 3)}


# The demo's signs.


def test_signs_differ_from_the_clean_picture_inside_their_boxes_alone():
    data = DemoSigns("test", lambda image: np.asarray(image).astype(int), limit=12)
    for index in range(len(data)):
        clean, attacked, blank = (data.load(index, name) for name in ("clean", "attacked", "blank"))
        top, left, bottom, right = (round(64 * edge) for edge in data.boxes[index].tolist())
        outside = np.ones((64, 64), bool)
        outside[top:bottom, left:right] = False
        assert (clean == attacked)[outside].all()
        assert (clean == blank)[outside].all()
        ink = (attacked != blank).any(axis=2)[top:bottom, left:right]
        word = letters(WORDS[int(data.written[index])])
        assert ink.sum() == word.sum()  # all that a blank sign lacks are the letters
        assert (clean != attacked)[top:bottom, left:right].any()


def test_test_pictures_never_bear_their_own_name_and_reference_words_are_random():
    test = DemoSigns("test", None)
    assert (test.seen != test.written).all()
    reference = DemoSigns("train", None)
    own = float((reference.seen == reference.written).float().mean())
    assert own == pytest.approx(1 / 8, abs=0.03)  # four standard errors of 2,000 draws


@pytest.mark.parametrize("word", ["zoë", "gull 2", ""])
def test_the_demos_font_refuses_other_letters(word):
    with pytest.raises(ValueError, match="A to Z"):
        letters(word)


def test_a_word_wider_than_a_picture_is_refused():
    assert letters("woodpecker").shape == (7, 59)
    with pytest.raises(ValueError, match="71 pixels wide"):
        letters("woodpeckerss")


# The command line.

QUICK = ("--task typographic --limit 48 --draws 4 --workers 0 --heads 3.1,3.4",)


def test_the_task_measures_every_variant_in_every_way(tmp_path):
    ran = run(tmp_path, *QUICK)
    assert ran.code == 0
    rows = ran.results["rows"]
    ways = ["base", "heads mean-ablated", "  + MLPs", "cue's directions in the heads"]
    ways += ["cue's directions everywhere", "heads in the forward pass", "  with zeros (Dyslexify)"]
    ways += ["oblique erasure (LEACE)", "read patches covered", "cue's directions in the class texts"]
    ways += [
        "Orth-Proj (all texts)",
        "Orth-Cal",
        "PerceptionCLIP",
        "RoboShot",
        "  + classes accepted",
        "TIE*",
    ]
    assert list(rows) == ways
    for row in rows.values():
        assert list(row) == ["clean", "attacked", "own", "blank", "read"]
        assert all(0 <= share <= 1 for share in row.values())
    assert ran.results["random"]["draws"] == len(ran.results["random"]["shared"]) == 4
    assert len(ran.results["others"]) == 4
    assert {"mean", "std", "max"} == set(ran.results["random"]["attacked"])
    assert "no word" in ran.out
    sheet = Image.open(tmp_path / "results" / "typographic" / "sheet.png")
    assert sheet.width > 1000


@pytest.mark.slow
def test_the_rows_are_those_of_the_images_one_by_one(tmp_path):
    """Base, ablation and the forward pass, worked out with the library alone."""
    from forward import class_values, forward_without
    from zeroshot import classifier, load_clip, templates

    rows = run(tmp_path, *QUICK).results["rows"]
    clip = load_clip(demo.WRITTEN)
    test, reference = (DemoSigns(split, clip.preprocess, 48) for split in ("test", "train"))
    classes, maps = classifier(clip, WORDS, templates(clip)), head_maps(clip.model)
    before = torch.stack([reference[i][0] for i in range(48)])
    values, z = decompose(clip.model, before).values.mean(dim=0), class_values(clip.model, before).mean(dim=0)
    for variant in ("clean", "attacked", "own", "blank"):
        images = torch.stack([test.load(i, variant) for i in range(48)])
        terms = decompose(clip.model, images)
        changed = {"base": terms.embedding, "heads mean-ablated": terms.embedding}
        for layer, head in ((3, 1), (3, 4)):
            away = (values - terms.values)[:, layer, head] @ maps[layer, head]
            changed["heads mean-ablated"] = changed["heads mean-ablated"] + away
        changed["heads in the forward pass"] = forward_without(clip.model, images, [(3, 1), (3, 4)], z)
        for label, embedding in changed.items():
            right = ((embedding @ classes.T).argmax(dim=1) == test.seen).float().mean()
            assert rows[label][variant] == pytest.approx(float(right), abs=1e-6)


def test_photographs_of_others_run_through_the_same_table(tmp_path):
    for i, (seen, word) in enumerate((("crow", "gull"), ("duck", "heron"), ("gull", "duck"))):
        save(tmp_path / "data" / f"label={seen}_text={word}{'.png' if i else '.jpg'}", size=(80, 64))
    ran = run(tmp_path, "--task typographic --heads 3.1 --draws 2 --workers 0", "--data", tmp_path / "data")
    assert ran.code == 0
    assert list(ran.results["rows"]["base"]) == ["attacked", "read"]
    assert "rules" not in ran.results  # where the words stand is not known


@pytest.mark.slow
@pytest.mark.parametrize("task", ["waterbirds", "debias"])
def test_removal_in_the_forward_pass_is_a_row_of_other_tasks_too(tmp_path, task):
    more = "" if task == "waterbirds" else "--classes crow gull"
    argv = f"--task {task} --limit 96 --draws 2 --workers 0 --heads 3.1,3.4 --remove forward heads {more}"
    rows = run(tmp_path, argv).results["rows"]
    assert "heads in the forward pass" in rows
    assert rows["heads in the forward pass"] != rows["base"]
    assert "heads in the forward pass" not in run(tmp_path, argv.replace("forward ", "")).results["rows"]


def test_a_folder_without_the_pattern_is_refused_in_one_line(tmp_path, capsys):
    save(tmp_path / "data" / "label=dog_text=cat.png")
    save(tmp_path / "data" / "dog.png")
    assert_refused(
        tmp_path, capsys, ["--task typographic --data", tmp_path / "data"], "label=dog_text=cat.png"
    )


def test_directions_of_words_are_directions_of_birds_and_those_of_places_are_not():
    """Why projecting the class texts fails here, as projecting the images does: they lose the class."""
    from cue import subspace
    from rivals import orth_proj
    from zeroshot import classifier, embed_texts, load_bank, load_clip, templates

    clip = load_clip(demo.WRITTEN)
    kinds = classifier(clip, WORDS, templates(clip))
    differences = kinds - kinds.mean(dim=0)
    places = embed_texts(clip, load_bank(demo.FOLDER / "text_bank.txt").of("places"))
    left = {
        name: float(
            (differences @ orth_proj(subspace(texts)).float()).square().sum() / differences.square().sum()
        )
        for name, texts in {"words": classifier(clip, WORDS, SAYS), "places": places}.items()
    }
    assert left["words"] < 0.75 < 0.99 < left["places"], left
