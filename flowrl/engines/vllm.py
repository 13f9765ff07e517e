"""VllmEngine: samples with vLLM and swaps its weights while requests are in flight.

Invariants:
- every token carries the version that sampled it and its log-prob under the distribution sampled from;
- a sample is drawn with its own seed, so it is the same alone or in a batch;
- a sample with a token of a version still being proved is returned only when the canary has agreed;
- after a failed proof nothing is served any more.

Keys and values of earlier weights serve nobody who comes after them, nor, unless `keep_cache` says so, those in flight.
A version is received and verified before generation pauses, so that the pause covers loading only: by vLLM's workers,
or, where versions bring an adapter alone, here.

Called by the generator, evaluator and reference stages; lives on their event loop.

Tests: tests/contracts/test_vllm_engine.py
"""

from __future__ import annotations

import asyncio
import shutil
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flowrl.ending import sample_text
from flowrl.engines import vllm_adapters, vllm_settings
from flowrl.engines.agreement import SAME_WEIGHTS
from flowrl.engines.aside import give_back_to_system
from flowrl.engines.base import GenerationConfig, Sampling, UpdateReport
from flowrl.engines.canary import NO_CANARY, Gap, compare, gap_of
from flowrl.engines.weights import Receiver
from flowrl.engines.weights.manifest import BroadcastManifest, decode_manifest
from flowrl.engines.weights.nearest import is_near
from flowrl.errors import FlowrlError, ModelError, ProofError, StageError, TransferError
from flowrl.messages import Buffer, Canary, Routes, Sample, VersionSpan, Weights
from flowrl.scratch import ScratchDirectory
from flowrl.telemetry.events import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from vllm.outputs import CompletionOutput, RequestOutput

    from flowrl.engines.base import Lora


QUANTISED = 4  # times the bound of the dtype may a quantised engine's first canary be off
TRIES = 8  # of one request that vLLM refuses again and again
APART = 1_000_003  # a prime: seeds of a sample's continuations are far from those of other samples
SEEDS = 1 << 62


