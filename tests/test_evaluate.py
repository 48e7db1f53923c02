"""The command line, run in-process on the demo and on a small folder in Waterbirds' format."""

import csv
import json
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from runs import words
from safetensors.torch import load_file, save_file

import demo
from decompose import decompose
from demo.images import DemoBirds
from evaluate import main
from tasks.heads import parse_heads
from tasks.tables import images_per_text, wilson
from tasks.waterbirds import wilson_of_smallest
from zeroshot import classifier, load_clip, templates

QUICK = ["--limit 96 --batch-size 48 --workers 0 --draws 5"]


def run(tmp_path, *argv):
    argv = words(*argv)
    code = main([*argv, "--out", str(tmp_path / "results")])
    task = argv[argv.index("--task") + 1]
    path = tmp_path / "results" / task / "results.json"
    return code, json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def waterbirds(tmp_path_factory):
    """36 pictures of the demo in a folder like that of Waterbirds: all groups in every split."""
    root = tmp_path_factory.mktemp("waterbirds")
    data = DemoBirds("val", lambda image: image, limit=400)
    rows, used = [], set()
    for split in range(3):
        for group in range(4):
            match = [i for i in range(len(data)) if 2 * data.y[i] + data.place[i] == group and i not in used][
                :3
            ]
            for i in match:
                used.add(i)
                name = f"{i % 7:03d}.Kind/bird_{i}.jpg"
                (root / name).parent.mkdir(exist_ok=True)
                data[i][0].save(root / name)
                rows.append(
                    {
                        "img_id": i,
                        "img_filename": name,
                        "y": int(data.y[i]),
                        "split": split,
                        "place": int(data.place[i]),
                    }
                )
    write_metadata(root, rows)
    return root


