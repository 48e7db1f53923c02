"""All of open_clip's configurations; and every task on models that are not read out at a class token."""

import contextlib
import json
import logging
import os
import socket
import time
from collections import Counter, OrderedDict
from functools import lru_cache
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_evaluate import run, waterbirds  # noqa: F401

import demo
import loading
from decompose import decompose, heatmap, open_tower, token_scores
from evaluate import main
from files import InputError
from loading import activation, load_clip
from neurons import neurons
from tasks import check, models

EXACT = 1e-10
ONE_OF_EACH = {  # family, read-out
    "ViT-B-32": ("open_clip VisionTransformer", "class token"),
    "ViT-H-14-CLIPA": ("open_clip VisionTransformer", "mean of patches"),
    "coca_ViT-B-32": ("open_clip VisionTransformer", "attention pooling"),
    "ViT-B-16-SigLIP": ("timm VisionTransformer", "attention pooling"),
    "MobileCLIP2-L-14": ("timm VisionTransformer", "class token"),
    "MobileCLIP-B": ("timm VisionTransformer", "class token"),
    "ViTamin-S": ("timm VisionTransformer", "mean of patches"),
    "vit_medium_patch16_gap_256": ("timm VisionTransformer", "mean of patches"),
    "vit_relpos_medium_patch16_cls_224": ("timm VisionTransformerRelPos", "class token"),
    "PE-Core-T-16-384": ("timm Eva", "attention pooling"),
    "EVA01-g-14": ("timm Eva", "class token"),
    "EVA02-B-16": ("timm Eva", "class token"),
    "EVA02-E-14": ("timm Eva", "class token"),
}
listed = lru_cache(models.listed)


@pytest.mark.slow
def test_116_of_open_clips_144_configurations_can_be_decomposed_at_full_size():
    # Other tests add names of their own to open_clip.list_models().
    names = [path.stem for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")]
    if len(names) != 144:
        pytest.skip(f"counted on open_clip 3.3's 144 configurations, this release has {len(names)}")
    kinds = Counter(listed(name).refusal.split(",")[0] for name in names)
    assert kinds == {
        "": 116,
        "a ResNet has convolutions": 10,
        "a ConvNeXt has convolutions": 11,
        "a FastViT mixes tokens by convolutions in most stages": 6,
        "a Swin merges tokens between stages": 1,
    }


def test_nothing_is_allocated_for_a_configuration_at_full_size():
    tower = listed("ViT-bigG-14").tower
    assert len(tower.blocks) == 48
    assert all(parameter.is_meta for parameter in tower.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ONE_OF_EACH.items(), ids=ONE_OF_EACH)
def test_a_small_copy_is_of_its_family_and_sums_to_its_embedding(name, kind):
    found, model = listed(name), models.small(name)
    assert (found.family, found.tower.name) == kind
    assert type(open_tower(model).blocks[0]) is type(found.tower.blocks[0])
    assert max(check.small_errors(name)) < EXACT
    images = models.pictures(model)
    with torch.no_grad():
        stock = model.encode_image(images)
    stock = stock[0] if isinstance(stock, tuple) else stock
    assert torch.allclose(
        decompose(model, images).embedding, stock, rtol=EXACT, atol=EXACT * float(stock.abs().max())
    )


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])
def test_no_parameter_of_a_small_copy_is_trivial_and_no_term_is_zero(name):
    model = models.small(name)
    assert all(p.std() > 0 for p in model.parameters() if p.numel() > 1)
    terms = decompose(model, models.pictures(model))
    assert all(term.abs().min() > 0 for term in (terms.stem, terms.heads, terms.mlps, terms.constant))


def test_small_errors_are_not_small_once_a_block_is_spoilt(monkeypatch):
    small = models.small

    def spoilt(name):
        model = small(name)
        model.visual.transformer.resblocks[1].attn.register_forward_hook(
            lambda m, args, output: (output[0] * 1.1, *output[1:])
        )
        return model

    monkeypatch.setattr(models, "small", spoilt)
    assert check.small_errors("ViT-B-32")[0] > 1e-3


