"""What the Qwen ears that hear in chunks share: Hugging Face runs them over one packed sequence.

A row of our encoder is what attends to itself, a chunk or a window of several; Hugging Face puts
the rows of all clips one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs
from families.audio_llms import mel_batch
from families.base import (
    EVERYTHING,
    Family,
    clips_of,
    decoder_attended,
    decoder_of,
    draw_clips,
    draw_decoder,
    entering_blocks,
    length_mask,
    run_hf,
    whisper_biases,
)

NO_FLOAT64 = ("left padding", "short clips", "one-token clip")
"""Left padding gives NaN; the encoder's softmax is in float32, where a row with fewer keys than a
vector register holds is summed in another order than one that is padded with keys of no weight."""


@dataclass(frozen=True)
class ChunkedEar:
    """Such an ear, as the tests see it.

    Attributes:
        modeling: the module of Hugging Face that holds it.
        frames_of: positions of its blocks for so many mel frames of a clip.
        tokens_of: audio tokens.
        mask_key: name of the features' mask in a batch.
        multiple_of: mel frames; features are padded to a multiple beyond the longest clip.
    """

    modeling: ModuleType
    frames_of: Callable[[int], int]
    tokens_of: Callable[[int], int]
    mask_key: str = "feature_attention_mask"
    multiple_of: int = 7

    def batch(self, lengths: Sequence[int | Sequence[int]], **options: Any) -> dict[str, Tensor]:
        """Prompts about clips of so many mel frames; with options of `mel_batch`."""
        longest = max(map(max, clips_of(lengths)))
        width = -(-longest // self.multiple_of) * self.multiple_of
        return mel_batch(self.tokens_of, width, lengths, mask_key=self.mask_key, **options)

    def compared(self, name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
        """What is compared: positions that hold audio, or attended tokens."""
        if not name.startswith(("encoder", "connector")):
            return decoder_attended(name, tensor, inputs)
        by_position = tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor
        count = self._counted(name)
        counts = [count(inputs.n_valid(segment)) for segment in range(len(inputs.features))]
        return by_position[length_mask(counts, by_position.shape[1]).bool()]

    def reference(
        self, hf: nn.Module, batch: dict[str, Tensor], row: int, leaving: dict[str, nn.Module]
    ) -> dict[str, Tensor]:
        """Under our names, the encoder's packed sequence as rows of so many mel frames."""
        tower = hf.model.audio_tower
        with eager_patterns(self.modeling, tower) as kept:
            out, found = run_hf(
                hf,
                batch,
                entering=entering_blocks("encoder", tower.layers),
                leaving={"encoder.hook_out": tower.ln_post, **leaving},
                **EVERYTHING,
            )
        mels = segments(batch[self.mask_key].sum(1).tolist(), row)
        for name in [x for x in found if x.startswith(("encoder", "connector"))]:
            count = self._counted(name)
            found[name] = in_rows(found[name], [count(n) for n in mels], count(row))
        return {**found, **padded_patterns(kept, self.frames_of(row)), **decoder_of(out)}

    def _counted(self, name: str) -> Callable[[int], int]:
        """Positions of an activation by mel frames."""
        return self.frames_of if "blocks" in name else self.tokens_of

    def family(self, name: str, models: dict[str, dict], row: int, **options: Any) -> Family:
        """An entry for a model with this ear, of rows of so many mel frames."""
        usual = {
            "tiny": {},
            "128 mels": {"num_mel_bins": 128},
            "no GQA": {"num_key_value_heads": 6},
            "wide heads": {"head_dim": 16},
            "tied": {"tie_word_embeddings": True},
        }
        return Family(
            name=name,
            models={**usual, **models},
            model_batches={"128 mels": {"n_mels": 128}},
            bfloat16=["right padding", "left padding"],
            float16_biases=whisper_biases,
            mask_of=self.compared,
            durations=[(0.75,), (2.0,), (4.3,), (0.6, 2.01, 5.2)],
            segment_s=row / 100,
            **options,
        )


# -------------------------------------------------------------------------------- shapes


def draw(
    data: st.DataObject, segment: int, last: st.SearchStrategy, **more: st.SearchStrategy
) -> tuple[dict, dict]:
    """Any shape of model, with any number of clips of any length.

    Args:
        segment: mel frames of a row of the encoder.
        last: those of the last row of a clip.
        more: what else to draw of the model.
    """
    model = {
        "d_model": data.draw(st.sampled_from((8, 24)), "d_model"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        **draw_decoder(data),
        "head_dim": data.draw(st.sampled_from((6, 10)), "head_dim"),
        **{name: data.draw(values, name) for name, values in more.items()},
    }
    clip = st.builds(lambda full, rest: full * segment + rest, st.integers(0, 2), last)
    return model, draw_clips(data, clip)


# -------------------------------------------------------------------------------- rows


def segments(lengths: Sequence[int], width: int) -> list[int]:
    """Mel frames of every segment of every clip."""
    return [min(width, n - start) for n in lengths for start in range(0, n, width)]


def in_rows(packed: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """What Hugging Face packs in one sequence, as a row per segment, padded with zeros."""
    rows = packed.new_zeros(len(counts), width, *packed.shape[1:])
    for row, piece in zip(rows, packed.split(list(counts)), strict=True):
        row[: len(piece)] = piece
    return rows


@contextmanager
def eager_patterns(modeling: ModuleType, tower: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """While inside, the patterns of the encoder's eager attention: by layer, one per segment.

    The ``attentions`` that Hugging Face returns for these encoders are outputs, not patterns.
    """
    kept: dict[int, list[Tensor]] = {}
    layers = {layer.self_attn: index for index, layer in enumerate(tower.layers)}
    attend = modeling.eager_attention_forward

    def attend_and_keep(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, pattern = attend(module, *args, **kwargs)
        if module in layers:
            kept.setdefault(layers[module], []).append(pattern[0])
        return out, pattern

    with mock.patch.object(modeling, "eager_attention_forward", attend_and_keep):
        yield kept


def padded_patterns(kept: dict[int, list[Tensor]], width: int) -> dict[str, Tensor]:
    """Patterns of every layer, ``segments h q k``, under our names."""
    named = {}
    for layer, pieces in kept.items():
        whole = pieces[0].new_zeros(len(pieces), len(pieces[0]), width, width)
        for row, piece in zip(whole, pieces, strict=True):
            row[:, : piece.shape[1], : piece.shape[2]] = piece
        named[f"encoder.blocks.{layer}.attn.hook_pattern"] = whole
    return named