def write_metadata(root, rows):
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_metadata(root):
    with (root / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def broken(waterbirds, tmp_path):
    """A copy of the folder, to be damaged."""
    import shutil

    return shutil.copytree(waterbirds, tmp_path / "data")


# What it computes.


def test_check_reports_an_error_below_the_tolerance(tmp_path, capsys):
    code, results = run(tmp_path, "--task check --limit 8 --workers 0")
    assert code == 0
    assert len(results["errors"]) == 3
    assert all(
        0 < error < 1e-5 for error in results["errors"].values()
    )  # float32 rounds: an error of exactly 0 compared nothing
    assert "1e-05" in capsys.readouterr().out


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    code, results = run(tmp_path_factory.mktemp("run"), "--task waterbirds", *QUICK)
    assert code == 0
    return results


@pytest.fixture(scope="module")
def by_hand():
    """The same images by the plainest route: all terms of all images, in embedding space."""
    clip = load_clip(device="cpu")
    sets = {split: DemoBirds(split, clip.preprocess, 96, seed=0) for split in ("train", "test")}
    terms = {
        split: decompose(clip.model, torch.stack([data[i][0] for i in range(len(data))]))
        for split, data in sets.items()
    }
    classes = classifier(clip, ["landbird", "waterbird"], templates(clip))
    return clip, sets["test"], terms, classes


def accuracies(embedding, classes, test):
    right = (F.normalize(embedding, dim=-1) @ classes.T).argmax(1) == test.y
    return [
        right[2 * test.y + test.place == g].double().mean().item() for g in range(4)
    ], right.double().mean().item()


def same(row, expected):
    groups, average = expected
    assert list(row["groups"].values()) == pytest.approx(groups)
    assert row["average"] == pytest.approx(average)
    assert row["worst"] == min(row["groups"].values())


def test_base_is_the_stock_model(table, by_hand):
    clip, test, _, classes = by_hand
    with torch.no_grad():
        embedding = clip.model.encode_image(torch.stack([test[i][0] for i in range(len(test))]))
    same(table["rows"]["base"], accuracies(embedding, classes, test))


def test_heads_ablated_are_embeddings_with_those_terms_at_their_reference_mean(table, by_hand):
    _, test, terms, classes = by_hand
    heads = terms["test"].heads.clone()
    for layer, head in table["heads"]:
        heads[:, layer, head] = terms["train"].heads[:, layer, head].mean(dim=0)
    embedding = terms["test"].embedding - terms["test"].heads.sum((1, 2)) + heads.sum((1, 2))
    same(table["rows"]["heads mean-ablated"], accuracies(embedding, classes, test))
    embedding = (
        embedding
        + (terms["train"].mlps.mean(0) - terms["test"].mlps).sum(1)
        + terms["train"].stem.mean(0)
        - terms["test"].stem
    )
    same(table["rows"]["  + MLPs and stem"], accuracies(embedding, classes, test))


def test_directions_removed_leave_nothing_of_the_cue_that_differs_between_images(table, by_hand):
    from cue import subspace
    from zeroshot import default_bank, embed_texts, load_bank

    clip, test, terms, classes = by_hand
    Q = subspace(embed_texts(clip, load_bank(default_bank(clip)).of("places")))
    project = lambda x: x @ Q.T @ Q  # noqa: E731
    embedding = terms["test"].embedding + project(terms["train"].embedding.mean(0) - terms["test"].embedding)
    assert (embedding @ Q.T).var(dim=0).max() < 1e-6 < (terms["test"].embedding @ Q.T).var(dim=0).min()
    same(table["rows"]["cue's directions everywhere"], accuracies(embedding, classes, test))
    embedding = terms["test"].embedding.clone()
    for layer, head in table["heads"]:
        embedding += project(
            terms["train"].heads[:, layer, head].mean(0) - terms["test"].heads[:, layer, head]
        )
    same(table["rows"]["cue's directions in the heads"], accuracies(embedding, classes, test))


def test_the_random_control_draws_as_many_heads(table):
    control = table["random"]
    assert control["draws"] == 5
    assert control["worst"]["std"] > 0  # the draws differ
    assert control["worst"]["mean"] <= control["worst"]["max"] <= 1


@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path):
    """auto lifts the worst group by 20 points, above all draws; directions cost kinds at most 2 points."""
    code, results = run(tmp_path, "--task waterbirds --limit 1500 --batch-size 250")
    rows, random = results["rows"], results["random"]
    assert code == 0
    assert 0.25 <= rows["base"]["worst"] <= 0.60
    assert rows["heads mean-ablated"]["worst"] >= rows["base"]["worst"] + 0.20
    assert rows["heads mean-ablated"]["average"] > rows["base"]["average"]
    assert random["draws"] == 100
    assert random["worst"]["max"] < rows["heads mean-ablated"]["worst"]
    assert random["worst"]["mean"] < rows["heads mean-ablated"]["worst"] - 0.1
    assert rows["cue's directions in the heads"]["worst"] >= rows["base"]["worst"] + 0.20
    assert rows["cue's directions in the heads"]["kinds"] >= rows["base"]["kinds"] - 0.02


@pytest.mark.slow
def test_without_another_set_to_draw_there_is_no_control(tmp_path, capsys):
    code, results = run(
        tmp_path, "--task waterbirds", *QUICK, "--heads", ",".join(f"3.{h}" for h in range(8))
    )
    assert code == 0
    assert results["random"] is None
    assert "Random: none" in capsys.readouterr().out


def test_the_interventions_change_the_predictions(table):
    base, *others = (row["average"] for row in table["rows"].values())
    assert base not in others


@pytest.mark.slow
def test_another_seed_draws_other_images(tmp_path, table):
    _, other = run(tmp_path, "--task waterbirds", *QUICK, "--seed 1")
    assert other["rows"]["base"] != table["rows"]["base"]


@pytest.mark.slow
def test_a_cue_can_be_given_as_texts(tmp_path):
    code, results = run(
        tmp_path, "--task waterbirds", *QUICK, "--cue", "in a forest", "on the ocean", "at the beach"
    )
    assert code == 0
    assert "'in a forest' and 2 more" in results["settings"]["cue"]