class VllmEngine:
    """A generation engine on vLLM's AsyncLLM; see engines.base.GenerationEngine.

    `receiver_index` tells the replicas apart in a broadcast; further options are arguments of vLLM's engine, and win.
    """

    check_options = staticmethod(vllm_settings.check_options)

    def __init__(self, config: GenerationConfig, *, where: str, receiver_index: int = 0, **options: Any) -> None:
        vllm_settings.check(config, where)
        vllm_settings.check_options(options, f"{where}.engine_options")
        self.config = config
        self._options = options
        self.where = where
        self.version: int | None = None  # proved and served
        self._salt = ""  # of prefixes in the cache: the version that is loaded, or will be when the pause ends
        self._receiver_index = receiver_index
        self.slots = Slots(config.max_running, time.monotonic)
        self._num_running = 0
        self._is_paused = False
        self._ids = count()
        self._broken: FlowrlError | None = None
        self._loaded_gap: Gap | None = None  # the canary of version 0 with the weights that `open` loaded
        self._first_gap: Gap | None = None  # of the first version proved
        self._unproved: int | None = None
        self._proved = asyncio.Event()
        self._receiver = Receiver(where, replica=receiver_index, timeout_s=config.transfer_timeout_s)  # of adapters
        self._adapter: Path | None = None  # that is served
        self._note = ""  # of how the last version came
        self._served: Weights | None = None
        self._admitting = asyncio.Event()  # cleared while a pause ends requests: vLLM refuses new ones meanwhile
        self._admitting.set()
        self._engine: Any = None
        self._core: Any = None
        self._replies: asyncio.Server | None = None
        self._outcomes: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1 + config.num_workers)

    @staticmethod
    def unserved(lora: Lora, model: Path) -> str:
        """Return why an adapter cannot be served beside a model; "": it can."""
        return vllm_adapters.unserved(lora, model)

    @property
    def is_untried(self) -> bool:
        """Return whether it has options that vLLM has not seen, and this machine the kind of device that it is for."""
        if not self._options:
            return False
        import torch

        return (self.config.gpus > 0 or bool(self.config.share)) == torch.cuda.is_available()

    def try_options(self) -> None:
        """Hold the options against vLLM, which is imported for it and may change the process's environment.

        Raises:
            UserError: vLLM would not start with them.
        """
        vllm_settings.set_environment(self.config)
        vllm_settings.try_options(self.config, self._options, self.where)

    @property
    def num_running(self) -> int:
        """Return how many samples are being decoded."""
        return self._num_running

    # Starting and stopping.

    async def open(self) -> None:
        """Load the model; nothing is served before the first update.

        Raises:
            ModelError: vLLM cannot load it with these settings.
        """
        self._scratch = ScratchDirectory("vllm")
        self._replies = await asyncio.start_unix_server(self._hear, self._socket_path)
        try:
            await asyncio.to_thread(self._load)
            if self._core is not None:
                self._engine = self._core.connect()
            tokenizer = self._engine.get_tokenizer()
            await self._init_transfer()
            await self._try_request()
        except Exception as error:
            what = f"vLLM could not serve {self.config.model} ({self._cause(error)})"
            await self.close()
            raise ModelError(
                self.where,
                what,
                f"check the model's architecture, kv_cache_bytes and max_model_len{vllm_settings.hint(self.config)}",
            ) from error
        self._tokenizer = tokenizer
        self._stop_ids = vllm_settings.stop_token_ids(self.config.model, tokenizer)

    def _load(self) -> None:
        vllm_settings.set_environment(self.config)
        arguments = vllm_settings.engine_arguments(self.config, self._options)
        if self.config.layout == "thread":
            from flowrl.engines.vllm_thread import ThreadedCore

            self._core = ThreadedCore(arguments, self._scratch.path)
            self._core.start()
        else:
            from vllm.v1.engine.async_llm import AsyncLLM

            self._engine = AsyncLLM.from_engine_args(arguments)

    async def _init_transfer(self) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(
            {
                "where": self.where,
                "replica": self._receiver_index,
                "timeout_s": self.config.transfer_timeout_s,
                "replies": str(self._socket_path),
            }
        )
        await self._engine.init_weight_transfer_engine(request)

    async def _try_request(self) -> None:
        """Have the model run once: vLLM loads what it then has no kernels for."""
        parameters = vllm_settings.sampling_parameters(Sampling(max_tokens=2), seed=0, stop_ids=[])
        prompt = {"prompt_token_ids": [0, 1, 2][: self.config.max_model_len - 1], "cache_salt": "trial"}
        async for _ in self._engine.generate(prompt, parameters, "trial"):
            pass

    def _cause(self, error: Exception) -> str:
        """Return what ended the engine's core, if something did, in place of an error that only says that it ended."""
        cause = getattr(self._core, "failure", None) or error
        return f"{type(cause).__name__}: {cause}"

    @property
    def _socket_path(self) -> Path:
        return self._scratch.path / "replies"

    async def sleep(self) -> None:
        """Free its devices' memory, by vLLM's own sleep; its build for CPUs has none, so there it is ended."""
        if vllm_settings.can_sleep():
            await self._engine.sleep(level=1)
        else:
            await self.close()
            give_back_to_system()

    async def wake(self) -> None:
        """Serve the same version as before; where it is loaded anew its digests and canary are proved again.

        Raises:
            ProofError: a digest or the canary disagrees.
            ModelError: vLLM did not start again.
        """
        if vllm_settings.can_sleep():
            await self._engine.wake_up()
            return
        await self.open()
        if self._served is not None:
            await self.update_weights(self._served)
        elif self.version is not None:
            await self.serve_loaded()

    async def close(self) -> None:
        """Stop the engine's processes and threads and remove its sockets; safe to call twice."""
        if self._core is not None:
            core, self._core = self._core, None
            await core.stop(self._engine)
        if self._engine is not None:
            engine, self._engine = self._engine, None
            from flowrl.engines.vllm_thread import close_client

            close_client(engine)
        self._receiver.close()
        if self._replies is not None:
            self._replies.close()
            self._replies = None
            self._scratch.close()

    # Sampling.

    async def generate(
        self, *, request_id: str, prompt_ids: Sequence[int], num_samples: int, seed: int, sampling: Sampling,
        num_spare: int = 0,
    ) -> list[Sample]:  # fmt: skip
        """Sample `num_samples` responses, sample i with seed + i; cancelling it aborts the requests.

        With `num_spare` so many more are begun, and those that come first are returned, in the order of their seeds.

        Raises:
            StageError: no version has been loaded, the prompt leaves no room for a response, or vLLM failed.
            ProofError: the version that was to be served could not be proved.
        """
        self._check_serving()
        if len(prompt_ids) >= self.config.max_model_len:
            raise StageError(
                self.where,
                f"request {request_id}: a prompt of {len(prompt_ids)} tokens leaves no room for a response in "
                f"max_model_len={self.config.max_model_len}",
                "raise max_model_len or filter long prompts",
            )
        try:
            async with asyncio.TaskGroup() as tasks:
                drawing = [
                    tasks.create_task(self._sample(f"{request_id}/{i}", prompt_ids, seed + i, sampling))
                    for i in range(num_samples + num_spare)
                ]
                left = set(drawing)
                while num_spare and len(drawing) - len(left) < num_samples:
                    _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in left if num_spare else ():
                    task.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [task.result() for task in drawing if not task.cancelled()][:num_samples]

    async def _sample(self, name: str, prompt_ids: Sequence[int], seed: int, sampling: Sampling) -> Sample:
        parameters = vllm_settings.sampling_parameters(sampling, seed=seed, stop_ids=self._stop_ids)
        num_refused = 0
        drawn: list[CompletionOutput] = []  # one after the other, each going on from those before it
        while True:
            await self._admitting.wait()
            self._check_serving()
            token_ids = [token for output in drawn for token in output.token_ids]
            if token_ids:
                # With the same seed vLLM would draw what it drew for the first tokens once more.
                parameters = vllm_settings.sampling_parameters(
                    sampling,
                    seed=(seed * APART + len(token_ids)) % SEEDS,
                    stop_ids=self._stop_ids,
                    num_drawn=len(token_ids),
                )
            prompt = {"prompt_token_ids": [*prompt_ids, *token_ids], "cache_salt": self._salt}
            output = await self._request(f"{name}-{next(self._ids)}", prompt, parameters)
            if output is not None and output.finish_reason != "abort":
                break
            num_refused += output is None
            if num_refused == TRIES:
                raise StageError(self.where, f"request {name} was refused {TRIES} times", "see the generator's log")
            # Only an update that does not keep requests ends or refuses ours: the new weights draw it, or its rest.
            if output is not None and output.token_ids and self.config.on_update == "resume":
                drawn.append(output)
        sample = self._read([*drawn, output], sampling, num_prompt=len(prompt_ids))
        while self._unproved is not None and any(span.version == self._unproved for span in sample.versions):
            await self._proved.wait()
        self._check_serving()
        return sample

    async def _request(self, request_id: str, prompt: Any, parameters: Any) -> CompletionOutput | None:
        """Return a finished request's output, or None where vLLM wants to be asked again."""
        from vllm.exceptions import RetryableRequestError, VLLMError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        last: RequestOutput | None = None
        self._decode(+1)
        try:
            async for output in self._engine.generate(prompt, parameters, request_id, lora_request=self._applied()):
                last = output
        except RetryableRequestError:  # since 0.33: it came while a pause ended those in flight
            return None
        except (VLLMError, EngineDeadError, EngineGenerateError, RuntimeError, ValueError) as error:
            self._check_serving()
            raise StageError(self.where, f"request {request_id} failed ({self._cause(error)})") from error
        finally:
            self._decode(-1)
        assert last is not None, "vLLM ends a request with an output"
        return last.outputs[0]

    def _decode(self, change: int) -> None:
        """Count a sample that is decoded, or no longer."""
        self._num_running += change
        self.slots.fill(0 if self._is_paused else self._num_running)

    def _read(self, outputs: Sequence[CompletionOutput], sampling: Sampling, *, num_prompt: int) -> Sample:
        """Return outputs, each of which goes on from those before it, as one sample."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        versions: list[VersionSpan] = []
        routes: list[NDArray[Any]] = []
        for output in outputs:
            assert output.weight_versions is not None, "vLLM gives the versions of a finished request"
            flat: Any = output.logprobs
            # With logprobs=0 a position holds the sampled token first.
            logprobs += [flat.logprobs[start] for start in flat.start_indices]
            begin = len(token_ids)
            versions += [
                VersionSpan(int(span.version), begin + span.start, begin + span.end) for span in output.weight_versions
            ]
            token_ids += output.token_ids
            if self.config.routing == "replay":  # those of the pass that sampled the token behind
                assert output.routed_experts is not None, "vLLM was asked for the experts that it takes"
                routes.append(output.routed_experts[sum(map(len, routes)) : num_prompt + len(token_ids) - 1])
        finish = str(outputs[-1].finish_reason)
        stops = {*self._stop_ids, *sampling.stop_token_ids} if finish == "stop" else ()
        return Sample(
            token_ids=Buffer.ints(token_ids),
            logprobs=Buffer.floats(logprobs),
            versions=versions,
            finish=finish,
            routes=Routes.of(np.concatenate(routes)) if routes else None,
            text=sample_text(self._tokenizer, token_ids, stops, keeps_special=sampling.special_tokens == "keep"),
        )

    def _check_serving(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self.version is None:
            raise StageError(self.where, "no policy version has been loaded yet", "wait for the first update")

    # Weights.

    async def serve_loaded(self) -> None:
        """Serve what `open` loaded, as version 0."""
        await self._engine.update_weight_version("0")
        self.version = 0
        self._salt = "0"

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Receive and verify a version, load it while generation is paused, prove it, and serve it.

        Raises:
            ProofError: a digest or the canary disagrees; nothing is served from then on.
            TransferError: the bytes did not arrive, or were not loaded, before the deadline.
        """
        if self._broken is not None:
            raise self._broken
        try:
            return await self._update(weights)
        except FlowrlError as error:
            # Bytes that never came leave the model as it was; whatever fails after the pause leaves it unfit.
            if isinstance(error, ProofError) or self._unproved is not None:
                self._broken = error
            raise
        except asyncio.CancelledError:
            if self._unproved is not None:
                self._broken = StageError(self.where, f"the update to version {weights.version} was cancelled")
            raise
        finally:
            self._unproved = None
            self._proved.set()
            self._admitting.set()

    async def _update(self, weights: Weights) -> UpdateReport:
        if self.version is None and weights.version == 0 and weights.canary is not None:
            loaded = await self._answer(weights.canary, await self._send_canary(weights), "of what was loaded")
            self._loaded_gap = gap_of(weights.canary, loaded)
        in_pause = self._shares_nccl(weights)
        fetch_s = 0.0 if in_pause else await self._fetch(weights)
        self._unproved = weights.version
        self._proved.clear()
        pause_start_s = time.monotonic()
        keeps = self.config.on_update == "keep"
        if not keeps:
            self._admitting.clear()
        try:
            mode = "abort" if self.config.on_update == "resume" else self.config.on_update
            await self._engine.pause_generation(mode=mode, clear_cache=not self.config.keep_cache)
            self._salt = str(weights.version)
            self._is_paused = True
            self._decode(0)
            fetch_s += await self._fetch(weights) if in_pause else 0.0
            load_start_s = time.monotonic()
            await self._load_version(weights.version)
            load_s = time.monotonic() - load_start_s
            scored = await self._send_canary(weights) if keeps else None
            await self._engine.resume_generation()
            self._is_paused = False
            self._decode(0)
            if not keeps:  # vLLM takes nothing before; what is sampled beside the canary is held back until it agrees
                scored = await self._send_canary(weights)
        except Exception as error:
            if isinstance(error, FlowrlError):
                raise
            raise StageError(
                self.where, f"version {weights.version} could not be loaded ({self._cause(error)})"
            ) from error
        pause_s = time.monotonic() - pause_start_s
        self._admitting.set()
        gap = await self._prove(weights, scored)
        self.version, self._served = weights.version, weights
        return UpdateReport(
            version=weights.version,
            pause_s=pause_s,
            transfer_s=fetch_s + load_s,
            mean_gap=gap.mean,
            max_gap=gap.max,
            allowed_gap=gap.allowed,
            note=self._note,
        )

    def _shares_nccl(self, weights: Weights) -> bool:
        """Return whether receiving would run NCCL beside the collectives of split generation.

        Kernels of two communicators may start in a different order on each GPU and wait for one another for ever, so
        there the broadcast waits for the pause.
        """
        manifest = decode_manifest(weights.manifest)
        if self.config.num_workers == 1 or is_near(manifest):
            return False
        return isinstance(manifest, BroadcastManifest) and manifest.backend == "nccl"

    async def _fetch(self, weights: Weights) -> float:
        """Have every worker receive and verify the version; return how long the slowest took."""
        if self.config.adapter.rank:
            start_s = time.monotonic()
            await asyncio.to_thread(self._fetch_adapter, weights)
            return time.monotonic() - start_s
        from flowrl.engines.weights.receiver import Prefetched

        while not self._outcomes.empty():  # of an update that was cancelled or timed out
            self._outcomes.get_nowait()
        await self._engine.collective_rpc("flowrl_prefetch", args=(weights.manifest.decode(),))
        seconds, self._note = [0.0], ""
        try:
            # A receiver has deadlines of its own and says more; this one is for a worker that died.
            async with asyncio.timeout(3 * self.config.transfer_timeout_s):
                while len(seconds) <= self.config.num_workers:
                    outcome = msgspec.json.decode(await self._outcomes.get(), type=Prefetched)
                    if outcome.version != weights.version:
                        continue
                    if outcome.kind != "ok":
                        failure = ProofError if outcome.kind == "proof" else TransferError
                        raise failure(self.where, outcome.what, outcome.remedy)
                    seconds.append(outcome.seconds)
                    self._note = self._note or outcome.what
        except TimeoutError as error:
            raise TransferError(
                self.where,
                f"{len(seconds) - 1} of {self.config.num_workers} workers had version {weights.version} after "
                f"{3 * self.config.transfer_timeout_s:g} s",
                "see the worker's log",
            ) from error
        return max(seconds)

    def _fetch_adapter(self, weights: Weights) -> None:
        """Receive and verify a version's adapter, and write it where vLLM will read it."""
        tensors = dict(self._receiver.receive(weights))
        vllm_adapters.write_adapter(self._adapter_of(weights.version), self.config.adapter, tensors)

    def _adapter_of(self, version: int) -> Path:
        return self._scratch.path / f"adapter-{version}"

    def _applied(self) -> Any:
        """Return the adapter as a request names it, or None where there is none."""
        return vllm_adapters.request_for(self._adapter) if self._adapter else None

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a worker's report of a prefetch."""
        await self._outcomes.put(await reader.readline())
        writer.close()

    async def _load_version(self, version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            async with asyncio.timeout(self.config.transfer_timeout_s):
                if self.config.adapter.rank:
                    await self._load_adapter(version)
                    return
                await self._engine.start_weight_update()
                await self._engine.update_weights(WeightTransferUpdateRequest({"version": version}))
                await self._engine.finish_weight_update(str(version))
        except TimeoutError as error:
            raise TransferError(
                self.where,
                f"version {version} was not loaded within {self.config.transfer_timeout_s:g} s",
                "raise transfer_timeout_s",
            ) from error

    async def _load_adapter(self, version: int) -> None:
        """Have vLLM apply a version's adapter in place of the one before, also to what is being decoded."""
        before, self._adapter = self._adapter, self._adapter_of(version)
        remedy = "set learner.lora.publish=merged"
        try:
            await self._engine.add_lora(vllm_adapters.request_for(self._adapter, is_new=True))
        except Exception as error:
            what = f"vLLM does not take the adapter of version {version} ({type(error).__name__}: {error})"
            raise StageError(self.where, what, remedy) from error
        left_out = (await self._engine.collective_rpc("flowrl_left_out"))[0]
        if left_out:
            what = f"vLLM would leave out {len(left_out)} layers of the adapter, such as {left_out[0]}"
            raise StageError(self.where, what, remedy)
        await self._engine.update_weight_version(str(version))
        if before not in (None, self._adapter):
            shutil.rmtree(before, ignore_errors=True)

    async def _send_canary(self, weights: Weights) -> Any:
        """Queue the canary; before generation resumes, where it can be: then the first step has it."""
        if weights.canary is None:
            return None
        token_ids = weights.canary.token_ids.tolist()
        if len(token_ids) >= self.config.max_model_len:
            raise StageError(
                self.where,
                f"the canary has {len(token_ids)} tokens, max_model_len={self.config.max_model_len}",
                f"raise max_model_len above {len(token_ids)}",
            )
        return await self._engine.add_request(
            f"canary-{weights.version}-{next(self._ids)}",
            {"prompt_token_ids": token_ids, "cache_salt": f"canary-{weights.version}"},
            vllm_settings.canary_parameters(),
            lora_request=self._applied(),
            priority=vllm_settings.CANARY_PRIORITY,
        )

    async def _prove(self, weights: Weights, scored: Any) -> Gap:
        if weights.canary is None:
            return NO_CANARY
        logprobs = await self._answer(weights.canary, scored, f"of version {weights.version}")
        first = self._first_gap
        # The learner's dtype may be the finer.
        usual = bound = max(weights.canary.max_mean_gap, SAME_WEIGHTS.get(self._engine.model_config.dtype, 0.0))
        if first is None and vllm_settings.is_quantised(self._options):  # equal weights differ by what that rounds
            first, bound = self._loaded_gap, QUANTISED * bound
        try:
            canary = msgspec.structs.replace(weights.canary, max_mean_gap=bound)
            gap = compare(canary, logprobs, version=weights.version, where=self.where, first=first)
            self._first_gap = self._first_gap or gap
            return gap
        except ProofError as error:
            if self._loaded_gap is None or self._loaded_gap.mean <= usual:
                raise
            what = (
                f"vLLM computes {self.config.model} otherwise than transformers: with the weights as they lie there, "
                f"before any were sent, the canary differs by {self._loaded_gap.mean:.3g} nats on average "
                f"(max {self._loaded_gap.max:.3g}), {usual:.3g} are allowed"
            )
            remedy = "this build of vLLM does not serve such a model right; take another model, or vLLM for GPUs"
            raise ProofError(self.where, what, remedy) from error

    async def _answer(self, canary: Canary, scored: Any, which: str) -> list[float]:
        """Wait for the log-probs of a canary that was queued."""
        try:
            async with asyncio.timeout(self.config.transfer_timeout_s):
                output: RequestOutput = await scored.get()
        except TimeoutError as error:
            raise ProofError(self.where, f"the canary {which} had no answer within the deadline") from error
        except Exception as error:
            raise StageError(self.where, f"the canary failed ({self._cause(error)})") from error
        positions = list(output.prompt_logprobs or [])[1:]  # the first token has nothing before it
        pairs = zip(canary.token_ids.tolist()[1:], positions, strict=True)
        return [row[token].logprob for token, row in pairs if row is not None]
