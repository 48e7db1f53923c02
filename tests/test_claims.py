"""What the pages say of figures is true of the figures: each sentence stands beside the test that it passes.

The figures are those of the file that a benchmark wrote, or of the block in the page that a command printed
(test_benchmarks.py and test_readme.py compare such blocks with what is printed).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from evaluate import main

ROOT = Path(__file__).parent.parent
STUDY = json.loads((ROOT / "benchmarks" / "cue_study.json").read_text())["figures"]
STRENGTHS, SEEDS = list(STUDY), ["2", "3", "4"]
HEADS, DIRECTIONS, EVERYWHERE = "heads (the paper's way)", "directions in the heads", "directions everywhere"
WAYS = (HEADS, DIRECTIONS, EVERYWHERE)
TEXTS = "cue's directions in the class texts"
PUBLISHED = ("Orth-Proj (all texts)", "Orth-Cal", "PerceptionCLIP", "RoboShot", "TIE*", "LEACE")


def prose(page: str) -> str:
    """The page on one line, without its marks of emphasis."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").replace("*", "").split())


def each(row: str, strength: str, measure: str = "worst") -> list[float]:
    """In percent, of the models of one strength, by seed."""
    return [100 * STUDY[strength][seed][row][measure] for seed in SEEDS]


def average(row: str, measure: str = "worst") -> list[float]:
    """In percent, by strength."""
    return [mean(each(row, strength, measure)) for strength in STRENGTHS]


def all_of(a: str, b: str) -> list[bool]:
    """Is row a above row b, in each of the nine models?"""
    return [x > y for s in STRENGTHS for x, y in zip(each(a, s), each(b, s), strict=True)]


def above(a: str, b: str) -> list[bool]:
    """The same of the means, by strength."""
    return [x > y for x, y in zip(average(a), average(b), strict=True)]


