"""The messages that cross edges, and their wire form.

A message is a frozen msgspec struct; tensors travel as typed raw buffers, never as pickles. Each kind of message is
the one before it with fields added, so a stage may sit anywhere downstream of the fields it needs:

    Prompt -> Rollouts -> Scored -> Referenced -> Samples

An `Example` is what offline training learns from instead: a prompt with given responses. `Texts` are examples of a
pre-training loss beside the samples.

Messages are open. A subclass of the user's own goes on any edge that takes what it extends; what it adds stays with the
group through every later stage (`extend`) and to the disk. A number or a buffer that a stage puts into
`Sample.columns` reaches the loss as `LossBatch.columns`. Whatever rebuilds a message therefore goes by its fields.

Invariants:
- `group_id` is the prompt's place in the run's prompt order and names the group everywhere;
- the lists in `samples`, `scores[...]` and every per-sample list have one entry for each sample of the group, in the
  same order.

Held-out groups are numbered from `FIRST_HELDOUT`, so that no edge and no ledger takes one for a training group. Stages
build and read messages; only the runtime calls `encode` and `decode`.

Tests: tests/unit/test_messages.py
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, dataclass_transform, get_args, get_origin

import msgspec

from flowrl.imports import load_class, place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int32]


FIRST_HELDOUT = 1 << 40  # no training group of any run comes so far
FIRST_TEXTS = 1 << 41  # and no held-out group: the texts of step v are numbered FIRST_TEXTS + v


OURS = __name__.partition(".")[0]
AND = "&"  # in a tag, between a kind of message and the one whose further fields it has
_kinds: dict[str, Any] = {}  # message classes by tag


@dataclass_transform(frozen_default=True, kw_only_default=True)
class MessageMeta(msgspec.StructMeta):
    """Make every message frozen, keyword-only and tagged: with its class name, or with what a user's is loaded by."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        module = namespace.get("__module__", OURS)
        tag = name if module == __name__ else place_of(module, namespace.get("__qualname__", name))
        told = {"frozen": True, "kw_only": True, "tag": tag, **options}
        kind: Any = super().__new__(mcls, name, bases, namespace, **told)
        _kinds[told["tag"]] = kind
        return kind


class Message(msgspec.Struct, metaclass=MessageMeta):
    """Base of everything that crosses an edge."""


class Buffer(msgspec.Struct, frozen=True, array_like=True):
    """A one-dimensional array as raw little-endian bytes; `dtype` is int32 or float32."""

    dtype: str
    data: bytes

    @classmethod
    def ints(cls, values: Sequence[int] | NDArray[Any]) -> Buffer:
        """Pack token ids; `Buffer.ints([1, 2]).tolist() == [1, 2]`."""
        import numpy as np

        return cls("int32", np.ascontiguousarray(values, dtype="<i4").tobytes())

    @classmethod
    def floats(cls, values: Sequence[float] | NDArray[Any]) -> Buffer:
        """Pack log-probs or values as float32."""
        import numpy as np

        return cls("float32", np.ascontiguousarray(values, dtype="<f4").tobytes())

    def numpy(self) -> NDArray[Any]:
        """Return a read-only view; copy before changing it."""
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype)

    def tolist(self) -> list[Any]:
        """Return the values as Python numbers."""
        return self.numpy().tolist()

    def __len__(self) -> int:
        return len(self.data) // 4


class Routes(msgspec.Struct, frozen=True, array_like=True):
    """The experts that tokens were sent to, in each layer: raw bytes, one or two for an expert."""

    num_layers: int
    top_k: int  # experts of a token; all 0 in layers without experts
    dtype: str  # uint8 or uint16
    data: bytes

    @classmethod
    def of(cls, routes_TAK: NDArray[Any]) -> Routes:
        """Pack experts [tokens, layers, top_k] below 65,536."""
        dtype, raw = ("uint8", "u1") if routes_TAK.max(initial=0) < 256 else ("uint16", "<u2")
        _, num_layers, top_k = routes_TAK.shape
        return cls(num_layers, top_k, dtype, routes_TAK.astype(raw).tobytes())

    def numpy(self) -> NDArray[Any]:
        """Return a read-only view, [tokens, layers, top_k]."""
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(-1, self.num_layers, self.top_k)


