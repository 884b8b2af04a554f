"""Mixtures against a slow reference: the positions walked through one by one. K: positions a block."""

import json
from fractions import Fraction

import numpy as np
import pytest

from l2e_ds import cli
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import DataConfig, RunConfig
from l2e_ds.data import PreparedData, TokenDataset, TrainingSequences, check_sets, prepare_sets
from l2e_ds.data.mixture import MixtureOrder
from l2e_ds.data.sampler import SequenceOrder
from l2e_ds.errors import DataError

WEIGHTS = [[1], [1, 1], [0.7, 0.2, 0.1], [3, 1e-3], [5, 0.013, 2, 0.4, 1 / 3]]
LENGTH = 4  # tokens a sequence


def dataset(sequences, marks):
    """Every sequence's tokens say which set and which sequence it is."""
    tokens = (marks * 1000 + np.arange(sequences))[:, None].repeat(LENGTH + 1, axis=1).astype(np.int32).reshape(-1)
    return TokenDataset(tokens, 0, len(tokens), LENGTH, 10_000, "numbers", stride=LENGTH + 1)


def mixture(sizes=(50, 7, 200), weights=(0.5, 0.2, 0.3), global_batch=12, seed=3, order="shuffled"):
    sets = [
        PreparedData(dataset(size, i), name=f"set-{i}", weight=weight)
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return TrainingSequences(sets, global_batch, seed, order)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("first", [0, 123_456_789_012])
def test_shares_numbers_and_counts(weights, first):
    """Every set is within one sequence of its share at the end of a block, running numbers have no gap, and the counts
    in closed form are what was taken."""
    order = MixtureOrder(weights, seed=5)
    exact = [Fraction(repr(weight)) for weight in weights]
    assert order.block >= 1024
    assert order.block * min(weights) >= sum(weights)
    first -= first % order.block
    sets, numbers = order.lookup(np.arange(first, first + 3 * order.block))
    taken = order.consumed(first).tolist()
    for place, (index, number) in enumerate(zip(sets.tolist(), numbers.tolist(), strict=True)):
        if place % order.block == 0:
            for weight, count in zip(exact, taken, strict=True):
                assert abs(count - weight / sum(exact) * (first + place)) < 1
        if place % 511 == 0:
            assert order.consumed(first + place).tolist() == taken
        assert number == taken[index]
        taken[index] += 1


def test_weights_need_no_sum():
    positions = np.arange(5000)
    expected = MixtureOrder([0.7, 0.3], 1).lookup(positions)
    for weights in ([7, 3], [70, 30], [1.4, 0.6]):
        assert np.array_equal(MixtureOrder(weights, 1).lookup(positions), expected)
        assert str(MixtureOrder(weights, 1)) == "7/3"


def test_sets_are_mixed_within_a_block_and_by_the_seed():
    sets, _ = MixtureOrder([1, 1], 1).lookup(np.arange(10_240))
    runs = np.count_nonzero(np.diff(sets)) + 1
    assert abs(runs - 5120) < 300  # of a fair coin; standard deviation 51
    other, _ = MixtureOrder([1, 1], 2).lookup(np.arange(10_240))
    assert abs((sets == other).mean() - 0.5) < 0.03
    assert not np.array_equal(sets[:1024], sets[1024:2048])


def test_a_step_directly_is_the_step_by_iterating():
    """Steps in any order, across block ends, and far ones."""
    sequences = mixture()
    steps = [0, 84, 85, 86, 3, 170, 0, 10**9]
    direct = [sequences.read(step, 0, 1, 12)[0, :, 0] for step in steps]
    iterated = [mixture().read(step, 0, 1, 12)[0, :, 0] for step in range(171)]
    for step, tokens in zip(steps[:-1], direct, strict=False):
        assert np.array_equal(tokens, iterated[step])
    for step, tokens in zip(steps, direct, strict=True):
        sets, _, indices = sequences.rows(step)
        assert np.array_equal(tokens, sets * 1000 + indices)


@pytest.mark.parametrize("order", ["shuffled", "stored"])
def test_every_epoch_of_a_set_holds_each_sequence_once(order):
    sizes = (50, 7, 200)
    sequences = mixture(sizes, order=order)
    taken = [[], [], []]
    for step in range(200):
        for token in sequences.read(step, 0, 1, 12)[0, :, 0].tolist():
            taken[token // 1000].append(token % 1000)
        counts = [count for count, _ in sequences.consumed(step + 1).values()]
        assert counts == [len(part) for part in taken]
    epochs = [[part[i : i + n] for i in range(0, len(part) - n + 1, n)] for part, n in zip(taken, sizes, strict=True)]
    assert min(map(len, epochs)) >= 3
    for part, size in zip(epochs, sizes, strict=True):
        assert all(sorted(epoch) == list(range(size)) for epoch in part)
        assert all((epoch == list(range(size))) == (order == "stored") for epoch in part)
    assert sequences.consumed(200)["set-1"][1] == pytest.approx(len(taken[1]) / 7)


def test_any_ranks_and_micro_batches_read_the_same_global_batch():
    sequences = mixture()
    for step in (0, 7, 85):
        whole = sequences.read(step, 0, 1, 12).reshape(12, LENGTH + 1)
        for ranks, micro in [(1, 3), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]:
            parts = [sequences.read(step, rank, ranks, micro) for rank in range(ranks)]
            assert np.array_equal(np.concatenate(parts, axis=1).reshape(12, LENGTH + 1), whole)


def test_a_set_is_read_forwards():
    """What a stream needs: each call begins where the one before ended, on ranks that want nothing of it too."""
    sequences, calls = mixture(), {0: [], 1: [], 2: []}
    for index, stored in enumerate(sequences._readers):

        def read(first, count, wanted, index=index, real=stored.read):
            assert ((wanted >= 0) & (wanted < count)).all()
            calls[index].append((first, count))
            return real(first, count, wanted)

        stored.read = read
    for step in range(100):
        sequences.read(step, 11, 12, 1)
    for made in calls.values():
        begins, counts = np.array(made).T
        assert np.array_equal(begins, np.cumsum(counts) - counts)
    assert [sum(count for _, count in made) for made in calls.values()] == [
        count for count, _ in sequences.consumed(100).values()
    ]


def test_one_set_without_a_name_is_what_it_was():
    """Order and identity of data.source; a set's name only changes its shuffle."""
    train = dataset(50, 0)
    for order in ("shuffled", "stored"):
        sequences = TrainingSequences([PreparedData(train)], 12, 9, order)
        of_set = SequenceOrder(50, 9, order)
        for step in (0, 1, 4, 100, 10**8):
            expected = of_set.sequences(step * 12 + np.arange(12))
            assert np.array_equal(sequences.rows(step)[2], expected)
            assert np.array_equal(sequences.read(step, 0, 1, 12)[0], train.batch(expected))
    assert sequences.fingerprint() == train.fingerprint()
    assert sequences.consumed(3) == {}
    named = TrainingSequences([PreparedData(train, name="a")], 12, 9, "shuffled")
    assert not np.array_equal(named.rows(0)[2], SequenceOrder(50, 9).sequences(np.arange(12)))


def test_identity_tells_sets_names_and_weights():
    base = mixture()
    assert base.fingerprint() == mixture(weights=(5, 2, 3), seed=4).fingerprint()
    assert base.fingerprint().endswith("mixed 5/2/3")
    for other in (mixture(weights=(5, 2, 4)), mixture(sizes=(50, 8, 200)), mixture(sizes=(7, 50, 200))):
        assert other.fingerprint() != base.fingerprint()


def test_prepared_from_a_run_file(tmp_path):
    """Sets of two kinds: text that is tokenized into one cache, and what each of them holds out."""
    for name, word in (("a", "apple"), ("b", "berry")):
        (tmp_path / name).mkdir()
        for i in range(60):
            (tmp_path / name / f"{i}.txt").write_text(f"{word} {i} " * 40)
    (tmp_path / "tokenizer.json").write_text(_byte_tokenizer())
    raw = {
        "model": {"name": "pythia-14m"},
        "data": {
            "tokenizer": str(tmp_path / "tokenizer.json"),
            "sequence_length": 32,
            "held_out": 0.2,
            "sets": [
                {"name": "a", "weight": 3, "source": "text", "path": str(tmp_path / "a")},
                {"name": "b", "weight": 1, "source": "text", "path": str(tmp_path / "b"), "held_out": 0},
            ],
        },
        "training": {"steps": 10, "global_batch": 8},
    }
    config = checked(RunConfig, raw, "run").data
    check_sets(config, 300)
    sets = prepare_sets(config, tmp_path / "cache", 300, 4)
    assert [(part.name, part.weight) for part in sets] == [("a", 3.0), ("b", 1.0)]
    assert sets[0].held_out is not None and sets[1].held_out is None
    assert sets[1].train_tokens == sum(len(f"berry {i} ") * 40 + 1 for i in range(60))
    tokens = TrainingSequences(sets, 8, 0, "shuffled").read(0, 0, 1, 8)
    assert tokens.shape == (1, 8, 33)

    raw["data"]["sets"][1]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^data\.sets\.1\.path: .*nowhere"):
        check_sets(checked(RunConfig, raw, "run").data, 300)


def test_sets_must_be_of_one_tokenizer(tmp_path):
    (tmp_path / "one.json").write_text(_byte_tokenizer())
    (tmp_path / "two.json").write_text(_byte_tokenizer(extra="<|pad|>"))
    (tmp_path / "a.jsonl").write_text('{"text": "some words to be tokenized"}\n' * 9)
    for name, tokenizer in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "two")):
        words = ["tokenize", tmp_path / "a.jsonl", "--output", tmp_path / name, "--tokenizer"]
        assert cli.main([*map(str, [*words, tmp_path / f"{tokenizer}.json", "--workers", 0])]) == 0
    (tmp_path / "d.json").unlink()

    def check(*sets, **more):
        data = {"sequence_length": 8, "held_out": 0.2} | more
        if len(sets) == 1:
            data |= {"source": "indexed", "path": sets[0]}
        else:
            data["sets"] = [
                {"name": f"set{i}", "weight": 1, "source": "indexed", "path": path} for i, path in enumerate(sets)
            ]
        check_sets(DataConfig(**data), 300)

    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    one, two = (str(tmp_path / name) for name in ("one.json", "two.json"))
    check(a, b)
    check([a, b], d, tokenizer=one)
    check([d, c], tokenizer=two)
    with pytest.raises(DataError) as error:
        check(a, [b, c])
    digests = [json.loads((tmp_path / f"{name}.json").read_text())["tokenizer_digest"][:12] for name in "ac"]
    assert str(error.value) == (
        f"data.sets.1.path: {c} was tokenized with {two} (SHA-256 {digests[1]}), but {a} was tokenized with {one}"
        f" (SHA-256 {digests[0]}): all sets of a run must be of one tokenizer"
    )
    with pytest.raises(DataError, match=rf"^data\.path: {c} was .*, but {a} was .*: all sets of a run must be of one"):
        check([a, d, c])
    with pytest.raises(DataError, match=rf"^data\.path: {c} was .*, but data\.tokenizer is {one}"):
        check([c], tokenizer=one)
    (tmp_path / "a_held_out.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    (tmp_path / "a_held_out.idx").write_bytes((tmp_path / "a.idx").read_bytes())
    (tmp_path / "a_held_out.json").write_bytes((tmp_path / "c.json").read_bytes())
    with pytest.raises(DataError, match=rf"^data\.path: {a}_held_out was .*, but {a} was"):
        check([a])
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json: cannot be read as JSON"):
        check([b])


def _byte_tokenizer(extra=None):
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", *([extra] if extra else [])])
    return tokenizer.to_str()
