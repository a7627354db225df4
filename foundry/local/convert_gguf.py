"""One-off conversion of a GGUF model to safetensors in fp32: `python -m foundry.local.convert_gguf FILE DIRECTORY`.

A process of its own, because it takes torch, two copies of the weights and progress bars that belong on no terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_SENTENCE = "The key to the tower hangs on a whale tooth beside the door."
_NOT_THE_MODELS = ("quantization_config", "_name_or_path", "transformers_version", "model_type")


def convert(gguf: Path, directory: Path) -> None:
    """Write model and tokenizer into `directory`. Raises ValueError if the saved model predicts anything else."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from GGUF refuses save_pretrained; the same weights under a plain configuration do not.
    values = {key: value for key, value in quantized.config.to_dict().items() if key not in _NOT_THE_MODELS}
    config = AutoConfig.for_model(quantized.config.model_type, **values)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(quantized.state_dict(), strict=True)
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(directory)(_SENTENCE).input_ids])
    difference = (_logits(quantized, ids) - _logits(saved, ids)).abs().max().item()
    # NaN compares false, so this form refuses it too.
    if not difference <= 1e-4:
        raise ValueError(f"logits of the converted model differ from those of {gguf.name} by {difference}")


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids).logits
    return logits


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
