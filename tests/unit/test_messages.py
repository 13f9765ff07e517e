"""Messages survive the wire unchanged, grow into larger kinds without copying, and refuse foreign bytes."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st

from flowrl import messages
from flowrl.messages import (
    Buffer,
    Canary,
    Credit,
    End,
    EvaluationRequest,
    Example,
    Inquiry,
    Message,
    PinnedWeights,
    Prompt,
    Referenced,
    Rollouts,
    Routes,
    Sample,
    Samples,
    Save,
    Scored,
    Texts,
    VersionScore,
    VersionSpan,
    Weights,
    decode,
    encode,
    extend,
)

letters = st.text("a0 é中😀\0", max_size=8)  # one of each width in UTF-8; all of Unicode costs seconds to prepare
int32 = st.integers(-(2**31), 2**31 - 1)
float32 = st.floats(width=32)  # nan and infinities too: a broken log-prob must arrive as it is
int_buffers = st.lists(int32, max_size=8).map(Buffer.ints)
float_buffers = st.lists(float32, max_size=8).map(Buffer.floats)
counts = st.integers(0, 2**40)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | letters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
    max_leaves=6,
)
spans = st.builds(VersionSpan, version=counts, start=counts, end=counts)
samples = st.builds(
    Sample,
    token_ids=int_buffers,
    logprobs=float_buffers,
    versions=st.lists(spans, min_size=1, max_size=3),
    finish=st.sampled_from(["stop", "length", "abort"]),
    text=letters,
    mask=st.none() | float_buffers,
    routes=st.none() | st.just(Routes.of(np.arange(12).reshape(2, 3, 2))),
)
scores = st.dictionaries(letters, st.lists(st.floats(allow_nan=False), max_size=3), max_size=3)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "group_id": counts,
    "token_ids": int_buffers,
    "columns": st.dictionaries(letters, plain, max_size=3),
    "begun": letters,
    "num_samples": counts,
    "seed": counts,
    "samples": st.lists(samples, min_size=1, max_size=3),
    "generator": letters,
    "scores": scores,
    "placed": st.none() | st.lists(float_buffers, max_size=3),
    "ref_logprobs": st.lists(float_buffers, max_size=3),
    "advantages": st.lists(float_buffers, max_size=3),
    "returns": st.none() | st.lists(float_buffers, max_size=3),
    "values": st.none() | st.lists(float_buffers, max_size=3),
    "metrics": st.dictionaries(letters, st.floats(allow_nan=False), max_size=3),
    "replays": st.just([]),
    "responses": st.lists(int_buffers, min_size=1, max_size=3),
    "masks": st.none() | st.lists(float_buffers, max_size=3),
    "labels": st.lists(st.floats(allow_nan=False), max_size=3),
    "step_labels": st.none() | st.lists(float_buffers, max_size=3),
    "num_greedy": st.integers(0, 1),
    "num_given_up": counts,
    "num_mismatched": counts,
    "groups": st.lists(counts, max_size=4),
    "version": counts,
    "transport": st.sampled_from(["shm", "broadcast"]),
    "manifest": st.binary(max_size=32),
    "canary": st.none() | st.builds(Canary, token_ids=int_buffers, logprobs=float_buffers, max_mean_gap=st.just(1e-3)),
    "size_bytes": counts,
    "is_final": st.booleans(),
    "directory": letters,
    "by": letters,
    "score": st.none() | st.floats(allow_nan=False),
    "is_scored": st.booleans(),
    "until": st.lists(letters, max_size=2),
    "sampling": st.dictionaries(letters, st.integers(0, 9), max_size=2),
}
KINDS: list[type[Message]] = [
    Prompt, Rollouts, Scored, Referenced, Samples, Example, Texts, Credit, Weights, PinnedWeights,
    EvaluationRequest, VersionScore, Inquiry, Save, End,
]  # fmt: skip
CHAIN: list[type[Prompt]] = [Prompt, Rollouts, Scored, Referenced, Samples]


def of_kind(kind: type[Message]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: FIELDS[name] for name in kind.__struct_fields__})


FIELDS["replays"] = st.lists(of_kind(Samples), max_size=1)
FIELDS["examples"] = st.lists(of_kind(Example), max_size=2)


def one(kind: type[Message], **changed: Any) -> Any:
    """A message of each kind with two samples."""
    sample = Sample(
        token_ids=Buffer.ints([7, 8]),
        logprobs=Buffer.floats([-0.5, -1.5]),
        versions=[VersionSpan(4, 0, 1), VersionSpan(5, 1, 2)],
        finish="stop",
        text="hi",
    )
    column = [Buffer.floats([0.5, 1.5])] * 2
    values: dict[str, Any] = {
        "group_id": 3, "token_ids": Buffer.ints([1, 2]), "columns": {"answer": "7"}, "begun": "",
        "num_samples": 2, "seed": 11,
        "num_greedy": 0,
        "num_given_up": 2,
        "samples": [sample, sample], "generator": "generator.0", "scores": {"exact": [1.0, 0.0], "short": [0.25, -0.5]},
        "ref_logprobs": column, "advantages": column, "returns": column, "values": column, "metrics": {"kl": 0.5},
        "placed": column, "replays": [],
        "groups": [1], "version": 5, "transport": "shm", "manifest": b"{}", "canary": None, "size_bytes": 9,
        "is_final": True,
    }  # fmt: skip
    return kind(**{name: values[name] for name in kind.__struct_fields__} | changed)


def test_every_kind_of_message_is_tested_here_and_known_to_the_wire():
    defined = {each for each in vars(messages).values() if isinstance(each, type) and issubclass(each, Message)}
    assert defined - {Message} == set(KINDS)
    assert all(messages.kind_of(kind.__name__) is kind for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(data=st.data())
def test_a_message_comes_back_from_the_wire_as_it_was(kind: type[Message], data: st.DataObject):
    message = data.draw(of_kind(kind))
    back = decode(encode(message))
    assert type(back) is kind
    assert back == message


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(values=st.lists(float32, max_size=16))
def test_floats_keep_every_bit_nan_included(values: list[float]):
    back = Buffer.floats(values)
    assert back.numpy().tobytes() == np.asarray(values, dtype=np.float32).tobytes()
    assert len(back) == len(values)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(values=st.lists(int32, max_size=16))
def test_ints_come_back_as_they_were(values: list[int]):
    assert Buffer.ints(values).tolist() == values
    assert len(Buffer.ints(values)) == len(values)


def test_a_buffer_packs_a_strided_array():
    assert Buffer.ints(np.arange(6, dtype=np.int32)[::2]).tolist() == [0, 2, 4]
    assert Buffer.floats(np.asarray([[1.0, 9.0], [2.0, 9.0]], dtype=np.float32)[:, 0]).tolist() == [1.0, 2.0]


def test_a_buffer_is_read_only():
    array = Buffer.floats([1.0]).numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2.0


def test_buffers_travel_as_raw_bytes():
    tokens = 1024
    sample = Sample(
        token_ids=Buffer.ints(range(tokens)),
        logprobs=Buffer.floats([-0.5] * tokens),
        versions=[VersionSpan(1, 0, tokens)],
        finish="stop",
        text="",
    )
    wire = encode(one(Rollouts, samples=[sample]))
    assert len(wire) < 2 * 4 * tokens + 300


@pytest.mark.parametrize("smaller", CHAIN)
@pytest.mark.parametrize("larger", CHAIN)
def test_extend_grows_and_never_shrinks(smaller: type[Prompt], larger: type[Prompt]):
    message = one(smaller)
    missing = set(larger.__struct_fields__) - set(smaller.__struct_fields__)
    grown = extend(larger, message, **{name: getattr(one(larger), name) for name in missing})
    assert type(grown) is (larger if issubclass(larger, smaller) else smaller)
    for name in smaller.__struct_fields__:
        assert getattr(grown, name) is getattr(message, name), f"{name} is shared, not copied"


def test_extend_replaces_a_field_and_leaves_the_message_alone():
    scored = one(Scored)
    again = extend(Scored, scored, scores={**scored.scores, "more": [1.0, 1.0]})
    assert again.rewards == [2.25, 0.5]
    assert scored.rewards == [1.25, -0.5]


def test_a_second_reward_keeps_a_referenced_message_referenced():
    assert type(extend(Scored, one(Referenced), scores={"again": [0.0, 0.0]})) is Referenced


def test_extend_refuses_fields_that_the_kind_lacks_or_needs():
    with pytest.raises(TypeError, match="scores"):
        extend(Scored, one(Rollouts))
    with pytest.raises(TypeError, match="colour"):
        extend(Rollouts, one(Rollouts), colour="red")


def test_the_reward_is_the_sum_of_all_scores_for_each_sample():
    assert one(Scored).rewards == [1.25, -0.5]


def test_scores_of_unequal_length_have_no_reward():
    with pytest.raises(ValueError, match="shorter"):
        _ = one(Scored, scores={"a": [1.0, 2.0], "b": [1.0]}).rewards


def test_the_oldest_version_of_a_group_is_that_of_its_oldest_token():
    fresh = msgspec.structs.replace(one(Rollouts).samples[0], versions=[VersionSpan(9, 0, 2)])
    old = msgspec.structs.replace(fresh, versions=[VersionSpan(8, 0, 1), VersionSpan(6, 1, 2)])
    assert one(Rollouts, samples=[fresh, old]).oldest_version == 6


def test_a_message_cannot_be_changed():
    with pytest.raises(AttributeError):
        one(Prompt).group_id = 4


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\xc1",
        b"not a message",
        msgspec.msgpack.encode(3),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Prompt", "group_id": 1}),
        msgspec.msgpack.encode({"type": "Credit", "groups": ["x"]}),
        encode(one(Samples))[:-1],
        encode(one(Samples)) + b"\x00",
    ],
    ids=lambda wire: wire[:12].hex() or "nothing",
)
def test_bytes_that_are_no_message_are_refused(wire: bytes):
    with pytest.raises(msgspec.DecodeError):
        decode(wire)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_message_is_refused_or_still_a_message(place: int, value: int):
    damaged = bytearray(encode(one(Scored)))
    damaged[place % len(damaged)] = value
    try:
        found = decode(bytes(damaged))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert isinstance(found, Message)


def test_a_newer_sender_may_add_fields():
    tree = msgspec.msgpack.decode(encode(one(Credit)))
    assert decode(msgspec.msgpack.encode({**tree, "since_2_0": 1})) == one(Credit)


def test_nan_scores_reach_the_far_side():
    back = decode(encode(one(Scored, scores={"exact": [math.nan, 1.0]})))
    assert isinstance(back, Scored)
    assert math.isnan(back.rewards[0])


class Graded(Scored):
    """A user's message: a grade of the group, and one for each sample."""

    grade: str = "none"
    marks: list[int] = []


