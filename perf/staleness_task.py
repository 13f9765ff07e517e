"""A model and a task for perf/staleness: counting, which a two-layer Llama learns within a minute.

The prompt is a digit d, the response T tokens, and the reward the share of them that are right: d, d + 1, ... modulo
5. The flow is flowrl's own (graph, credits, channels, learner, weights through shared memory); the sampler is plain
torch, and time is virtual: sampling a token and training a step take the seconds they are told to, so that staleness
is what the credits allow and a run is the same whatever else the machine does. Every number of it is computed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from flowrl.config import Select
from flowrl.data.prompts import PromptRow
from flowrl.engines.base import GenerationConfig, Sampling, Schedule, UpdateReport
from flowrl.engines.torch import TorchEngine
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.graph.staleness import most_credits
from flowrl.messages import Buffer, Referenced, Rollouts, Sample, VersionSpan, Weights, extend
from flowrl.stages.advantage import Advantage
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Learning, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from flowrl.graph.stage import Context
    from flowrl.messages import FloatArray

FIRST_DIGIT = 3  # token of the digit 0
NUM_DIGITS = 5
VOCABULARY = 64  # the smallest that the learner's canary knows
RESPONSE = 6  # tokens
PRETRAINING_STEPS, PRETRAINING_BATCH = 150, 60
SHARE_SHOWN = 0.25  # of the pre-training digits are right on purpose, one in five of the others by chance
TOKEN_S, STEP_S = 0.01, 1.0  # virtual: sampling is quick beside training, so samples wait and grow stale


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    seed: int
    staleness: int
    method: str  # a kind of correction, with GRPO; or the path of an algorithm
    steps: int  # policy versions that sample
    groups_per_step: int
    group_size: int
    lr: float
    minibatches: int
    entropy: float  # weight of the bonus: without it the policy soon says one number only
    schedule: Literal["cosine", "linear", "constant"] = "constant"  # of the learning rate


def tiny_counter(directory: Path, seed: int, *, share_shown: float = SHARE_SHOWN) -> Path:
    """Write a model that says digits and, with the default, hardly counts yet (22 % right); return its directory.

    `share_shown` of the digits it was trained on are right on purpose; with 0.95 it is a teacher.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if directory.exists():
        return directory
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    digits_B = torch.arange(PRETRAINING_BATCH) % NUM_DIGITS
    right_BT = torch.tensor([right_digits(int(digit)) for digit in digits_B])
    starts_B2 = torch.stack([torch.ones_like(digits_B), FIRST_DIGIT + digits_B], 1)
    for _ in range(PRETRAINING_STEPS):
        random_BT = torch.randint(FIRST_DIGIT, FIRST_DIGIT + NUM_DIGITS, right_BT.shape)
        shown_BT = torch.where(torch.rand(right_BT.shape) < share_shown, right_BT, random_BT)
        ids_BL = torch.cat([starts_B2, shown_BT], 1)
        logprobs_BLV = model(input_ids=ids_BL).logits[:, 1:-1].log_softmax(-1)
        loss = -logprobs_BLV.gather(2, shown_BT[:, :, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    words = {str(token): token for token in range(VOCABULARY)}  # never used: prompts and rewards are tokens
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0"))).save_pretrained(directory)
    return directory


def right_digits(digit: int) -> list[int]:
    """Return the tokens that count from a digit; from 3: 3, 4, 0, 1, ..."""
    return [FIRST_DIGIT + (digit + place) % NUM_DIGITS for place in range(RESPONSE)]


class Digits:
    """Prompt k is the digit k modulo 5."""

    def row_at(self, position: int) -> PromptRow:
        """Return the prompt."""
        digit = position % NUM_DIGITS
        return PromptRow(
            index=position, place=f"digits:{position}", text=str(digit),
            token_ids=[1, FIRST_DIGIT + digit], columns={"digit": digit},
        )  # fmt: skip


class DigitPrompts(Prompts):
    """Admits digits."""

    def load(self) -> Any:
        """Return the prompts."""
        return Digits()


class Decoding:
    """A request under way: its rows so far, and the token that they take next once it is known."""

    def __init__(self, ids_BL: Tensor, noise_BTV: Tensor) -> None:
        self.ids_BL = ids_BL
        self.noise_BTV = noise_BTV
        self.place = 0
        self.next: tuple[Tensor, Tensor, int] | None = None  # tokens [B, 1], their log-probs [B, 1], version


class TorchSampler:
    """A generation engine in plain torch: all requests one token further together, under the newest weights it has."""

    def __init__(self, config: GenerationConfig, *, where: str, receiver_index: int = 0) -> None:
        from flowrl.engines.weights.shm import ShmFetcher

        self.num_running = 0
        self._config = config
        self._fetcher = ShmFetcher(where)
        self._version = -1
        self._model: Any = None
        self._running: list[Decoding] = []

    async def open(self) -> None:
        """Load the model."""
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(self._config.model).eval()

    async def serve_loaded(self) -> None:
        """Serve the model as it was loaded."""
        self._version = 0

    async def generate(
        self, *, request_id: str, prompt_ids: Sequence[int], num_samples: int, seed: int, sampling: Sampling
    ) -> list[Sample]:
        """Sample by the Gumbel trick from noise of each sample's own seed; new weights take effect between tokens."""
        import numpy as np
        import torch

        noise_BTV = torch.from_numpy(
            np.stack([np.random.default_rng(seed + i).gumbel(size=(RESPONSE, VOCABULARY)) for i in range(num_samples)])
        ).float()
        decoding = Decoding(torch.tensor([list(prompt_ids)] * num_samples), noise_BTV)
        self._running.append(decoding)
        logprobs: list[Tensor] = []
        versions: list[int] = []
        for _ in range(RESPONSE):
            await asyncio.sleep(TOKEN_S)  # those who came at the same moment have joined by then
            if decoding.next is None:
                self._decode()
            assert decoding.next is not None
            taken_B1, logprobs_B1, version = decoding.next
            decoding.next = None
            decoding.place += 1
            decoding.ids_BL = torch.cat([decoding.ids_BL, taken_B1], 1)
            logprobs.append(logprobs_B1)
            versions.append(version)
        self._running.remove(decoding)
        logprobs_BT, tokens_BT = torch.cat(logprobs, 1), decoding.ids_BL[:, len(prompt_ids) :]
        spans = spans_of(versions)
        return [
            Sample(token_ids=Buffer.ints(tokens.numpy()), logprobs=Buffer.floats(row.numpy()), versions=spans,
                   finish="length", text="")
            for tokens, row in zip(tokens_BT, logprobs_BT, strict=True)
        ]  # fmt: skip

    def _decode(self) -> None:
        """Draw the next token of every request that has none; rows are padded behind, where causal attention sees none.

        A token drawn before new weights arrived is of the version that drew it, whenever its request takes it.
        """
        import torch

        waiting = [each for each in self._running if each.next is None]
        longest = max(each.ids_BL.shape[1] for each in waiting)
        ids_BL = torch.cat([torch.nn.functional.pad(e.ids_BL, (0, longest - e.ids_BL.shape[1])) for e in waiting])
        last_B = torch.cat([torch.full((len(e.ids_BL),), e.ids_BL.shape[1] - 1) for e in waiting])
        with torch.no_grad():
            logits_BV = self._model(input_ids=ids_BL).logits[torch.arange(len(ids_BL)), last_B]
        parts = logits_BV.log_softmax(-1).split([len(each.ids_BL) for each in waiting])
        for each, logprobs_BV in zip(waiting, parts, strict=True):
            taken_B1 = (logprobs_BV + each.noise_BTV[:, each.place]).argmax(-1)[:, None]
            each.next = taken_B1, logprobs_BV.gather(1, taken_B1), self._version

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Load a version from shared memory."""
        from flowrl.engines.weights.base import unpack
        from flowrl.engines.weights.manifest import decode_manifest

        manifest = decode_manifest(weights.manifest)
        buffers = self._fetcher.fetch(manifest)
        tensors = {n: t for b, raw in zip(manifest.buckets, buffers, strict=True) for n, t in unpack(b, raw)}
        self._model.load_state_dict(tensors)
        self._version = weights.version
        return UpdateReport(version=weights.version, pause_s=0.0, transfer_s=0.0, mean_gap=0.0, max_gap=0.0)

    async def close(self) -> None:
        """Forget the model."""
        self._model = None


def spans_of(versions: Sequence[int]) -> list[VersionSpan]:
    """Return the runs of equal versions; [4, 4, 5] are two."""
    starts = [t for t, version in enumerate(versions) if t == 0 or version != versions[t - 1]]
    ends = [*starts[1:], len(versions)]
    return [VersionSpan(versions[start], start, end) for start, end in zip(starts, ends, strict=True)]


class SlowTorchEngine(TorchEngine):
    """The torch engine; a step takes a virtual second."""

    last_duration_s = 0.0

    def apply(self) -> dict[str, float]:
        """Take the optimizer step."""
        self.last_duration_s = STEP_S
        return super().apply()

    def accumulate(self, groups: Any, objective: Select) -> dict[str, float]:
        """Run forward and backward."""
        self.last_duration_s = 0.0
        return super().accumulate(groups, objective)

    def score(self, groups: Any) -> list[list[FloatArray]]:
        """Run forward."""
        self.last_duration_s = 0.0
        return super().score(groups)

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the weights."""
        self.last_duration_s = 0.0
        return super().publish(version, canary)


class CountingReward(Stage):
    """Scores counting, and notes how the version that sampled a group did: an on-policy score of every version."""

    class Config(StageConfig):
        """Nothing to set."""

    seen: ClassVar[dict[int, list[float]]] = {}  # of the run under way: version -> rewards
    rollouts: In[Rollouts]
    referenced: Out[Referenced]

    def __init__(self, config: Config) -> None:
        self.config = config

    async def run(self, context: Context) -> None:
        """Score until the edge closes."""
        async for group in self.rollouts:
            wanted = right_digits(group.columns["digit"])
            rewards = [
                sum(a == b for a, b in zip(sample.token_ids.tolist(), wanted, strict=True)) / RESPONSE
                for sample in group.samples
            ]
            self.seen.setdefault(group.oldest_version, []).extend(rewards)
            no_reference = [sample.logprobs for sample in group.samples]
            await self.referenced.put(
                extend(Referenced, group, scores={"counting": rewards}, ref_logprobs=no_reference)
            )


def counting_graph(setting: Setting, model: Path) -> Graph:
    """Return the flow of one run: group_async's, with a reward that needs no reference.

    It goes on until `steps` versions have sampled, so that every bound is judged by the same versions.
    """
    steps = setting.steps + setting.staleness
    size, per_step = setting.group_size, setting.groups_per_step
    credits = most_credits(setting.staleness, per_step, window=1)
    is_path = ":" in setting.method
    algorithm = Select(use=setting.method if is_path else "flowrl.algorithms.grpo:GRPO")
    algorithm = algorithm.changed({"kl.coef": 0.0, "entropy_coef": setting.entropy})
    if not is_path:
        algorithm = algorithm.changed({"correction.kind": setting.method})
    sampler = Sampler(model=str(model), sampling=Sampling(max_tokens=RESPONSE), group_size=size, seed=setting.seed)
    learning = Learning(algorithm=algorithm, steps=steps, groups_per_step=per_step, max_staleness=setting.staleness)
    prompts = DigitPrompts(Prompts.Config(), sampler)
    generator = Generator(
        Generator.Config(engine=f"{__name__}:TorchSampler", max_groups=credits, max_model_len=32, dtype="float32"),
        sampler,
    )
    reward = CountingReward(CountingReward.Config())
    advantage = Advantage(Advantage.Config(), sampler, learning)
    learner = Learner(
        Learner.Config(
            engine=f"{__name__}:SlowTorchEngine", dtype="float32", lr=setting.lr, minibatches=setting.minibatches,
            schedule=Schedule(kind=setting.schedule, warmup_steps=1), save_rollouts=False, save_every=0, min_ess=0.0,
        ),
        sampler, learning,
    )  # fmt: skip
    return Graph(
        nodes={"prompts": prompts, "generator": generator, "reward": reward, "advantage": advantage,
               "learner": learner},
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=credits),
            Queue(generator.rollouts, reward.rollouts, depth=credits),
            Queue(reward.referenced, advantage.referenced),
            Queue(advantage.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
        ],
        until=learner,
    )  # fmt: skip