def test_check_all_prints_families_and_refusals(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        open_clip, "list_models", lambda: ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "convnext_base"]
    )
    code, results = run(tmp_path, "--task", "check", "--model", "all")
    out = capsys.readouterr().out
    assert code == 0
    assert "2 of 4 can be decomposed" in out
    assert "refused, a ResNet has convolutions, not a residual stream of attention heads: RN50" in out
    assert [row["readout"] for row in results["models"]] == ["class token", "", "attention pooling", ""]
    assert (tmp_path / "results" / "check" / "report.html").exists()


def test_check_all_fails_when_an_error_is_too_large(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-B-32"])
    monkeypatch.setattr(check, "small_errors", lambda name: [1e-3, 0.0, 0.0])
    assert main(["--task", "check", "--model", "all", "--out", str(tmp_path)]) == 2
    assert "ViT-B-32" in capsys.readouterr().err


def test_the_list_names_read_out_size_tags_and_reasons(monkeypatch, capsys):
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-L-14", "RN50", "PE-Core-L-14-336"])
    assert main(["--list-models"]) == 0
    large, resnet, pe = capsys.readouterr().out.splitlines()[2:5]
    assert "class token" in large
    assert "24 x 16" in large
    assert "laion2b_s32b_b82k" in large
    assert "a ResNet has convolutions" in resnet
    assert "attention pooling" in pe


# Every task on models that are read out otherwise.

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "layers": 5, "width": 32, "head_width": 8}
TOWERS = {
    "mean": {**VISION, "pool_type": "avg", "final_ln_after_pool": True},
    "normed-mean": {**VISION, "pool_type": "avg"},
    "queries": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3},
    "timm-map": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request, tmp_path_factory):
    """--model, --pretrained and the number of layers of a small model with that read-out."""
    folder = tmp_path_factory.mktemp(request.param)
    name = f"tiny-{request.param}"
    (folder / f"{name}.json").write_text(
        json.dumps({"embed_dim": 64, "vision_cfg": TOWERS[request.param], "text_cfg": TEXT})
    )
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors"
    )
    return ["--model", name, "--pretrained", str(folder / "weights.safetensors"), "--workers", "0"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank.txt"
    words = {
        "places": ["a forest", "a lake", "the sea", "a field"],
        "birds": ["a duck", "a gull"],
        "colours": ["red", "blue"],
    }
    path.write_text(
        "\n".join(line for category, texts in words.items() for line in (f"# {category}", *texts))
    )
    return ["--text-bank", str(path)]


def test_the_check_of_other_read_outs(tmp_path, tower):
    code, results = run(tmp_path, "--task", "check", *tower, "--limit", "4")
    assert code == 0
    assert list(results["errors"]) == ["terms, convention term", "source tokens against heads"]


TASKS = {
    "waterbirds": ["--heads", "3.0,4.1", "--draws", "3"],
    "debias": ["--heads", "3.0,4.1", "--draws", "3"],
    "ablation": [],
    "completeness": ["--texts", "2"],
    "textspan": ["--texts", "2"],
    "neurons": ["--neurons", "3"],
    "retrieval": ["--head", "4.1", "--text", "a bird"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_on_other_read_outs(tmp_path, tower, bank, waterbirds, task):  # noqa: F811
    code, results = run(tmp_path, "--task", task, *tower, *bank, *TASKS[task], "--data", str(waterbirds))
    assert code == 0
    error = results["settings"].get("sum", "within 0e+00 of").split("within ")[1].split()[0]
    assert float(error) < 1e-5
    if task == "ablation":  # no class token is read; a pooling's own MLP is a term
        assert "class token's attention to itself" not in results["accuracy"]
        assert ("the pooling's own MLP" in results["accuracy"]) == ("timm" in tower[1])


def test_neurons_under_attention_pooling_are_summed_up_rightly(tmp_path, tower, bank, waterbirds):  # noqa: F811
    """Spread and accuracy, from the terms themselves."""
    from options import parse_args
    from tasks.job import Job, open_split
    from tasks.neurons import watch

    job = Job(parse_args(["--task", "neurons", *tower, *bank, "--device", "cpu", "--data", str(waterbirds)]))
    clip, data = job.clip, open_split(job, "train")
    activity = watch(job, data, 1)
    images = torch.stack([data[i][0] for i in range(len(data))])
    found = neurons(clip.model, images, 1)
    terms = found.terms().double()
    spread = (
        terms.var(dim=0, correction=0).sum(dim=1) / found.embedding.double().var(dim=0, correction=0).sum()
    )
    assert torch.allclose(activity.spread(), spread, rtol=1e-4)
    j = int(spread.argmax())
    away = terms[:, j] - terms[:, j].mean(dim=0)
    first = torch.linalg.svd(away, full_matrices=False).Vh[0]
    direction = torch.nn.functional.normalize(activity.direction(j).double(), dim=0)
    assert abs(float(first @ direction)) > 1 - 1e-4
    if found.up is not None:  # one activation, with its own sign, where there is one row; else a length
        assert float(terms[:, j].mean(dim=0) @ direction) >= 0
        assert torch.allclose(activity.strength(found)[:, j].double(), terms[:, j].norm(dim=1), rtol=1e-4)


# Other image sizes.


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [96, 33])
def test_another_image_size_is_another_grid_of_the_same_weights(tmp_path, pixels):
    clip = load_clip(device="cpu", image_size=pixels)
    images = torch.randn(2, 3, pixels, pixels)
    assert decompose(clip.model, images).error() < 1e-5
    texts = torch.nn.functional.normalize(torch.randn(1, clip.model.visual.output_dim), dim=1)
    assert heatmap(clip.model, images, texts).shape == (2, 1, pixels // 8, pixels // 8)
    theirs = load_clip(device="cpu").model.state_dict()
    ours = clip.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [
        "visual.positional_embedding"
    ]
    argv = [
        "--task",
        "waterbirds",
        "--image-size",
        str(pixels),
        "--limit",
        "64",
        "--workers",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main(argv) == 0
    assert (
        f"images of {pixels} pixels"
        in json.loads((tmp_path / "waterbirds" / "results.json").read_text())["settings"]["model"]
    )


@pytest.mark.slow
def test_another_image_size_through_timm_and_with_a_pooler():
    clip = load_clip("ViT-B-16-SigLIP", "none", "cpu", image_size=96)
    assert decompose(clip.model, torch.randn(1, 3, 96, 96)).error() < 1e-5


def test_an_image_smaller_than_a_patch_is_refused(tmp_path, capsys):
    assert "for images of 3 pixels" in refusal(tmp_path, capsys, "--image-size", "3")


# Weights.


def test_other_weights_of_the_demo_are_the_demo(tmp_path):
    state = load_file(demo.FOLDER / f"{demo.NAME}.safetensors")
    state["visual.proj"] = 2 * state["visual.proj"]
    save_file(state, tmp_path / "mine.safetensors")
    ours, theirs = load_clip(device="cpu"), load_clip(demo.NAME, str(tmp_path / "mine.safetensors"), "cpu")
    images = torch.randn(2, 3, 64, 64)
    assert theirs.is_demo
    assert torch.allclose(
        decompose(theirs.model, images).embedding, 2 * decompose(ours.model, images).embedding, atol=1e-5
    )


# What tags and files say of weights.

TINY = {"embed_dim": 24, "vision_cfg": {**VISION, "layers": 2}, "text_cfg": TEXT}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """make(name, tag, **config): a configuration with a tag, and a model of random weights that it loads."""

    def make(name, tag=None, **config):
        (tmp_path / f"{name}.json").write_text(json.dumps(TINY | config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logging.Logger, "callHandlers", lambda *_: None)  # random weights, it says
            model = open_clip.create_model(name)
        save_file(
            {key: x.contiguous() for key, x in model.state_dict().items()}, tmp_path / f"{name}.safetensors"
        )
        if tag is not None:
            tags = {"openai": {"url": "https://nowhere", **tag}, "other": {"url": "https://nowhere"}}
            monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
            download = lambda *args, **options: str(tmp_path / f"{name}.safetensors")  # noqa: E731
            monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
        return model.eval()

    # Whether the hub answers does not matter where the download is another.
    monkeypatch.setattr(loading, "getproxies", lambda: {"https": "one"})
    return make


def embeddings(model):
    images, texts = (
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        torch.ones(2, 77).long(),
    )
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(texts)])


@pytest.mark.filterwarnings("ignore:QuickGELU")  # of open_clip itself, where it is asked for the other
@pytest.mark.parametrize("tag", [{"quick_gelu": True}, {}])
def test_the_activation_is_the_one_that_a_tag_says(tiny, tag):
    plain = tiny("tiny-tagged", tag)
    forced = open_clip.create_model("tiny-tagged", "other", force_quick_gelu=True).eval()
    expected, other = (forced, plain) if tag else (plain, forced)
    clip = load_clip("tiny-tagged", "openai", "cpu")
    assert torch.allclose(embeddings(clip.model), embeddings(expected), atol=1e-6)
    assert (embeddings(clip.model) - embeddings(other)).abs().max() > 1e-3
    assert activation(clip.model) == ("QuickGELU" if tag else "GELU")
    assert clip.notes == ()  # nothing to warn of any more


def test_the_activation_is_said_above_the_table(tiny, tmp_path):
    tiny("tiny-tagged", {"quick_gelu": True})
    for tag, expected in (("openai", "QuickGELU"), ("other", "GELU")):
        argv = ["--model", "tiny-tagged", "--pretrained", tag, "--device", "cpu", "--limit", "2"]
        code, results = run(tmp_path, "--task", "check", *argv)
        assert code == 0
        assert results["settings"]["model"] == f"tiny-tagged, weights {tag}, {expected}, float32 on cpu"
        assert "note" not in results["settings"]


@pytest.mark.parametrize("name", [name for name, tag in open_clip.list_pretrained() if tag == "openai"][:3])
def test_open_clips_own_tags_are_asked(name):
    """What the fix rests on: the tag knows, and the configuration alone does not."""
    quick = open_clip.get_model_config(name.removesuffix("-quickgelu")).get("quick_gelu", False)
    assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"]
    assert not quick


def test_an_activation_that_no_tag_explains_is_warned_of_in_a_line(tiny, tmp_path, capsys):
    """roberta-ViT-B-32 has QuickGELU by its configuration, and its tag does not say so."""
    tiny("tiny-quick", {}, quick_gelu=True)
    argv = ["--model", "tiny-quick", "--pretrained", "openai", "--device", "cpu", "--limit", "2"]
    code, results = run(tmp_path, "--task", "check", *argv)
    assert code == 0
    assert results["settings"]["note"].startswith("open_clip: QuickGELU mismatch between final model config")
    assert "QuickGELU, float32" in results["settings"]["model"]
    assert "note:" in capsys.readouterr().out


def test_what_open_clip_logs_is_shown_too(tiny, tmp_path):
    """Two checkpoints in a folder: it takes the first by name."""
    model, folder = tiny("tiny-folder"), tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    for name in ("a.safetensors", "b.safetensors"):
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, folder / name)
    (note,) = load_clip(f"local-dir:{folder}", device="cpu").notes
    assert note.startswith("open_clip: Multiple checkpoints found")
    assert note.endswith("Using 'a.safetensors'.")
    (folder / "a.safetensors").rename(folder / "open_clip_model.safetensors")
    assert load_clip(f"local-dir:{folder}", device="cpu").notes == ()


def test_random_weights_that_were_asked_for_are_nothing_to_warn_of(tiny):
    tiny("tiny-folder")
    assert load_clip("tiny-folder", "none", "cpu").notes == ()


@pytest.mark.parametrize("name", ["vit-b-32", "VIT-B-32", "ViT-B/32", "vit-b/32"])
def test_a_model_is_found_in_any_case_and_by_openais_name(name):
    assert models.known_name(name) == "ViT-B-32"


def test_a_tag_is_found_as_open_clip_finds_it(tiny):
    tiny("tiny-tagged", {"quick_gelu": True})
    clip = load_clip("Tiny-Tagged", "OpenAI", "cpu")
    assert (clip.name, clip.weights, activation(clip.model)) == ("tiny-tagged", "openai", "QuickGELU")


COCA = {
    "custom_text": True,
    "vision_cfg": {
        **VISION,
        "layers": 2,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"width": 24, "context_length": 77, "vocab_size": 49408, "layers": 1, "heads": 2},
}


@pytest.mark.parametrize(
    ("name", "refused"),
    [("text_decoder.text_projection", False), ("text.text_projection", True), ("visual.proj", True)],
)
def test_weights_must_be_numbers_where_they_are_used(tiny, tmp_path, name, refused):
    """open_clip leaves the projection of CoCa's captioner uninitialised: it can hold anything."""
    state = tiny("tiny-coca", **COCA).state_dict()
    state["text_decoder.text_projection"].nan_to_num_(0, 0, 0)
    state[name].view(-1)[3] = float("nan")
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "weights.safetensors")
    if refused:
        with pytest.raises(InputError, match=f"a NaN or an infinity in {name}"):
            load_clip("tiny-coca", str(tmp_path / "weights.safetensors"), "cpu")
    else:
        clip = load_clip("tiny-coca", str(tmp_path / "weights.safetensors"), "cpu")
        assert decompose(clip.model, torch.randn(2, 3, 32, 32)).error() < 1e-5
        assert clip.model.encode_text(torch.ones(2, 77).long()).isfinite().all()


# Refused early, and in words.


def test_what_cannot_be_decomposed_is_refused_before_it_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: pytest.fail("was built"))
    for name, reason in (("rn50x64", "a ResNet has convolutions"), ("convnext_xxlarge", "a ConvNeXt has")):
        started = time.monotonic()
        argv = [
            "--model",
            name,
            "--pretrained",
            open_clip.list_pretrained_tags_by_model(models.known_name(name))[0],
        ]
        line = refusal(tmp_path, capsys, *argv)
        assert f"cannot decompose {name} " in line
        assert reason in line
        assert time.monotonic() - started < 5


