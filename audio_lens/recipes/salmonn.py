"""SALMONN (Tang et al. 2024, arXiv 2310.13289): Whisper and BEATs side by side, a Q-Former, Vicuna.

Both ears give 50 positions per second, Whisper's along time and BEATs's patches in their order
(eight frequencies, then the next 0.16 s). Position by position they stand side by side, and one
query reads every 17 of them: a token per 0.34 s, 88 of 30 s, silence behind a clip included. The
last four positions are not read. A single query attends to nothing but itself: its self-attention
has patterns of 1, and no queries and keys, which could change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.compose.assemble import Placeholder, compose
from audio_lens.models.compose.model import HookedComposed
from audio_lens.models.config import LoadingError
from audio_lens.models.families.beats import HookedBeats
from audio_lens.models.layers import LayerNorm
from audio_lens.models.loading.adapters import Adapter
from audio_lens.models.loading.lora import LowRank, attach
from audio_lens.models.loading.stored import reads_checkpoint
from audio_lens.models.loading.weights import fill, read_weights, renamed
from audio_lens.models.mixins.features import filled
from audio_lens.models.parts.connectors import Connector
from audio_lens.models.parts.qformer import QFormer, QFormerConfig, qformer_weight_names

TEMPLATE = "USER: <Speech>{audio}</Speech> {question}\nASSISTANT:"
PLACEHOLDER = "<SpeechHere>"
WINDOW = 17  # positions that become one token: a third of a second, rounded
N_HEADS = 12  # of the Q-Former, which has the shape of BERT-base
LEAST_S = 1.0  # BEATs hears shorter clips with silence behind them
ADAPTED = ("q_proj", "v_proj")  # linear maps of Vicuna's blocks with an adapter

_ASKING = (".attn.q_proj.", ".attn.k_proj.")  # of one query, that sees itself alone: say nothing

_BERT, _LLAMA = "speech_Qformer.bert", "llama_model.base_model.model.model"
_QFORMER = {
    theirs.replace("attention.attention", "attention.self"): ours
    for theirs, ours in qformer_weight_names(f"{_BERT}.encoder", "connector").items()
}
_OF_TEXT = (  # what queries do not use of BERT, and tables that are not learned
    f"{_BERT}.embeddings.word_embeddings",
    f"{_BERT}.embeddings.position_embeddings",
    f"{_BERT}.embeddings.position_ids",
    f"{_BERT}.encoder.layer.{{l}}.intermediate.dense",
    f"{_BERT}.encoder.layer.{{l}}.output.dense",
    f"{_BERT}.encoder.layer.{{l}}.output.LayerNorm",
    "speech_Qformer.cls.predictions.bias",
    "speech_Qformer.cls.predictions.decoder",
    "speech_Qformer.cls.predictions.transform.dense",
    "speech_Qformer.cls.predictions.transform.LayerNorm",
    f"{_LLAMA}.layers.{{l}}.self_attn.rotary_emb.inv_freq",
)
WEIGHT_NAMES = {
    "ln_speech": "connector.ln_speech",
    "ln_audio": "connector.ln_audio",
    "speech_query_tokens": "connector.query",
    f"{_BERT}.embeddings.LayerNorm": "connector.ln_embed",
    **_QFORMER,
    "speech_llama_proj": "connector.linear",
    **{
        f"{_LLAMA}.layers.{{l}}.self_attn.{linear}.lora_{half}.default": (
            f"decoder.blocks.{{l}}.attn.{linear}.lora_{half}"
        )
        for linear in ADAPTED
        for half in "AB"
    },
    **dict.fromkeys(_OF_TEXT),
}
"""Names in the published ``.pth`` to ours; None is known and left out."""


class SalmonnConnector(Connector, QFormer):
    """Both ears normed and side by side, a Q-Former over windows of them, a linear map.

    ``hook_heard`` (``segments positions d``) is what the windows are cut from: Whisper's features,
    then BEATs's, which are zero where BEATs has no more patches.
    """

    def __init__(self, cfg: QFormerConfig, d_speech: int, d_out: int):
        super().__init__(cfg)
        self.ln_speech = LayerNorm(d_speech, 1e-5)
        self.ln_audio = LayerNorm(cfg.d_memory - d_speech, 1e-5)
        self.hook_heard = HookPoint()
        self.linear = nn.Linear(cfg.d_model, d_out)

    def carry(
        self, speech: Float[Tensor, "b s d1"], audio: Float[Tensor, "b patches d2"]
    ) -> Float[Tensor, "b t d_out"]:
        length = speech.shape[1] // self.cfg.n_window * self.cfg.n_window
        both = self.ln_speech(speech), self.ln_audio(audio)
        fitted = [F.pad(x, (0, 0, 0, length - x.shape[1])) for x in both]
        return self.linear(self.listen(self.hook_heard(torch.cat(fitted, dim=-1))))

    def token_count(self, n_frames: int) -> int:
        return n_frames // self.cfg.n_window * self.cfg.n_queries

    def token_seconds(self, frames: Float[Tensor, " frames"]) -> Float[Tensor, " tokens"]:
        """The middles of windows; several queries of one have the same."""
        windows = frames.unfold(0, self.cfg.n_window, self.cfg.n_window)
        return windows.mean(-1).repeat_interleave(self.cfg.n_queries)


def salmonn_connector(tensors: Mapping[str, Tensor]) -> SalmonnConnector:
    """A connector of these weights, whose shapes say how large it is.

    Args:
        tensors: by the names they have in the connector.

    Raises:
        LoadingError: weights that are missing or unknown.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sized = ("ln_speech.bias", "ln_audio.bias", "query", "blocks.0.mlp.fc_in.bias", "linear.bias")
    lacking = [name for name in sized if name not in shapes]
    if lacking:
        raise LoadingError(f"these are no weights of SALMONN: no {', '.join(lacking)}")
    (d_speech,), (d_audio,), (_, n_queries, d_model), (d_mlp,), (d_out,) = (
        shapes[name] for name in sized
    )
    cfg = QFormerConfig(
        n_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        n_heads=N_HEADS,
        n_key_value_heads=N_HEADS,
        d_model=d_model,
        d_head=d_model // N_HEADS,
        d_mlp=d_mlp,
        n_ctx=None,
        act_fn="gelu",
        eps=1e-12,
        normalization_type="LN",
        attn_biases=("q", "k", "v", "o"),
        final_norm=False,
        n_queries=n_queries,
        n_window=WINDOW,
        d_memory=d_speech + d_audio,
    )
    with torch.device("meta"):
        connector = SalmonnConnector(cfg, d_speech, d_out)
    idle = _ASKING if n_queries == 1 else ()
    fill(connector, {name: x for name, x in tensors.items() if not any(i in name for i in idle)})
    return connector