def test_heads_given_by_hand_are_the_ones_ablated(tmp_path):
    _, results = run(tmp_path, "--task waterbirds", *QUICK, "--heads 3.7,0.2 --remove heads")
    assert results["heads"] == [[0, 2], [3, 7]]
    assert list(results["rows"]) == ["base", "heads mean-ablated", "  + MLPs and stem"]


def test_removing_the_cue_everywhere_needs_no_heads(tmp_path):
    argv = ["--task waterbirds", *QUICK, "--remove embedding", "--cue", "a bird", "one bird", "the bird"]
    code, results = run(tmp_path, *argv)
    assert code == 0
    assert list(results["rows"]) == ["base", "cue's directions everywhere"]
    assert results["random"] is None
    assert "none" in results["settings"]["heads"]


@pytest.mark.slow
def test_textspan_names_every_head(tmp_path, capsys):
    code, results = run(tmp_path, "--task textspan", *QUICK)
    assert code == 0
    assert [head["head"] for head in results["heads"]] == [
        f"{layer}.{head}" for layer in range(4) for head in range(8)
    ]
    bank = set((demo.FOLDER / "text_bank.txt").read_text().splitlines())
    for head in results["heads"]:
        shares = [share for _, share in head["texts"]]
        assert {text for text, _ in head["texts"]} <= bank
        assert sum(shares) + head["remainder"] == pytest.approx(1)
        assert sum(head["texts by category"].values()) == pytest.approx(sum(shares))
    assert results["heads"][-1]["texts"][0][0] in capsys.readouterr().out