OTHERS = {
    "a wider text tower": {"text_cfg": {**TEXT, "width": 64}},
    "a wider image tower": {"vision_cfg": {**VISION, "layers": 2, "width": 64}},
    "more layers": {"vision_cfg": VISION},
    "other patches": {"vision_cfg": {**VISION, "layers": 2, "patch_size": 4}},
    "images that are not square": {"vision_cfg": {**VISION, "layers": 2, "image_size": [32, 64]}},
    "the text tower apart": {"custom_text": True},
    "a bias of SigLIP": {"custom_text": True, "init_logit_bias": -10.0},
    "CoCa": COCA,
    "a ResNet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}},
}


# Refused by its name; and what open_clip fits a plain checkpoint to.
FITTED = ("a ResNet", "images that are not square", "the text tower apart", "a bias of SigLIP")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_architecture_is_called_that(tiny, tmp_path, capsys, kind):
    tiny("tiny-plain")
    tiny("tiny-other", **OTHERS[kind])
    for name, other in (("tiny-plain", "tiny-other"), ("tiny-other", "tiny-plain")):
        if name == "tiny-other" and kind in FITTED:
            continue
        argv = ["--model", name, "--pretrained", str(tmp_path / f"{other}.safetensors"), "--device", "cpu"]
        assert "its tensors are not those of this architecture" in refusal(tmp_path, capsys, *argv)


