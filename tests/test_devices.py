"""A device without float64, as Apple's GPUs (mps) are; here its tensors are held on the CPU.

Making a float64 tensor on it raises a TypeError as there, also on the way to the CPU: a copy to the CPU in
another precision is converted where it comes from. The device calls itself meta, the one name besides cpu
that every build of torch accepts.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import tasks.job
from evaluate import main
from textspan import textspan

NAME = "meta"


class There(torch.Tensor):
    """A tensor of the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        like = {"dtype": held.dtype, "device": NAME, "strides": held.stride()}
        x = torch.Tensor._make_wrapper_subclass(cls, held.shape, storage_offset=held.storage_offset(), **like)
        x.held = held
        return x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()


class Device(TorchDispatchMode):
    """While open, device="meta" makes such tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    tensors = []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    taken = any(isinstance(x, There) for x in tensors)
    place = kwargs.get("device")
    given = taken if place is None else torch.device(place).type == NAME
    if place is not None and given:
        kwargs = kwargs | {"device": "cpu"}
    found = function(
        *tree_map_only(There, lambda x: x.held, args), **tree_map_only(There, lambda x: x.held, kwargs)
    )
    made = []
    tree_map_only(torch.Tensor, made.append, found)
    if (taken or given) and any(x.dtype == torch.float64 for x in made):
        raise TypeError(f"this device has no float64: {function}")
    if function._schema.is_mutable and not function._schema.name.endswith("_out"):
        return args[0]  # in place
    return tree_map_only(torch.Tensor, There, found) if given else found


@pytest.fixture
def device(monkeypatch):
    load = tasks.job.load_clip

    def load_there(model, pretrained, device, *more):
        clip = load(model, pretrained, "cpu", *more)
        for module in clip.model.modules():
            for name, x in module._parameters.items():
                module._parameters[name] = x if x is None else torch.nn.Parameter(There(x.data))
            for name, x in module._buffers.items():
                module._buffers[name] = x if x is None else There(x)
        return dataclasses.replace(clip, device=torch.device(NAME))

    monkeypatch.setattr(tasks.job, "load_clip", load_there)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with Device():
        yield


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.double(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: torch.ones(2, dtype=torch.float64, device=x.device),
    ],
)
def test_the_device_has_no_float64(device, make):
    x = torch.randn(3, 4, device=NAME)
    assert (x @ x.T).device.type == NAME
    assert x.cpu().double().dtype == torch.float64
    with pytest.raises(TypeError, match="no float64"):
        make(x)


def test_textspan_takes_tensors_that_are_on_it(device):
    terms, texts = torch.randn(20, 4, device=NAME), torch.randn(6, 4, device=NAME)
    assert textspan(terms, texts, size=2).indices == textspan(terms.cpu(), texts.cpu(), size=2).indices


OPTIONS = {
    "check": [],
    "textspan": ["--texts", "2"],
    "waterbirds": ["--draws", "3", "--limit", "60", "--heads", "3.1"],
    "debias": ["--draws", "3"],
    "ablation": [],
    "completeness": ["--texts", "2"],
    "neurons": ["--neurons", "2"],
    "retrieval": ["--head", "3.4", "--text", "a bird"],
    "segmentation": ["--methods", "decomposition", "rollout", "gradcam"],
    "faithfulness": ["--methods", "rollout", "gradcam"],
    "typographic": ["--draws", "2", "--heads", "3.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", OPTIONS)
def test_every_task_runs_on_it(tmp_path, device, task):
    (tmp_path / "bank.txt").write_text(
        "# kinds\na duck\na gull\n# places\nin a forest\non the ocean\nat the beach\n"
    )
    argv = ["--limit", "40", "--workers", "0", "--text-bank", str(tmp_path / "bank.txt"), *OPTIONS[task]]
    assert main(["--task", task, *argv, "--out", str(tmp_path)]) == 0