CLAIMS = {
    "both are ahead of every published method at every strength": lambda: all(
        min(ours) > theirs
        for row in (*PUBLISHED, "TIE (looks at labels)")
        for *ours, theirs in zip(average(EVERYWHERE), average(TEXTS), average(row), strict=True)
    ),
    "The worst group is better with `embedding` in six of the nine models": lambda: (
        sum(all_of(EVERYWHERE, TEXTS)) == 6
    ),
    "the texts are ahead on average (86.9 against 85.5 %)": lambda: (
        [round(average(row)[2], 1) for row in (TEXTS, EVERYWHERE)] == [86.9, 85.5]
    ),
    "from 76 and 73 % of the worst group at the weakest bias to 20 and 18 %": lambda: (
        [[round(average(row)[i]) for row in ("PerceptionCLIP", "TIE*")] for i in (0, 2)]
        == [[76, 73], [20, 18]]
    ),
    "within three points of `embedding` on seeds 2 and 3, and at 47 % on seed 4": lambda: (
        [a - b < 3 for a, b in zip(each(EVERYWHERE, "0.97"), each("RoboShot", "0.97"), strict=True)]
        == [True, True, False]
        and round(each("RoboShot", "0.97")[2]) == 47
    ),
    "the best worst group at every strength, 91 to 85 %": lambda: (
        all(above(EVERYWHERE, HEADS) + above(EVERYWHERE, DIRECTIONS))
        and [round(average(EVERYWHERE)[i]) for i in (0, 2)] == [91, 85]
    ),
    "with the smallest spread over seeds": lambda: all(
        min(WAYS, key=lambda row: stdev(each(row, strength))) == EVERYWHERE for strength in STRENGTHS
    ),
    "it costs 0.4 to 0.8 points on the kinds of birds": lambda: all(
        0.35 < before - after < 0.85
        for before, after in zip(average("base", "kinds"), average(EVERYWHERE, "kinds"), strict=True)
    ),
    "the strongest bias has 86.6 ± 0.8 against 85.5 ± 2.4": lambda: (
        [
            f"{mean(x):.1f} ± {stdev(x):.1f}"
            for x in (each("everywhere, 99 %", "0.995"), each(EVERYWHERE, "0.995"))
        ]
        == ["86.6 ± 0.8", "85.5 ± 2.4"]
    ),
    "better than as many random heads on average": lambda: all(above(HEADS, "random heads, mean")),
    "mean-ablating them is within six points of the best": lambda: (
        max(rows[0] for rows in map(average, STUDY["0.97"]["2"])) - average(HEADS)[0] < 6
    ),
    "64 % against 85 %": lambda: [round(average(row)[2]) for row in (HEADS, EVERYWHERE)] == [64, 85],
    "stays where it was (91.0 against 88.7)": lambda: (
        [round(average(row, "kinds")[0], 1) for row in (DIRECTIONS, HEADS)] == [91.0, 88.7]
    ),
    "far worse on average (71, 56, 40 %)": lambda: (
        [round(x) for x in average("random heads, mean")] == [71, 56, 40]
    ),
    "the best of 20 draws beats the chosen heads in each of the nine models": lambda: all(
        all_of("random heads, best", HEADS)
    ),
    "Both are worse than the chosen heads alone": lambda: all(
        above(DIRECTIONS, "auto + MLPs") + above(DIRECTIONS, "all heads")
    ),
    "> 0.5 and the gap are better at every strength; on seed 3 they lose 8 to 53 points": lambda: (
        [all_of(row, DIRECTIONS) for row in ("> 0.5", "gap")]
        == [[True, False, False] * 2 + [True, False, True]] * 2
        and [
            round(f(each(DIRECTIONS, s)[1] - each(row, s)[1] for s in STRENGTHS for row in ("> 0.5", "gap")))
            for f in (min, max)
        ]
        == [8, 53]
    ),
    "is enough in the chosen heads, and unreliable in the whole embedding": lambda: (
        all(abs(a - b) < 2 for a, b in zip(average("one direction"), average(DIRECTIONS), strict=True))
        and max(average("everywhere, one direction")) < 60
    ),
    "comes out a point better (86.6), and the kinds of birds a point and a half worse": lambda: all(
        abs(average("everywhere, 99 %", key)[2] - average(EVERYWHERE, key)[2] - change) < 0.3
        for key, change in (("worst", 1), ("kinds", -1.5))
    ),
    "> 0.2 is ahead at the weakest bias alone, and > 0.5 and the gap at none": lambda: (
        [above(row, DIRECTIONS) for row in ("> 0.2", "> 0.5", "gap")]
        == [[True, False, False], [False] * 3, [False] * 3]
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_docs_cue_says_is_true_of_the_study(claim):
    assert claim in prose("docs/cue.md")
    assert CLAIMS[claim]()


def test_claims_that_were_withdrawn_are_false_of_the_study():
    """The test would have seen them."""
    assert not all(above(EVERYWHERE, "everywhere, 99 %"))  # "best at every strength"
    assert not all(all_of(HEADS, "random heads, best"))
    assert not all(
        x > y for x, y in zip(average(DIRECTIONS), average("> 0.2"), strict=True)
    )  # "no rule beats"


def maps() -> dict[str, list[float]]:
    """{method: pixel accuracy, mIoU, mAP} of the table in docs/segmentation.md."""
    page = (ROOT / "docs" / "segmentation.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^(\S[\w -]*?)  .*? ([\d.]+)  ([\d.]+)  ([\d.]+) ± [\d.]+(?: +[\d.]+){2}$", page, re.MULTILINE
    )
    return {name: [float(x) for x in figures] for name, *figures in rows}


def test_decomposition_abs_is_level_with_the_best_on_two_measures_and_behind_on_the_third():
    words = "level with the best on mIoU and mAP, and 1.2 points behind chefer2021 on pixel accuracy"
    assert words in prose("docs/segmentation.md")
    table = maps()
    assert len(table) == 15
    best = [max(column) for column in zip(*table.values(), strict=True)]
    behind = [round(x - y, 1) for x, y in zip(best, table["decomposition-abs"], strict=True)]
    assert behind[0] == 1.2
    assert table["chefer2021"][0] == best[0]
    assert max(behind[1:]) <= 0.1


def faithful() -> dict[str, list[float]]:
    """{row: areas of positive, negative, deletion, insertion} of the table of --task faithfulness."""
    page = (ROOT / "docs" / "segmentation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\S[\w :-]*?)  .*?((?:  +[\d.]+ ± [\d.]+){4})$", page, re.MULTILINE)
    return {name: [float(x) for x in re.findall(r"([\d.]+) ±", areas)] for name, areas in rows}


def test_what_the_page_says_of_the_maps_faithfulness_is_true_of_its_table():
    said, table = prose("docs/segmentation.md"), faithful()
    assert len(table) == 15
    signs = (-1, 1, -1, 1)
    good = {name: [sign * x for sign, x in zip(signs, row, strict=True)] for name, row in table.items()}
    ours, blob = good["decomposition"], good["centred blob"]
    others = [row for name, row in good.items() if name != "decomposition"]
    leads = [round(x - max(column), 1) for x, column in zip(ours, zip(*others, strict=True), strict=True)]
    assert (
        f"It is first in all four columns. Its lead over the next row ({min(leads)} to {max(leads)}" in said
    )
    assert min(leads) > 0
    assert f"(by {round(ours[1] - good['decomposition-abs'][1], 1)} points in `negative`)" in said
    assert "here only `insertion` tells them from the blob" in said
    for name in ("raw-attention", "partial-lrp"):
        assert all(abs(x - y) < 2.5 for x, y in zip(good[name][:3], blob[:3], strict=True))
        assert good[name][3] > blob[3] + 4
    assert all(
        x > y
        for name in ("raw-attention", "partial-lrp")
        for x, y in zip(good["lrp"], good[name], strict=True)
    )
    worse = {
        name for name, row in good.items() if any(x < y + 5 for x, y in zip(row, good["random"], strict=True))
    }
    assert worse == {"grad-eclip", "random"}


def printed_roles() -> str:
    """The block of docs/walkthrough.md that compares roles with the true factors."""
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    return re.search(r"^A true factor explains over 30% of \d+ of 32 heads.*?(?=\n```)", page, re.M | re.S)[0]


def test_what_the_readme_says_of_roles_is_what_the_walkthrough_shows():
    block, readme = printed_roles(), prose("README.md")
    clear, right, greedy = (
        int(re.search(pattern, block)[1])
        for pattern in (r"30% of (\d+)", r"from categories +(\d+)\.0", r"greedy texts +(\d+)\.0")
    )
    given, others = (
        int(re.search(r"Of all (\d+)", block)[1]),
        12 - int(re.search(r"heads, (\d+) are", block)[1]),
    )
    assert f"explains over 30 % of {clear} heads. Of these, {right} have the right role and" in readme
    assert f"and {clear - (given - others)} none, {others} others get one" in readme
    assert f"the greedy texts' category is right for {greedy}" in readme
    assert right == given - others  # so no clear head has a wrong role


@pytest.mark.slow
def test_the_roles_of_the_walkthrough_are_those_that_the_command_prints(tmp_path, capsys):
    assert main(["--task", "textspan", "--out", str(tmp_path)]) == 0
    assert printed_roles() in capsys.readouterr().out
