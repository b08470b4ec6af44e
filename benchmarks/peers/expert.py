"""What an expert writes by hand in an afternoon: suffixes over Hugging Face's own modules.

Every cell starts at the patched block from the hidden states of the unpatched run. In the language
model only positions from the first patched one on are computed, with the earlier keys and values
of the unpatched run, and the last block answers for the last position alone; in Whisper's decoder
the cross-attention's keys and values are kept. Cells that start alike share a batch.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.peers.hooks_loop import cheapest_call
from benchmarks.peers.method import Method
from benchmarks.peers.tasks import AGAINST, ANSWER, Cell, Task


class Suffix(ABC):
    """Start at the patched block; subclasses run the rest.

    Batches are as large as was fastest: more gains nothing on a CPU.
    """

    cells_per_batch: ClassVar[dict[str, int]]

    def __init__(self, task: Task):
        self.task = task

    def prepare(self) -> None:
        task = self.task
        self.source = task.source()
        self.call = cheapest_call(task)
        blocks = {("block", layer): task.block_path(layer) for layer in task.layers}
        sites = {("site", layer): task.path(layer) for layer in task.layers}
        self.base = task.inputs_of(blocks | sites | self.extras(), self.call)

    def extras(self) -> dict[tuple[str, int], str]:
        """What else of the unpatched run is kept: names and layers to module paths."""
        return {}

    @staticmethod
    def start(cell: Cell) -> tuple[int, ...]:
        """What cells that share a batch agree in: the patched block."""
        return (cell.layer,)

    def values(self, cells: Sequence[Cell]) -> list[float]:
        """The metric of cells of one block."""
        hidden = self.last_hidden(cells[0].layer, cells)
        head = self.task.hf_model.get_output_embeddings().weight
        return (hidden @ (head[ANSWER] - head[AGAINST])).tolist()

    def patched(self, layer: int, cells: Sequence[Cell], first: int = 0) -> Tensor:
        """The patched site in every cell's run, from position ``first`` on, ``cells t d``."""
        base = self.base["site", layer][:, first:]
        x = base.repeat(len(cells), 1, 1)
        for n, cell in enumerate(cells):
            columns = self.task.columns(cell)
            x[n, cell.start - first : cell.stop - first, columns] = self.source[layer][
                0, cell.start : cell.stop, columns
            ]
        return x

    @abstractmethod
    def last_hidden(self, layer: int, cells: Sequence[Cell]) -> Tensor:
        """The normed hidden state at the last position, ``cells d``."""


class EncoderSuffix(Suffix):
    """Whisper's encoder from the patched block on, then its decoder."""

    cells_per_batch: ClassVar = {"cpu": 4, "cuda": 32}

    def last_hidden(self, layer: int, cells: Sequence[Cell]) -> Tensor:
        model = self.task.hf_model.model
        blocks, x = model.encoder.layers, self.patched(layer, cells)
        if self.task.row.patched:
            x = self.base["block", layer] + blocks[layer].self_attn.out_proj(x)
            x, layer = _feed_forward(blocks[layer], x), layer + 1
        for block in blocks[layer:]:
            x = block(x, None)
        heard = model.encoder.layer_norm(x)
        tokens = self.call["decoder_input_ids"].expand(len(cells), -1)
        decoded = model.decoder(input_ids=tokens, encoder_hidden_states=heard, use_cache=False)
        return decoded.last_hidden_state[:, -1]