@pytest.mark.parametrize(
    "content", [b"%PDF-1.7 a document", b"\x89PNG\r\n", b"\x1f\x8b\x08 packed", b"Ustar" * 99]
)
def test_a_file_that_is_no_checkpoint_is_called_that(tiny, tmp_path, capsys, content):
    tiny("tiny-plain")
    (tmp_path / "doc.pt").write_bytes(content)
    line = refusal(tmp_path, capsys, "--model", "tiny-plain", "--pretrained", str(tmp_path / "doc.pt"))
    assert "expected a checkpoint: tensors by name" in line
    assert "pickl" not in line


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_torchscript_archive_as_openai_published_is_called_that(tiny, tmp_path, capsys):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), tmp_path / "ViT-B-32.pt")
    tiny("tiny-plain")
    line = refusal(tmp_path, capsys, "--model", "tiny-plain", "--pretrained", str(tmp_path / "ViT-B-32.pt"))
    assert "it is a TorchScript archive" in line
    assert "--pretrained openai" in line


@pytest.mark.parametrize("name", ["missing.safetensors", "epoch_30.pt", "no/such/weights.bin"])
def test_a_file_that_is_not_there_is_no_unknown_tag(tmp_path, capsys, name):
    line = refusal(tmp_path, capsys, "--model", "ViT-B-32", "--pretrained", name)
    assert line == f"evaluate.py: --pretrained {name}: there is no such file"


