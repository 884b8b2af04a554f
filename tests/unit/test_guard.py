"""The guard's rules, on tables of figures."""

import json

import pytest

from l2e_ds.config.sections import InhibitionConfig
from l2e_ds.models.sites import comparison_layers
from l2e_ds.training.guard import advice, findings_of_run, judge_evaluation


def evaluation(own=(1.0, 1.0), others=(1.0, 1.0)) -> dict[str, float]:
    """A line of layers 2 and 3, with 1 and 4 beside them; own, others: mean S and MS as multiples of 0.3 and 14."""
    line = {}
    for layers, (scale, score) in (
        (("layer2", "layer3"), own),
        (("comparison_layer1", "comparison_layer4"), others),
    ):
        for layer in layers:
            line |= {f"{layer}/mean_s": 0.3 * scale, f"{layer}/top_share_score": 14 * score}
    return line


def found(*table, comparison=(1, 4), began=1, memory=None):
    """Step and finding of evaluations at 0, 10, 20 ..., as a resumed run would have them: what is remembered goes
    through JSON. began: the first evaluation after inhibition began."""
    said, memory = [], memory or {}
    for place, line in enumerate(table):
        memory, findings = judge_evaluation(memory, 10 * place, line, (2, 3), comparison, place >= began)
        memory = json.loads(json.dumps(memory))
        said += [(10 * place, finding.layer, finding.name) for finding in findings]
    return said


START = evaluation()


@pytest.mark.parametrize(
    "own, others, name",
    [
        ((0.49, 1.0), (1.0, 1.0), "shrank"),
        ((0.51, 1.0), (1.0, 1.0), None),
        ((0.49, 1.0), (1.3, 1.0), "shrank"),
        ((0.55, 1.0), (1.3, 1.0), None),  # not below half of its own
        ((0.4, 1.0), (0.7, 1.0), None),  # the others fall as well
        ((0.04, 1.0), (0.4, 1.0), "shrank"),  # the others fall as well, but less
        ((2.1, 1.0), (1.0, 1.0), "grew"),
        ((1.9, 1.0), (0.6, 1.0), None),
        ((2.5, 1.0), (1.5, 1.0), None),
    ],
)
def test_scale_is_judged_at_once(own, others, name):
    expected = [] if name is None else [(10, 2, name), (10, 3, name)]
    assert found(START, evaluation(own, others)) == expected


def test_each_is_said_once():
    small, large = evaluation((0.4, 1.0)), evaluation((2.1, 1.0))
    assert found(START, small, small, START, small, large) == [
        *((10, layer, "shrank") for layer in (2, 3)),
        *((50, layer, "grew") for layer in (2, 3)),
    ]


def test_one_layer_of_two():
    line = evaluation() | {"layer3/mean_s": 0.1}
    assert found(START, line) == [(10, 3, "shrank")]


@pytest.mark.parametrize(
    "scores, others, at",
    [
        ((1.2, 1.2, 1.2), (1.0, 1.0, 1.0), 30),
        ((1.09, 1.09, 1.09), (1.0, 1.0, 1.0), None),
        ((1.2, 1.3, 1.4), (1.2, 1.3, 1.4), None),  # MS rises by itself
        ((0.95, 0.95, 0.95), (0.8, 0.8, 0.8), 30),  # it falls less than without inhibition
        ((1.2, 1.2, 1.0, 1.2, 1.2), (1.0,) * 5, None),
        ((1.2, 1.0, 1.2, 1.2, 1.2, 1.2), (1.0,) * 6, 50),
    ],
)
def test_ms_is_judged_when_it_lasts(scores, others, at):
    table = [evaluation((1.0, own), (1.0, other)) for own, other in zip(scores, others, strict=True)]
    assert found(START, *table) == ([] if at is None else [(at, 2, "rose"), (at, 3, "rose")])


def test_reference_is_the_newest_evaluation_before_inhibition():
    """A layer that halved before it does not count, one that halves afterwards does."""
    half, quarter = evaluation((0.5, 1.0)), evaluation((0.24, 1.0))
    assert found(START, half, half, began=2) == []
    assert found(START, half, quarter, began=2) == [(20, 2, "shrank"), (20, 3, "shrank")]


@pytest.mark.parametrize(
    "memory",
    [
        {},
        judge_evaluation({}, 0, START, (2,), (1,), False)[0],
        judge_evaluation({}, 0, START, (2, 3), (), False)[0],
    ],
)
def test_without_a_reference_the_first_evaluation_is_it(memory):
    """A checkpoint from before there was a guard, or of another choice of layers."""
    half, quarter = evaluation((0.5, 1.0)), evaluation((0.24, 1.0))
    assert found(half, quarter, began=0, memory=memory) == [(10, 2, "shrank"), (10, 3, "shrank")]


