"""For all tests: a picture of the demo world is drawn once."""

import pytest

from datasets import DemoBirds


@pytest.fixture(scope="session", autouse=True)
def pictures_drawn_once():
    """Rendering is half of the time of a small run; what a picture shows depends on its data set's facts and its row alone."""
    kept, render = {}, DemoBirds.render

    def once(self, index):
        facts = self.all_facts["kind"]
        key = (self.seed, len(facts), facts[:50].tobytes(), int(self.rows[index]))
        if key not in kept:
            kept[key] = render(self, index)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoBirds, "render", once)
        yield
