"""What serves the calls, put together for one model."""

from __future__ import annotations

from dataclasses import dataclass

from foundry.lm import FrozenLM, ModelSpec
from foundry.template import ChatTemplate
from services.rollout.admission import Admissions
from services.rollout.driver import Driver
from services.rollout.engine.torch_engine import TorchEngine
from services.rollout.residency import CartridgeSource, Residency
from services.rollout.settings import RolloutSettings
from services.rollout.vllm_metrics import VllmMetrics

_HOST_BUDGET_BYTES = 8 * 1024**3


@dataclass(frozen=True, slots=True)
class Parts:
    """Use `driver.start()` before the first call; close residency, then driver."""

    spec: ModelSpec
    model_name: str
    template_digest: str
    admissions: Admissions
    residency: Residency
    driver: Driver

    @classmethod
    def build(cls, settings: RolloutSettings, lm: FrozenLM, source: CartridgeSource) -> Parts:
        """Raises TemplateUnsupported."""
        template = ChatTemplate(lm.tokenizer)
        model_name = settings.model_name or settings.model.resolve().name
        # Running and waiting ones; a call that needs more could never be admitted.
        max_sequences = settings.max_sequences + settings.max_waiting
        admissions = Admissions(
            lm, template, max_sequence_tokens=settings.max_sequence_tokens, max_sequences=max_sequences
        )
        engine = TorchEngine(
            lm,
            max_sequences=settings.max_sequences,
            max_sequence_tokens=admissions.max_sequence_tokens,
            prefill_tokens_per_step=settings.prefill_tokens_per_step,
        )
        return cls(
            spec=lm.spec,
            model_name=model_name,
            template_digest=template.digest,
            admissions=admissions,
            residency=Residency(
                lm.spec,
                source,
                engine,
                budget_bytes=settings.cartridge_budget_bytes,
                host_budget_bytes=_host_budget_bytes(settings, lm),
                element_bytes=lm.dtype.itemsize,
            ),
            driver=Driver(engine, VllmMetrics(model_name), max_sequences=max_sequences),
        )


def _host_budget_bytes(settings: RolloutSettings, lm: FrozenLM) -> int:
    if settings.host_cartridge_budget_bytes is not None:
        return settings.host_cartridge_budget_bytes
    return 0 if lm.device.type == "cpu" else _HOST_BUDGET_BYTES