OF_GROUP = msgspec.Meta(extra={"is_of_group": True})  # a list with another length than the group has samples


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a response were sampled by policy `version`; an environment's tokens are in no span."""

    version: int
    start: int
    end: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One response: what was sampled, with which probability, by which policy versions.

    Of an episode of several turns it is everything behind the prompt, up to the policy's last token.
    """

    token_ids: Buffer  # int32; ends with the stop token when finish == "stop"
    logprobs: Buffer  # float32, one per token: behaviour log-probs under the sampling distribution; 0 under mask 0
    versions: list[VersionSpan]
    finish: str  # "stop" | "length" | "abort"; of an episode: ended by its environment, or cut by a limit
    text: str  # what the tokens say, special ones too, without the one that ended it
    mask: Buffer | None = None  # float32, 1 on the tokens the policy sampled, 0 on an environment's; None: all are its
    # The experts of each token that was fed: the prompt's and all of these but the last (engines/routes.py).
    routes: Routes | None = None
    # What a user's stage knows of the sample, for the loss: one float32 for each token, or one number for all of them.
    columns: dict[str, Buffer | float] = {}

    @property
    def oldest_version(self) -> int:
        """Return the version that sampled the oldest token."""
        return min(span.version for span in self.versions)

    @property
    def num_sampled(self) -> int:
        """Return how many tokens the policy sampled."""
        return len(self.token_ids) if self.mask is None else int(self.mask.numpy().sum())


class Prompt(Message):
    """One prompt to be sampled `num_samples` times."""

    group_id: int
    token_ids: Buffer  # int32, chat template applied
    columns: dict[str, Any]  # the data set's columns for reward functions; JSON-able
    begun: str = ""  # what the tokens end with of the answer: a template's <think>, a row's answer_prefix
    num_samples: int
    seed: int  # sample i of the group is drawn with seed + i


class Inquiry(Prompt):
    """Something that a benchmark asks about a version: how likely its tokens are, or what follows them."""

    is_scored: bool = False  # the tokens' log-probs are asked for, and nothing is sampled
    until: list[str] = []  # strings that end an answer
    sampling: dict[str, Any] = {}  # max_tokens, temperature, seed, ... of an answer


class Rollouts(Prompt):
    """A prompt with its sampled responses."""

    samples: list[Sample]
    num_given_up: int = 0  # so many more were begun, and aborted when these had ended
    num_greedy: int = 0  # so many samples at the end are the likeliest response: scored, as a baseline, never learned
    generator: str  # node and replica, for errors and the timeline

    @property
    def oldest_version(self) -> int:
        """Return the oldest version in the whole group; staleness is counted from it."""
        return min(sample.oldest_version for sample in self.samples)


class Scored(Rollouts):
    """Rollouts with one or more named scores, each already weighted; the reward is their sum.

    `placed` says which part of the reward was earned before the end, and where: by a turn's last token, or a step's.
    """

    scores: dict[str, list[float]]
    placed: list[Buffer] | None = None  # float32, one value per token; what remains of the reward is the last token's
    metrics: dict[str, float] = {}  # figures of this group, of the stage that credits it or selects from it

    @property
    def rewards(self) -> list[float]:
        """Return the sum of all named scores, one number per sample."""
        return [sum(column) for column in zip(*self.scores.values(), strict=True)]


class Referenced(Scored):
    """Scored rollouts with the frozen reference's log-probs of the sampled tokens."""

    ref_logprobs: list[Buffer]  # float32, one buffer per sample; []: not scored, for nothing learned uses them


class Samples(Referenced):
    """What the learner learns from: advantages for every sampled token, and what made them."""

    advantages: list[Buffer]  # float32; not yet whitened over the step
    returns: list[Buffer] | None = None  # value targets, with a critic
    values: list[Buffer] | None = None  # the critic's values when sampled
    replays: Annotated[list[Samples], OF_GROUP] = []  # groups learned before, to be learned along with this one


def replays_of(message: Message) -> list[Samples]:
    """Return the groups that are learned along with a message, having been learned before."""
    return message.replays if isinstance(message, Samples) else []


class Example(Message):
    """A prompt with given responses to learn from offline; the lists have one entry for each response.

    `masks`, `step_labels` and `ref_logprobs` are float32, one value for each response token.
    """

    group_id: int  # the example's place in the run's order; held-out ones count from FIRST_HELDOUT
    token_ids: Buffer  # int32, the prompt
    responses: list[Buffer]  # int32; of a preference pair the chosen one first
    masks: list[Buffer] | None = None  # 1 on the tokens to learn; None: all of them
    labels: list[float] = []  # preference margin, desirability (above 0), or quality
    step_labels: list[Buffer] | None = None  # a step's label on its last token, nan elsewhere
    ref_logprobs: list[Buffer] | None = None  # of the frozen reference, or the teacher
    num_mismatched: int = 0  # so many responses at the end belong to another prompt (KTO); they have no label

    @property
    def oldest_version(self) -> int:
        """Return -1: no policy version of this run sampled the responses."""
        return -1


class Texts(Message):
    """Texts to learn beside the samples of one step; on the way to their source it holds none and asks for them."""

    group_id: int  # FIRST_TEXTS + the step
    examples: list[Example] = []


class Credit(Message):
    """Rights to admit a group: given out, each names the group to admit; coming back, the learned groups it is from."""

    groups: list[int] = []


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """A fixed sequence and the learner's own log-probs of its tokens [1:] at one version."""

    token_ids: Buffer  # int32 [T]
    logprobs: Buffer  # float32 [T-1], temperature 1
    max_mean_gap: float  # nats; the greatest mean |difference| of two implementations of any model in this dtype


class Weights(Message):
    """A published policy version: how to fetch the bytes and how to prove they arrived."""

    version: int
    transport: str  # "shm" | "broadcast"
    manifest: bytes  # JSON of the transport: buckets, names, dtypes, shapes, digests
    canary: Canary | None
    size_bytes: int


