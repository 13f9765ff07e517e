"""Ports are read from annotations however they are written, and what is none is refused in words.

Without the future import here on purpose: annotations are objects, as in a user's plain file.
"""

from typing import TYPE_CHECKING, Generic, TypeVar

import pytest

from flowrl import messages
from flowrl.errors import GraphError
from flowrl.graph import ports
from flowrl.graph.graph import Graph, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig, from_specification, specification
from flowrl.messages import Prompt, Rollouts, Scored

if TYPE_CHECKING:
    from flowrl.messages import Weights


class Judged(Scored):
    """A message of the user's own."""

    verdict: str


class Plain(Stage):
    class Config(StageConfig):
        strictness: int = 3

    rollouts: In[Rollouts]
    judged: Out[Judged]


class Qualified(Stage):
    rollouts: ports.In[messages.Rollouts]
    scored: "ports.Out[messages.Scored]"
    note: str = "no port"


class ForCheckersOnly(Stage):
    weights: "In[Weights]"


class NoMessage(Stage):
    numbers: In[int]  # type: ignore[type-var]


class Bare(Stage):
    numbers: In  # type: ignore[type-arg]


class Portless(Stage):
    pass


class Wrapped(Stage):
    scored: In[Scored] | None


class Listed(Stage):
    scored: "list[In[Scored]]"


M = TypeVar("M", bound=Rollouts)
N = TypeVar("N", bound=Rollouts)


class Sift(Stage, Generic[M]):
    """Takes and gives one kind of message, which its subclass names."""

    taken: In[M]
    given: Out[M]


class SiftScored(Sift[Scored]):
    pass


class SiftAny(Sift[N], Generic[N]):
    more: In[Prompt]


class SiftJudged(SiftAny[Judged]):
    more: In[Rollouts]  # pyright: ignore[reportIncompatibleVariableOverride]  # another message than the class above


def messages_of(kind: type[Stage]) -> dict[str, type]:
    return {name: port.message for name, port in kind(StageConfig()).ports.items()}


def test_ports_are_read_from_objects_and_from_text_by_whatever_name() -> None:
    assert messages_of(Plain) == {"rollouts": Rollouts, "judged": Judged}
    assert messages_of(Qualified) == {"rollouts": Rollouts, "scored": Scored}


def test_ports_of_a_generic_class_carry_what_its_subclass_names() -> None:
    assert messages_of(SiftScored) == {"taken": Scored, "given": Scored}
    assert messages_of(SiftAny) == {"taken": Rollouts, "given": Rollouts, "more": Prompt}
    assert messages_of(SiftJudged) == {"taken": Judged, "given": Judged, "more": Rollouts}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ForCheckersOnly, "ForCheckersOnly.weights: .* cannot be read .*'Weights' is not defined.*TYPE_CHECKING"),
        (NoMessage, "NoMessage.numbers: .*int.* is not a message; subclass flowrl.messages.Message"),
        (Bare, "Bare.numbers: does not say which message it carries"),
        (Wrapped, "Wrapped.scored: .* holds a port and is none; write the port alone, and list 'scored' in `optional`"),
        (Listed, "Listed.scored: .* holds a port and is none"),
    ],
)
def test_an_annotation_that_is_no_port_is_refused_in_words(kind: type[Stage], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        kind(StageConfig())


def test_a_class_without_ports_is_refused_in_words() -> None:
    portless = Portless(StageConfig())
    with pytest.raises(GraphError, match="idle: Portless declares no port; annotate what it takes and gives"):
        Graph(nodes={"idle": portless}, edges=[], until=portless).check()


def test_a_stage_with_settings_alone_needs_no_constructor_and_is_rebuilt_with_its_own_config() -> None:
    again = from_specification(specification(Plain(Plain.Config(strictness=5))), "judge")
    assert again.config == Plain.Config(strictness=5)
    assert isinstance(again.config, Plain.Config)


def test_a_config_of_another_node_is_refused_in_words() -> None:
    wrong = specification(Qualified(Plain.Config(strictness=5)))
    with pytest.raises(GraphError, match=r"judge: Qualified was given an argument of another type.*unknown field"):
        from_specification(wrong, "judge")


def test_an_edge_carries_a_message_of_the_user_s_own_to_a_port_of_what_it_extends() -> None:
    class Takes(Stage):
        scored: In[Scored]
        rollouts: Out[Rollouts]

    plain, takes = Plain(Plain.Config()), Takes(StageConfig())
    edges = [Queue(plain.judged, takes.scored), Queue(takes.rollouts, plain.rollouts, depth=1, most=1)]
    Graph(nodes={"plain": plain, "takes": takes}, edges=edges, until=takes).check()
    assert takes.ports["scored"].brings is Judged


def test_a_stage_defined_in_a_function_is_refused_before_another_process_looks_for_it() -> None:
    class Hidden(Stage):
        prompts: Out[Prompt]

    with pytest.raises(GraphError, match=r"Hidden: is defined inside a function"):
        specification(Hidden(StageConfig()))


def test_messages_are_found_by_their_tag_without_a_table() -> None:
    assert messages.kind_of(f"{__name__}:Judged") is Judged
    assert messages.kind_of("Scored") is Scored