class CrossSuffix(Suffix):
    """Whisper's decoder from behind the patched cross-attention, its keys and values kept."""

    cells_per_batch: ClassVar = {"cpu": 8, "cuda": 64}

    def extras(self) -> dict[tuple[str, int], str]:
        blocks = {layer: self.task.block_path(layer) for layer in self.task.layers}
        return {("after_self", k): f"{path}.encoder_attn_layer_norm" for k, path in blocks.items()}

    def prepare(self) -> None:
        super().prepare()
        self.blocks = self.task.hf_model.model.decoder.layers
        heard = self.call["encoder_outputs"].last_hidden_state
        attns = [block.encoder_attn for block in self.blocks]
        self.kept = [[_split(p(heard), a) for p in (a.k_proj, a.v_proj)] for a in attns]

    def last_hidden(self, layer: int, cells: Sequence[Cell]) -> Tensor:
        x = self.patched(layer, cells)
        x = self.base["after_self", layer] + self.blocks[layer].encoder_attn.out_proj(x)
        x = _feed_forward(self.blocks[layer], x)
        for later in range(layer + 1, len(self.blocks)):
            x = self._block(later, x)
        return self.task.hf_model.model.decoder.layer_norm(x[:, -1])

    def _block(self, layer: int, x: Tensor) -> Tensor:
        block, attn = self.blocks[layer], self.blocks[layer].self_attn
        read = block.self_attn_layer_norm(x)
        q, k, v = (_split(p(read), attn) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.out_proj(_merge(z))
        attn = block.encoder_attn
        q = _split(attn.q_proj(block.encoder_attn_layer_norm(x)), attn)
        n_tokens = q.shape[2]
        q = rearrange(q, "n h t e -> 1 h (n t) e")  # all cells read the same keys and values
        z = F.scaled_dot_product_attention(q, *self.kept[layer])
        z = rearrange(z, "1 h (n t) e -> n t (h e)", t=n_tokens)
        return _feed_forward(block, x + attn.out_proj(z))


class CausalSuffix(Suffix):
    """The language model from the patched block and the first patched position on."""

    cells_per_batch: ClassVar = {"cpu": 4, "cuda": 64}

    @staticmethod
    def start(cell: Cell) -> tuple[int, ...]:
        return cell.layer, cell.start

    def prepare(self) -> None:
        super().prepare()
        self.lm = self.task.hf_model.model.language_model
        embeds = self.call["inputs_embeds"]
        cache = self.lm(inputs_embeds=embeds, use_cache=True).past_key_values
        self.earlier = [(layer.keys, layer.values) for layer in cache.layers]
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        self.cos, self.sin = self.lm.rotary_emb(embeds, positions[None])
        self.allowed = (positions <= positions[:, None])[None, None]

    def last_hidden(self, layer: int, cells: Sequence[Cell]) -> Tensor:
        first = cells[0].start
        x = self.patched(layer, cells, first)
        if self.task.row.patched:
            block = self.lm.layers[layer]
            x = self.base["block", layer][:, first:] + block.self_attn.o_proj(x)
            x, layer = x + block.mlp(block.post_attention_layernorm(x)), layer + 1
        for later in range(layer, len(self.lm.layers)):
            x = self._block(later, x, first)
        return self.lm.norm(x[:, -1])

    def _block(self, layer: int, x: Tensor, first: int) -> Tensor:
        block, attn = self.lm.layers[layer], self.lm.layers[layer].self_attn
        read = block.input_layernorm(x)
        asking = slice(-1, None) if layer == len(self.lm.layers) - 1 else slice(None)
        x = x[:, asking]
        q = self._rotated(_split(attn.q_proj(read[:, asking]), attn), first)
        k = self._rotated(_split(attn.k_proj(read), attn), first)
        v = _split(attn.v_proj(read), attn)
        k, v = (
            torch.cat([kept[:, :, :first].expand(len(x), -1, -1, -1), new], dim=2)
            for kept, new in zip(self.earlier[layer], (k, v), strict=True)
        )
        mask = self.allowed[:, :, first:][:, :, asking]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + attn.o_proj(_merge(z))
        return x + block.mlp(block.post_attention_layernorm(x))

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        """Queries or keys ``n h t e`` of the last positions from ``first`` on, turned by these."""
        count = x.shape[2]
        cos, sin = (angle[:, None, first:][:, :, -count:] for angle in (self.cos, self.sin))
        one, two = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-two, one], dim=-1) * sin


class Expert(Method):
    """The script for the task at hand."""

    label = "expert's script"
    is_even = False

    def __init__(self, task: Task):
        super().__init__(task)
        of_whisper = EncoderSuffix if task.part == "encoder" else CrossSuffix
        self.script = (CausalSuffix if task.row.kind == "llm" else of_whisper)(task)

    def prepare(self) -> None:
        self.script.prepare()

    def patch(self, cells: Sequence[Cell]) -> list[float]:
        return self.script.values(cells)

    def batches(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Cells that start alike together, a few at a time."""
        size = self.script.cells_per_batch[self.task.device.type]
        batches = []
        start = self.script.start
        for _, alike in itertools.groupby(sorted(cells, key=start), key=start):
            members = list(alike)
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return batches


def _feed_forward(block: nn.Module, x: Tensor) -> Tensor:
    """Whisper's MLP on the residual stream."""
    return x + block.fc2(F.gelu(block.fc1(block.final_layer_norm(x))))


def _split(x: Tensor, attn: nn.Module) -> Tensor:
    return rearrange(x, "n t (h e) -> n h t e", e=attn.head_dim)


def _merge(z: Tensor) -> Tensor:
    return rearrange(z, "n h t e -> n t (h e)")
