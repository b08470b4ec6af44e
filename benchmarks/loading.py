"""Peak memory of loading a checkpoint: it must never hold two copies of the weights.

    python -m benchmarks.loading
    python -m benchmarks.loading --layers 24 --width 1024

Writes a random Whisper of the given size to a temporary directory, in one file and in several, and
loads it in fresh processes, by transformers alone and by audio_lens, as stored and cast, and with a
LoRA adapter merged into every attention. Anonymous memory is what a process owns itself; pages of
the mapped checkpoint, which the system can drop at any time, are in the resident size only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

MIB = 2**20
STORED = (("bfloat16", "100MB"), ("bfloat16", "100GB"), ("float32", "100MB"))
WAYS = (
    ("transformers", "stored"),
    ("transformers", "cast"),
    ("audio_lens", "stored"),
    ("audio_lens", "cast"),
    ("audio_lens", "merged"),
)
RANK = 8


def write_checkpoint(
    path: Path, n_layers: int, width: int, dtype: torch.dtype, shard_size: str
) -> int:
    """A random Whisper and, in ``adapter``, a LoRA for it; returns the model's size in bytes."""
    config = transformers.WhisperConfig(
        vocab_size=1000,
        d_model=width,
        encoder_layers=n_layers,
        decoder_layers=n_layers,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 2),
        decoder_start_token_id=1,
    )
    hf_class = transformers.WhisperForConditionalGeneration  # torch 2.6 cannot import it on meta
    with torch.device("meta"):
        empty = hf_class(config)
    model = empty.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.tie_weights()
    model.save_pretrained(path, max_shard_size=shard_size)
    write_adapter(path / "adapter", model)
    return sum(shard.stat().st_size for shard in path.glob("*.safetensors"))


def write_adapter(path: Path, model: transformers.PreTrainedModel) -> None:
    """A LoRA on all projections of all attentions, as peft writes it."""
    path.mkdir(exist_ok=True)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, module.in_features)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, RANK)
    save_file(weights, path / "adapter_model.safetensors")


def memory() -> tuple[int, int]:
    """Bytes of this process that belong to no file, and all that are resident (Linux)."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmRSS"):
            found[name] = 1024 * int(value.split()[0])
    if len(found) < 2:
        raise OSError("this benchmark reads /proc, so it needs Linux")
    return found["RssAnon"], found["VmRSS"]


def load(library: str, path: str, how: str) -> torch.nn.Module:
    """``how`` is a dtype, or "merged" for the stored dtype with the adapter merged."""
    dtype = None if how == "merged" else getattr(torch, how)
    if library == "transformers":
        return transformers.WhisperForConditionalGeneration.from_pretrained(path, dtype=dtype)
    from audio_lens import HookedAudioTransformer

    adapter = Path(path) / "adapter" if how == "merged" else None
    return HookedAudioTransformer.from_pretrained(
        path, dtype=dtype, adapter=adapter, merge=adapter is not None
    )


def measure(library: str, path: str, how: str) -> dict[str, float]:
    """Peaks of memory above the start while loading, sampled every 2 ms."""
    with tempfile.TemporaryDirectory() as tiny:  # imports and lazy modules are not counted
        write_checkpoint(Path(tiny), 1, 16, torch.bfloat16, "1GB")
        load(library, tiny, how)
    start, done = memory(), threading.Event()
    peaks = list(start)

    def look() -> None:
        peaks[:] = map(max, peaks, memory())

    def watch() -> None:
        while not done.wait(0.002):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    model = load(library, path, how)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    look()
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak": peaks[0] - start[0],
        "resident": peaks[1] - start[1],
        "seconds": seconds,
    }


def in_fresh_process(library: str, path: Path, how: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", library, str(path), how]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(stored: str, shard_size: str, n_layers: int, width: int) -> None:
    """Print a table of all ways to load one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), n_layers, width, getattr(torch, stored), shard_size)
        n_files = len(list(Path(folder).glob("*.safetensors")))
        print(f"\n{size / MIB:.0f} MiB in {stored}, in {n_files} file(s)")
        print(
            f"{'':34}{'weights MiB':>12}{'anonymous':>11}{'/weights':>10}{'resident':>10}{'s':>7}"
        )
        other = {"bfloat16": "float32", "float32": "bfloat16"}[stored]
        for library, way in WAYS:
            how = {"stored": stored, "cast": other, "merged": "merged"}[way]
            found = in_fresh_process(library, Path(folder), how)
            sizes = [found[what] / MIB for what in ("weights", "peak", "resident")]
            print(
                f"{f'{library}, {way} ({how})':34}{sizes[0]:12.0f}{sizes[1]:12.0f}"
                f"{sizes[1] / sizes[0]:12.2f}{sizes[2]:12.0f}{found['seconds']:12.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    for stored, shard_size in STORED:
        compare(stored, shard_size, options.layers, options.width)


if __name__ == "__main__":
    main()
