"""The messages that cross edges, and their wire form.

A message is a frozen msgspec struct; tensors travel as typed raw buffers, never as pickles. Each kind of message is
the one before it with fields added, so a stage may sit anywhere downstream of the fields it needs:

    Prompt -> Rollouts -> Scored -> Referenced -> Samples

An `Example` is what offline training learns from instead: a prompt with given responses. `Texts` are examples of a
pre-training loss beside the samples.

Invariants: `group_id` is the prompt's place in the run's prompt order and names the group everywhere; the lists in
`samples`, `scores[...]` and every per-sample list have one entry for each sample of the group, in the same order.
Held-out groups are numbered from `FIRST_HELDOUT`, so that no edge and no ledger takes one for a training group.
Stages build and read messages; only the runtime calls `encode` and `decode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast, dataclass_transform

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int32]


FIRST_HELDOUT = 1 << 40  # no training group of any run comes so far
FIRST_TEXTS = 1 << 41  # and no held-out group: the texts of step v are numbered FIRST_TEXTS + v


@dataclass_transform(frozen_default=True, kw_only_default=True)
class MessageMeta(msgspec.StructMeta):
    """Make every message frozen, keyword-only and tagged with its class name."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(
            mcls, name, bases, namespace, **{"frozen": True, "kw_only": True, "tag": name, **options}
        )


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
    num_samples: int
    seed: int  # sample i of the group is drawn with seed + i


class Rollouts(Prompt):
    """A prompt with its sampled responses."""

    samples: list[Sample]
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

    ref_logprobs: list[Buffer]  # float32, one buffer per sample


class Samples(Referenced):
    """What the learner learns from: advantages for every sampled token, and what made them."""

    advantages: list[Buffer]  # float32; not yet whitened over the step
    returns: list[Buffer] | None = None  # value targets, with a critic
    values: list[Buffer] | None = None  # the critic's values when sampled
    replays: list[Samples] = []  # groups learned before, to be learned along with this one


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
    max_mean_gap: float  # nats; the greatest mean |difference| that counts as the same weights


class Weights(Message):
    """A published policy version: how to fetch the bytes and how to prove they arrived."""

    version: int
    transport: str  # "shm" | "broadcast"
    manifest: bytes  # JSON of the transport: buckets, names, dtypes, shapes, digests
    canary: Canary | None
    size_bytes: int


class EvaluationRequest(Message):
    """A policy version to be evaluated before the learner publishes the next one."""

    version: int
    is_final: bool


class End(Message):
    """The source has admitted its last group."""

    version: int  # how many it has admitted in all


class Save(Message):
    """A checkpoint of `version` is being written: add your own state to it and acknowledge."""

    version: int
    directory: str  # of the checkpoint, not yet under its final name


AnyMessage = (
    Prompt
    | Rollouts
    | Scored
    | Referenced
    | Samples
    | Example
    | Texts
    | Credit
    | Weights
    | EvaluationRequest
    | Save
    | End
)
M = TypeVar("M", bound=Message)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Return the wire form (MessagePack, buffers as raw bytes)."""
    return _encoder.encode(message)


def decode(wire: bytes) -> AnyMessage:
    """Return the message a wire form holds; its class is in the tag.

    Raises:
        msgspec.ValidationError: the bytes are not one of the known messages.
    """
    return _decoder.decode(wire)


def extend(kind: type[M], message: Message, **fields: Any) -> M:
    """Return `message` as the larger `kind` with `fields` added, sharing the buffers.

    A message that already has more fields than `kind` keeps its own class: a second reward node turns Scored into
    Scored and a Referenced stays Referenced.
    """
    base = type(message) if issubclass(type(message), kind) else kind
    known = {name: getattr(message, name) for name in message.__struct_fields__}
    return cast("M", base(**{**known, **fields}))