def test_without_comparison_layers_the_scale_must_be_off_for_long():
    """And MS, which rises by itself, is not judged."""
    small = evaluation((0.4, 1.2))
    dip = [small, small, START]
    assert found(START, *dip, comparison=()) == []
    assert found(START, small, small, small, comparison=()) == [(30, layer, "shrank") for layer in (2, 3)]


def test_layers_that_are_dead_or_not_finite_say_nothing():
    dead, lost = evaluation((0.0, 0.0)), evaluation((float("nan"), float("nan")))
    assert found(dead, START, START, START) == []
    assert found(START, lost, lost, lost, evaluation((0.4, 1.0))) == [(40, 2, "shrank"), (40, 3, "shrank")]


def test_what_is_said():
    memory, _ = judge_evaluation({}, 1000, START, (2, 3), (1, 4), False)
    line = evaluation((0.4, 1.0), (0.95, 1.0)) | {"layer3/mean_s": 0.3}
    memory, (finding,) = judge_evaluation(memory, 2000, line, (2, 3), (1, 4), True)
    assert finding.seen == (
        "layer 2 shrank to 40% of its mean S at step 1,000 (0.3 to 0.12 at step 2,000), layers 1 and 4 without"
        " inhibition to 95%"
    )
    assert memory["found"] == {"2/shrank": finding.seen}
    values = finding.values()
    assert values.pop("text") == finding.seen
    assert values == {"layer2/shrank": pytest.approx(0.4), "comparison": pytest.approx(0.95), "reference_step": 1000}


def test_what_is_said_without_comparison():
    memory, small = {}, evaluation((0.4, 1.0)) | {"layer3/mean_s": 0.3}
    for step, line in enumerate([START, small, small, small]):
        memory, findings = judge_evaluation(memory, step, line, (2, 3), (), step > 0)
    assert [finding.seen for finding in findings] == [
        "layer 2 shrank to 40% of its mean S at step 0 (0.3 to 0.12 at step 3), 3 evaluations in a row; there is no"
        " layer without inhibition to compare with"
    ]
    assert findings[0].values().keys() == {"layer2/shrank", "reference_step", "text"}


def test_what_is_said_of_ms():
    memory, high = {}, evaluation((1.0, 1.5)) | {"layer3/top_share_score": 14.0}
    for step, line in enumerate([START, high, high, high]):
        memory, findings = judge_evaluation(memory, step, line, (2, 3), (1, 4), step > 0)
    assert [finding.seen for finding in findings] == [
        "layer 2 is more monosemantic than without inhibition: the MS of its top share went to 150% of that at step 0"
        " (14 to 21 at step 3), layers 1 and 4 without inhibition to 100%, 3 evaluations in a row"
    ]
    assert findings[0].values().keys() == {"layer2/rose", "comparison", "reference_step", "text"}


@pytest.mark.parametrize(
    "keys, words",
    [
        ({}, "lower inhibition.strength (0.05) or begin later (inhibition.start); docs/looking-inside.md"),
        (
            {"loss": "published", "coefficient": 0.01},
            "lower inhibition.coefficient (0.01), begin later (inhibition.start) or take inhibition.loss: projected;"
            " docs/looking-inside.md",
        ),
        (
            {"method": "memel"},
            "lower inhibition.target_share or begin later (inhibition.start); docs/looking-inside.md",
        ),
    ],
)
def test_advice(keys, words):
    assert advice(InhibitionConfig(**keys)) == words


@pytest.mark.parametrize(
    "inhibited, layers, expected",
    [
        ([2, 3], 6, [1, 4]),
        ([1, 2], 4, [0, 3]),
        ([0, 5], 6, [1, 4]),
        ([8, 9, 10, 11], 24, [6, 7, 12, 13]),
        ([0], 2, [1]),
        ([0, 1, 2], 4, [3]),
        ([0, 1, 2, 3], 4, []),
    ],
)
def test_comparison_layers(inhibited, layers, expected):
    assert comparison_layers(inhibited, layers) == expected


def test_a_run_without_a_guard_is_judged_by_its_first_and_last_evaluation():
    evaluations = [{"step": step, "layer2/mean_s": scale} for step, scale in ((0, 0.3), (50, 0.1), (100, 0.12))]
    shrank = ("shrank", "layer 2 shrank to 40% of its mean S at step 0 (0.3 to 0.12 at step 100)", "")
    assert findings_of_run([{}], evaluations, []) == [shrank]
    assert findings_of_run([{"guard": "warn"}], evaluations, []) == []
    line = {"layer2/shrank": 0.33, "text": "seen", "advice": "do"}
    for starts in ([{"guard": "warn"}], [{"guard": "warn"}, {}]):
        assert findings_of_run(starts, evaluations, [line]) == [("shrank", "seen", "do")]
    assert findings_of_run([{}], [], []) == []
