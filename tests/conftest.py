"""For all tests: the demo world is small, and a picture of it is drawn once."""

import gc
from functools import partial

import pytest
import torch
from runs import assert_refused

from demo.images import DemoBirds

torch.set_num_threads(1)  # tiny models: threads cost more than they bring


def pytest_collection_finish():
    """What torch, open_clip and the collected tests are made of is not looked through at every collection."""
    gc.freeze()


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(arguments, *fragments of the one line)"""
    return partial(assert_refused, tmp_path, capsys)


@pytest.fixture(scope="session", autouse=True)
def _small_demo():
    with pytest.MonkeyPatch.context() as patch:
        small_demo(patch)
        yield


def small_demo(patch):
    """400 images in the validation split, all of which --task textspan compares its heads with.

    Each picture is drawn once: drawing is half of the time of a small run, and what a picture shows depends
    on its data set's facts and its row alone.
    """
    kept, render = {}, DemoBirds.render

    def once(self, index):
        facts = self.all_facts["kind"]
        key = (self.seed, len(facts), facts[:50].tobytes(), int(self.rows[index]))
        if key not in kept:
            kept[key] = render(self, index)
        return kept[key]

    patch.setattr(DemoBirds, "render", once)
    patch.setitem(DemoBirds.sizes, "val", 400)