def graded(**changed: Any) -> Any:
    scored = one(Scored)
    return Graded(**{name: getattr(scored, name) for name in Scored.__struct_fields__}, **changed)


def test_a_users_message_keeps_its_fields_through_every_later_stage_and_over_the_wire():
    column = [Buffer.floats([0.5, 1.5])] * 2
    referenced: Any = extend(Referenced, graded(grade="good", marks=[3, 5]), ref_logprobs=column)
    again: Any = decode(encode(referenced))
    assert issubclass(type(again), Referenced)
    assert (again.grade, again.marks, again.ref_logprobs) == ("good", [3, 5], column)
    learned: Any = extend(Samples, again, advantages=column)
    assert issubclass(type(learned), Samples)
    assert decode(encode(learned)) == learned
    assert (learned.grade, learned.marks, learned.replays) == ("good", [3, 5], [])
    assert type(extend(Referenced, graded(), ref_logprobs=column)) is type(referenced)


def test_a_users_message_is_loaded_where_it_is_not_known(monkeypatch: pytest.MonkeyPatch):
    wire = encode(graded(grade="new here"))
    monkeypatch.delitem(messages._kinds, f"{__name__}:Graded")
    assert decode(wire).grade == "new here"


def test_what_is_no_kind_of_message_is_refused():
    wire = msgspec.msgpack.encode({"type": "Nothing", "group_id": 1})
    with pytest.raises(msgspec.ValidationError, match="'Nothing' is not a kind of message"):
        decode(wire)


def test_a_group_is_narrowed_in_every_list_of_its_samples_and_in_no_other():
    whole: Any = extend(
        Samples,
        graded(marks=[3, 5]),
        ref_logprobs=[Buffer.floats([0.0]), Buffer.floats([1.0])],
        advantages=[Buffer.floats([2.0]), Buffer.floats([3.0])],
        replays=[one(Samples)],
    )
    narrow = messages.narrowed(whole, [1])
    assert (narrow.marks, narrow.scores) == ([5], {"exact": [0.0], "short": [-0.5]})
    assert [row.tolist() for row in (*narrow.ref_logprobs, *narrow.advantages)] == [[1.0], [3.0]]
    assert (len(narrow.samples), narrow.returns, narrow.replays) == (1, None, [one(Samples)])
    assert messages.narrowed(whole, [1, 0]).marks == [5, 3]
