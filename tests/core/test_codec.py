"""Records survive the codec exactly; anything else is refused in a sentence."""

from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prism_ray.codec import CodecError, decode, encode
from prism_ray.records import Group, Prompt, Rollout, Trajectory, Verdict

text = st.text(max_size=20)
floats = st.floats(width=32, allow_nan=False)
small = st.dictionaries(text, floats, max_size=3)


@st.composite
def rollouts(draw):
    length = draw(st.integers(0, 12))
    ints = arrays.arrays(np.int32, length)
    return Rollout(
        draw(text), draw(st.integers(0, 99)), draw(arrays.arrays(np.int32, 3)), draw(ints),
        draw(arrays.arrays(np.float32, length)), draw(ints), draw(text), draw(st.sampled_from(["stop", "length"])),
    )  # fmt: skip


prompts = st.builds(
    Prompt,
    id=text,
    messages=st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=2).map(tuple),
    images=st.lists(st.binary(max_size=30), max_size=2).map(tuple),
    reference=text,
    extra=st.dictionaries(text, st.one_of(text, st.integers(-(2**40), 2**40), st.lists(text, max_size=2)), max_size=3),
    token_ids=st.lists(st.integers(0, 2**20), max_size=3).map(tuple),
    tokens_of=text,
)
verdicts = st.builds(Verdict, floats, st.booleans(), text, small, small, small, st.integers(0, 9))


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (Rollout, Group, Trajectory)):
        return type(a) is type(b) and all(same(v, getattr(b, k)) for k, v in vars(a).items())
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@given(prompts, st.lists(rollouts(), max_size=3), st.lists(verdicts, min_size=3, max_size=3), st.integers(0, 2**40))
def test_a_group_survives(prompt, members, judged, number):
    group = Group(number, prompt, tuple(members)).judged(judged[: len(members)])
    assert same(decode(encode(group)), group)
    assert all(same(decode(encode(t)), t) for t in group.trajectories)


@given(arrays.arrays(st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]), arrays.array_shapes(min_side=0)))
def test_arrays_of_any_shape_survive(array):
    assert same(decode(encode(array)), array)


@given(st.binary(max_size=60))
def test_garbage_never_raises_anything_but_codec_error(data):
    try:
        decode(data)
    except CodecError as error:
        assert str(error)


def test_objects_and_object_arrays_are_refused():
    with pytest.raises(CodecError, match="dtype object"):
        encode(np.array([object()]))
    with pytest.raises(CodecError, match="cannot encode"):
        encode({"a": object()})


def test_a_record_of_another_version_says_so():
    data = encode(Verdict(1.0, True)).replace(b"Verdict", b"Verdigt")
    with pytest.raises(CodecError, match="Verdigt"):
        decode(data)


def test_a_prompt_of_a_journal_from_before_token_ids_travelled_is_read():
    prompt = Prompt("p", ({"role": "user", "content": "<image>?"},), (b"i",), "r", "g", "s", {"a": 1})
    old = ["Prompt", {name: value for name, value in vars(prompt).items() if name not in ("token_ids", "tokens_of")}]
    old[1] |= {"messages": list(prompt.messages), "images": list(prompt.images)}
    read = decode(msgpack.packb({"prompt": msgpack.ExtType(2, msgpack.packb(old))}))["prompt"]
    assert replace(read, messages=prompt.messages, images=prompt.images) == prompt and read.token_ids == ()


def test_as_many_verdicts_as_rollouts():
    with pytest.raises(ValueError, match="0 rollouts but 1 verdicts"):
        Group(3, Prompt("p", ()), ()).judged([Verdict(0.0, True)])