def test_the_real_folder_and_a_local_checkpoint_run_as_the_demo_does(tmp_path, waterbirds, capsys):
    """The checkpoint is the demo's own, given as a user would give another model's."""
    argv = ["--data", str(waterbirds), "--workers 0 --draws 3 --heads 3.1"]
    code, results = run(tmp_path, "--task waterbirds", *argv)
    assert code == 0
    assert results["settings"]["test"].endswith("test split, 12 images")
    assert "kinds" not in results["rows"]["base"]
    assert "authors" not in results["settings"]["means"]
    _, authors = run(tmp_path, "--task waterbirds", *argv, "--reference test")
    assert "the authors' way" in authors["settings"]["means"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of open_clip's smallest text tower, as a user's own configuration and checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 6, "width": 32, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-vit.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-vit")
    save_file(model.state_dict(), folder / "tiny.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "tiny.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tiny.safetensors", "tiny.pt"])
def test_any_open_clip_model_runs_with_its_own_tokenizer_and_the_general_bank(
    tmp_path, tiny, waterbirds, file
):
    argv = ["--model tiny-vit", "--pretrained", str(tiny / file), "--data", str(waterbirds), "--workers 0"]
    code, results = run(tmp_path, "--task waterbirds", *argv, "--heads 5.0,2.1 --draws 3")
    assert code == 0
    assert "  + earlier layers" in results["rows"]
    assert "80 templates" in results["settings"]["prompts"]
    assert file in results["settings"]["model"]
    code, results = run(tmp_path, "--task textspan", *argv, "--texts 3")
    assert code == 0
    assert {head["head"][0] for head in results["heads"]} == set("2345")  # the last four layers


def test_random_weights_are_enough_to_check(tmp_path, tiny):
    code, results = run(tmp_path, "--task check --model tiny-vit --pretrained none --limit 4 --workers 0")
    assert code == 0
    assert "none" in results["settings"]["model"]


def test_half_precision_is_checked_with_its_own_tolerance(tmp_path):
    code, results = run(tmp_path, "--task check --precision bf16 --limit 8 --workers 0")
    assert code == 0
    assert 1e-5 < max(results["errors"].values()) < 3e-2


@pytest.mark.parametrize(("right", "count"), [(0.5, 10), (0.0, 5), (1.0, 100)])
def test_wilson_is_the_set_of_rates_that_the_data_do_not_contradict(right, count):
    for bound in wilson(right, count):
        assert (right - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-12)


@pytest.mark.parametrize(
    "truth", [(0.5,) * 4, (0.9,) * 4, (0.6, 0.9, 0.9, 0.9), (0.9, 0.9, 0.6, 0.9), (0.6, 0.61, 0.62, 0.63)]
)
def test_the_interval_of_the_worst_group_holds_the_smallest_true_accuracy(truth):
    counts, rng = (2255, 2255, 642, 642), np.random.default_rng(0)  # of Waterbirds
    held, of_one_group, low, high = 0, 0, 0, 0
    for rights in rng.binomial(counts, truth, (4000, 4)) / counts:
        start, end = wilson_of_smallest(rights, counts)
        held += start <= min(truth) <= end
        low, high = low + (min(truth) < start), high + (end < min(truth))
        worst = int(rights.argmin())
        start, end = wilson(rights[worst], counts[worst])
        of_one_group += start <= min(truth) <= end
    # Three standard errors: of 95 % of 4,000 runs, .0103; of the 2.5 % that either side may miss, .0074.
    assert held / 4000 > 0.94
    assert max(low, high) / 4000 < 0.033
    if len(set(truth)) == 1:  # what was wrong with the worst group's own interval
        assert of_one_group / 4000 < 0.93


def test_the_interval_of_one_group_is_wilsons():
    assert wilson_of_smallest([0.7], [50]) == pytest.approx(wilson(0.7, 50))
    assert wilson_of_smallest([0.7, 0.7], [50, 50])[1] > wilson(0.7, 50)[1]


def test_few_images_per_text_are_warned_of():
    assert "WARNING" not in images_per_text(100, 10, 46)
    assert images_per_text(99, 10, 46).startswith(
        "99 images fit 10 of 46 texts best, 9.9 images per text; WARNING"
    )


def test_how_many_images_and_texts_chose_the_heads_is_printed(tmp_path, capsys):
    _, results = run(tmp_path, "--task waterbirds --limit 60 --workers 0 --draws 1")
    said = results["settings"]["cue"]
    assert re.search(r"; 60 images fit \d+ of 46 texts best, \d\.\d images per text; WARNING: below 10", said)
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_heads_that_were_not_chosen_are_not_said_to_have_no_role(tmp_path):
    run(tmp_path, "--task waterbirds", *QUICK, "--draws 1 --heads 3.4")
    page = next(tmp_path.rglob("report.html")).read_text(encoding="utf-8")
    assert "not chosen" in page
    assert "no role" not in page


def test_heads_are_read_as_layer_and_head():
    assert parse_heads("3.7,2.10,3.7", 4, 12) == [(2, 10), (3, 7)]


# What it refuses; test_bad_input.py has the rest.


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--task waterbirds --data no/such/folder"], ["metadata.csv", "no/such/folder"]),
        (["--task waterbirds --limit 160", "--cue", "a bird", "one bird"], ["no head looks at the cue"]),
        (["--task textspan --texts 0"], ["'0'"]),
        (["--task check --device meta"], ["meta"]),
        (["--task check --model RN50 --pretrained none"], ["ModifiedResNet"]),
    ],
)
def test_bad_arguments(refused, argv, fragments):
    refused(argv, *fragments)


def test_a_file_that_is_no_image_is_named_by_workers_too(refused, broken):
    name = read_metadata(broken)[0]["img_filename"]
    (broken / name).write_text("not an image")
    refused(["--task waterbirds --workers 2", "--data", broken], name, "not an image")


def test_weights_of_another_architecture(refused, tmp_path, tiny):
    state = load_file(tiny / "tiny.safetensors")
    del state["visual.proj"]
    save_file(state, tmp_path / "other.safetensors")
    argv = ["--task check --model tiny-vit", "--pretrained", tmp_path / "other.safetensors"]
    refused(argv, "visual.proj", "tiny-vit")


def test_help_comes_without_torch():
    import subprocess
    import sys

    code = (
        "import sys, evaluate\ntry:\n    evaluate.main(['--help'])\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