class HookedSalmonn(HookedComposed):
    """SALMONN with every activation hooked; `beats` is a part beside `encoder`.

    Where in its 0.34 s a token listens `analysis.time_profile` says. In a batch of unequal
    clips the query also reads what BEATs makes of a shorter clip's padding, as published: alone,
    that clip may be answered otherwise.
    """

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        whisper: Any,
        beats: HookedBeats,
        llm: Any,
        *,
        merge: bool = False,
        lora_alpha: float | int = 32,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
    ) -> HookedSalmonn:
        """The model of the tensors that were published; else as `salmonn`."""
        tensors = renamed(state, WEIGHT_NAMES)
        own = {
            name.removeprefix("connector."): tensor.to(dtype=dtype)
            for name, tensor in tensors.items()
            if name.startswith("connector.")
        }
        model = compose(
            {"encoder": whisper, "beats": beats.to(dtype=dtype)},
            salmonn_connector(own),
            llm,
            Placeholder(PLACEHOLDER),
            tokenizer=tokenizer,
            template=TEMPLATE,
            keeps_padding=True,
            name="salmonn",
            dtype=dtype,
            family=cls,
        )
        adapter = _adapter(tensors, model.cfg.need_decoder.n_layers, lora_alpha)
        adapter.check_fits(model.state_dict())
        (_merge if merge else _make_live)(model, adapter)
        return model

    def heard_beside(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Features for BEATs, of clips with silence behind them up to a second."""
        least = round(LEAST_S * self.cfg.sampling_rate)
        return super().heard_beside([filled(clip, least) for clip in clips])


def _adapter(tensors: Mapping[str, Tensor], n_layers: int, alpha: float | int) -> Adapter:
    """The adapter of the language model, by names of its linear maps.

    Raises:
        LoadingError: naming what is missing, or belongs to a larger model.
    """
    linears = [f"decoder.blocks.{l}.attn.{linear}" for l in range(n_layers) for linear in ADAPTED]
    wanted = {f"{linear}.lora_{half}.weight" for linear in linears for half in "AB"}
    found = {name for name in tensors if ".lora_" in name}
    if wanted != found:
        raise LoadingError(
            f"the adapter is not for a language model of {n_layers} blocks: missing "
            f"{', '.join(sorted(wanted - found)[:4]) or 'none'}; too many "
            f"{', '.join(sorted(found - wanted)[:4]) or 'none'}"
        )
    halves = {
        linear: (tensors[f"{linear}.lora_A.weight"], tensors[f"{linear}.lora_B.weight"])
        for linear in linears
    }
    return Adapter({name: LowRank(a, b, alpha / len(a)) for name, (a, b) in halves.items()})


def _make_live(model: HookedSalmonn, adapter: Adapter) -> None:
    low_rank = {}
    for name, one in adapter.low_rank.items():
        weight = model.get_parameter(f"{name}.weight")
        low_rank[name] = one.to(weight.device, torch.promote_types(one.down.dtype, weight.dtype))
    attach(model, low_rank, {})


@torch.no_grad()
def _merge(model: HookedSalmonn, adapter: Adapter) -> None:
    for name, one in adapter.low_rank.items():
        merged = one.added_to(model.get_parameter(f"{name}.weight"))
        model.get_submodule(name).weight = nn.Parameter(merged)


@reads_checkpoint
def salmonn(
    checkpoint: str | Path,
    beats: str | Path | HookedBeats,
    llm: Any,
    whisper: Any = "openai/whisper-large-v2",
    *,
    merge: bool = False,
    lora_alpha: float | int = 32,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> HookedSalmonn:
    """SALMONN-7B or -13B from the pieces it is published in.

    Args:
        checkpoint: the published ``.pth``: Q-Former, norms, projection and LoRA.
        beats: the published ``.pt`` of BEATs (iter3+, AS2M, fine-tuned on AS2M, cpt2).
        llm: Vicuna (7B v1.5, 13B v1.1), as `HookedAudioTransformer.compose` takes a decoder.
        whisper: whose encoder is taken, as `HookedAudioTransformer.compose` takes one.
        merge: add the adapter to the weights; otherwise it stays live (``model.lora``).
        lora_alpha: over the adapter's rank, what it is multiplied by; 32 as trained.
        tokenizer: None takes that of an ``llm`` named by id or directory.
        dtype: of all parts. What the published parts have differs, so name one; None keeps that of
            models given as such.

    Raises:
        LoadingError: files that are not there, or weights that do not fit.
        CompositionError: parts that do not fit together.
    """
    state = read_weights(checkpoint, "model")
    if not isinstance(beats, HookedBeats):
        beats = HookedBeats.from_checkpoint(beats)
    return HookedSalmonn.of(
        state,
        whisper,
        beats,
        llm,
        merge=merge,
        lora_alpha=lora_alpha,
        tokenizer=tokenizer,
        dtype=dtype,
    )