class PinnedWeights(Weights):
    """A version for whoever keeps it while the others go on: it is fetched when they have it already."""


class EvaluationRequest(Message):
    """A policy version to be evaluated, which the generators that are asked serve until it is acknowledged."""

    version: int
    is_final: bool


class VersionScore(Message):
    """What an evaluation gave a policy version, by which the best is chosen."""

    version: int
    by: str  # what was evaluated
    score: float | None  # more is better; None: it could not be evaluated


class End(Message):
    """The source has admitted its last group."""

    version: int  # how many it has admitted in all


class Save(Message):
    """A checkpoint of `version` is being written: add your own state to it and acknowledge."""

    version: int
    directory: str  # of the checkpoint, not yet under its final name


M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Rollouts)

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[str, Any] = {}  # by tag


class _Tagged(msgspec.Struct):
    """What every wire form begins with."""

    type: str


def encode(message: Message) -> bytes:
    """Return the wire form (MessagePack, buffers as raw bytes)."""
    return _encoder.encode(message)


def decode(wire: bytes) -> Any:
    """Return the message a wire form holds; its class is in the tag, and is loaded where this process has not yet.

    Raises:
        msgspec.ValidationError: the bytes are not a message.
    """
    return _decoder(_tag_of(wire)).decode(wire)


def _tag_of(wire: bytes) -> str:
    return msgspec.msgpack.decode(wire, type=_Tagged).type


def _decoder(tag: str) -> Any:
    kind = kind_of(tag)
    found = _decoders.get(tag)
    if found is None or found.type is not kind:
        found = _decoders[tag] = msgspec.msgpack.Decoder(kind)
    return found


def kind_of(tag: str) -> Any:
    """Return the class of a tag.

    Raises:
        msgspec.ValidationError: there is none.
        ConfigError: a user's does not load.
    """
    if tag in _kinds:
        return _kinds[tag]
    first, both, second = tag.partition(AND)
    if both:
        return joined(kind_of(first), kind_of(second))
    if ":" not in tag:
        raise msgspec.ValidationError(f"{tag!r} is not a kind of message")
    return load_class(tag, f"message {tag}")


@functools.cache
def joined(kind: type[M], other: type[Message]) -> type[M]:
    """Return `kind` with the further fields of another message, made once for all processes by its tag."""
    namespace: dict[str, Any] = {"__module__": __name__, "__annotations__": {}}
    for field in msgspec.structs.fields(other):
        if field.name in kind.__struct_fields__:
            continue
        namespace["__annotations__"][field.name] = field.type
        if field.default is not msgspec.NODEFAULT:
            namespace[field.name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            namespace[field.name] = msgspec.field(default_factory=field.default_factory)
    tag = AND.join(str(each.__struct_config__.tag) for each in (kind, other))
    return cast("type[M]", MessageMeta(f"{kind.__name__}And{other.__name__}", (kind,), namespace, tag=tag))


def extend(kind: type[M], message: Message, **fields: Any) -> M:
    """Return `message` as the larger `kind` with `fields` added, sharing the buffers.

    A message that already has more fields than `kind` keeps its own class: a second reward node turns Scored into
    Scored and a Referenced stays Referenced. What a user's message has besides goes along.
    """
    base = type(message)
    if not issubclass(base, kind):
        base = kind if set(base.__struct_fields__) <= set(kind.__struct_fields__) else joined(kind, base)
    known = {name: getattr(message, name) for name in message.__struct_fields__}
    return cast("M", base(**{**known, **fields}))


def narrowed(message: R, places: Sequence[int], **fields: Any) -> R:
    """Return a group with the samples at these places only, in this order, and `fields` changed.

    Every list that a message has is one of its samples, unless its type says otherwise (`OF_GROUP`).
    """
    chosen: dict[str, Any] = {}
    for field in msgspec.structs.fields(type(message)):
        value = getattr(message, field.name)
        match _per_sample(field.type):
            case "list" if value:
                chosen[field.name] = [value[place] for place in places]
            case "lists by name" if value is not None:
                chosen[field.name] = {name: [row[place] for place in places] for name, row in value.items()}
            case _:
                pass
    return msgspec.structs.replace(message, **{**chosen, **fields})


@functools.cache
def buffer_fields(kind: type[Message]) -> list[str]:
    """Return the fields of a message that hold a buffer for each sample."""
    fields = msgspec.structs.fields(kind)
    return [field.name for field in fields if any(each == list[Buffer] for each in (field.type, *get_args(field.type)))]


def _per_sample(annotation: Any) -> str:
    """Return how a field's type holds one entry for each sample: "list", "lists by name", or "" where it does not."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = getattr(arguments[1], "extra", None) or {}
        return "" if extra.get("is_of_group") else _per_sample(arguments[0])
    if origin is list:
        return "list"
    if origin is dict and get_origin(arguments[1]) is list:
        return "lists by name"
    found = (_per_sample(each) for each in arguments) if type(None) in arguments else ()
    return next((each for each in found if each), "")
