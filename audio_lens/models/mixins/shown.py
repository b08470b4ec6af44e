"""What a prompt or a notebook shows of a model: names for users, and where to find others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from audio_lens.models.mixins.host import Host

FOR_USERS = (
    *("from_pretrained", "from_hf", "from_config", "prepare", "generate", "continued", "forward"),
    *("run_with_cache", "run_with_hooks", "hooks", "add_hook", "add_perma_hook", "reset_hooks"),
    *("hook_dict", "list_hooks", "loss", "encode", "decode", "features", "with_waveform"),
    *("cfg", "part", "timeline", "tokenizer", "processor", "attn_mode", "takes_question"),
    *("to_single_token", "to_str_tokens", "stream", "mixes_lengths", "output_part"),
    *("place", "is_split", "device", "device_of", "dtype", "lora", "lora_disabled"),
    *("to", "cpu", "cuda", "eval", "train", "training", "requires_grad_", "zero_grad"),
    *("parameters", "named_parameters", "state_dict", "modules", "named_modules"),
)
OF_PARTS = (
    *("blocks", "ln_final", "unembed", "W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "QK", "OV"),
    *("W_in", "W_out", "accumulated_bias", "tokens_to_residual_directions"),
)


class Shown(Host):
    """What `dir` lists of a model, and errors that say on which part something is."""

    def __dir__(self) -> Iterable[str]:
        """Names for users, and parts: what else there is works, and is not offered at TAB."""
        there = set(super().__dir__())
        parts = (part for part in (*self.cfg.parts, "connector") if part in there)
        return sorted({*(name for name in FOR_USERS if name in there), *parts})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            cfg = vars(self).get("cfg")
            if cfg is None or name not in OF_PARTS:
                raise
            parts = " or ".join(f'model.part("{part}").{name}' for part in cfg.parts)
            raise AttributeError(f"{error}: it is of a part, {parts}") from None