# The network.


def no_network(monkeypatch, tmp_path):
    """Nobody listens at the hub's address, and its cache is empty."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading, "getproxies", dict)


@pytest.mark.parametrize(
    "argv", [["ViT-B-32", "laion2b_s34b_b79k"], ["hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None]]
)
def test_without_a_network_a_tag_is_refused_at_once_in_whole_sentences(tmp_path, monkeypatch, argv):
    no_network(monkeypatch, tmp_path)
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"not in the hub's cache, and not to be had from the network: .*\.$"
    ):
        load_clip(*argv, "cpu")
    assert time.monotonic() - started < 10  # by itself, the hub's client tries for 46 s
    assert constants.HF_HUB_OFFLINE is False  # as it was


def test_nobody_is_asked_where_files_are_enough(tiny, tmp_path, monkeypatch):
    tiny("tiny-plain")
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(
        loading.socket, "create_connection", lambda *_, **__: pytest.fail("asked the network")
    )
    clip = load_clip("tiny-plain", str(tmp_path / "tiny-plain.safetensors"), "cpu")
    clip.tokenizer(["a bird"])


def refusal(tmp_path, capsys, *argv):
    assert main(["--task", "check", *argv, "--out", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]


def test_a_checkpoint_of_another_architecture_is_told_by_its_first_keys(tmp_path, capsys):
    state = load_file(demo.FOLDER / f"{demo.NAME}.safetensors")
    state["another.weight"] = state.pop("visual.proj")
    state["visual.ln_post.weight"] = state["visual.ln_post.weight"][:5].clone()
    save_file(state, tmp_path / "other.safetensors")
    message = refusal(
        tmp_path, capsys, "--model", demo.NAME, "--pretrained", str(tmp_path / "other.safetensors")
    )
    assert "lacks visual.proj" in message
    assert "has besides another.weight" in message
    assert "1 of other shapes, first visual.ln_post.weight [5], expected [128]" in message


class Once(OrderedDict):
    """Torch's own unpickler of tensors ends in a TypeError at its state, where Python's goes on."""

    def __reduce__(self):
        return OrderedDict, (), (None, {})


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Environment variable")  # torch's, where it is asked without this project
def test_nothing_is_unpickled_when_open_clip_tries_again(tiny, tmp_path, monkeypatch):
    """After a TypeError it leaves weights_only out; torch before 2.6 then ran what a file said."""
    tiny("tiny-plain")
    torch.save({"first": Once(), "second": Code(str(tmp_path / "ran"))}, tmp_path / "crafted.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the default of those days
    before = dict(os.environ)
    with pytest.raises(InputError, match=r"crafted.pt.*expected a checkpoint"):
        load_clip("tiny-plain", str(tmp_path / "crafted.pt"), "cpu")
    assert not (tmp_path / "ran").exists()
    assert dict(os.environ) == before
    with contextlib.suppress(Exception):
        open_clip.create_model("tiny-plain", str(tmp_path / "crafted.pt"))
    assert (tmp_path / "ran").exists()  # so the file would have run


def test_a_file_that_needs_unpickling_says_why_it_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "args": pytest.raises}, tmp_path / "pickle.pt")
    message = refusal(tmp_path, capsys, "--model", demo.NAME, "--pretrained", str(tmp_path / "pickle.pt"))
    assert "unpickling it could run any code" in message


@pytest.mark.parametrize("file", ["missing.safetensors", "empty.safetensors"])
def test_weights_that_cannot_be_read(tmp_path, capsys, file):
    (tmp_path / "empty.safetensors").touch()
    assert file in refusal(tmp_path, capsys, "--model", demo.NAME, "--pretrained", str(tmp_path / file))


@pytest.mark.slow
def test_no_tokenizer_is_needed_to_check_and_its_absence_is_said_where_it_is(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    clip = load_clip("ViT-B-32", "none", "cpu")
    images = torch.randn(1, 3, 224, 224)
    assert token_scores(clip.model, images, torch.randn(1, 512)).shape[-1] == 1
    with pytest.raises(
        InputError, match=r"cannot open the tokenizer of ViT-B-32: .*pip install transformers"
    ):
        clip.tokenizer(["a bird"])
