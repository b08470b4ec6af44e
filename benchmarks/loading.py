"""Peak memory of loading a checkpoint: it must never hold two copies of the weights.

    python -m benchmarks.loading
    python -m benchmarks.loading --layers 24 --width 1024

Writes a random Whisper of the given size to a temporary directory and loads it in fresh processes,
by transformers alone and by audio_lens, as stored and cast to float32. Anonymous memory is what a
process owns itself; pages of the mapped checkpoint, which the system can drop, are not in it.
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

MIB = 2**20
WAYS = {
    "transformers, as stored": ("transformers", "bfloat16"),
    "audio_lens, as stored": ("audio_lens", "bfloat16"),
    "transformers, float32": ("transformers", "float32"),
    "audio_lens, float32": ("audio_lens", "float32"),
}


def write_checkpoint(path: Path, n_layers: int, width: int) -> int:
    """A random bfloat16 Whisper in several shards; returns its size in bytes."""
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
    model = transformers.WhisperForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="100MB")
    return sum(shard.stat().st_size for shard in path.glob("*.safetensors"))


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("this benchmark reads /proc, so it needs Linux")


def load(library: str, path: str, dtype: torch.dtype) -> object:
    if library == "transformers":
        return transformers.WhisperForConditionalGeneration.from_pretrained(path, dtype=dtype)
    from audio_lens import HookedAudioTransformer

    return HookedAudioTransformer.from_pretrained(path, dtype=dtype)


def measure(library: str, path: str, dtype: torch.dtype) -> dict[str, float]:
    """Peak of anonymous memory above the start while loading, sampled every 2 ms."""
    with tempfile.TemporaryDirectory() as tiny:  # imports and lazy modules are not counted
        write_checkpoint(Path(tiny), n_layers=1, width=16)
        load(library, tiny, torch.float32)
    start, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    model = load(library, path, dtype)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak": max(peak, anonymous_bytes()) - start,
        "seconds": seconds,
    }


def in_fresh_process(library: str, path: Path, dtype: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", library, str(path), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        library, path, dtype = options.measure
        print(json.dumps(measure(library, path, getattr(torch, dtype))))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.layers, options.width)
        print(f"checkpoint: {size / MIB:.0f} MiB in bfloat16")
        print(f"{'':26}{'weights MiB':>12}{'peak MiB':>10}{'peak/weights':>14}{'s':>7}")
        for label, (library, dtype) in WAYS.items():
            found = in_fresh_process(library, Path(folder), dtype)
            ratio = found["peak"] / found["weights"]
            print(
                f"{label:26}{found['weights'] / MIB:12.0f}{found['peak'] / MIB:10.0f}"
                f"{ratio:14.2f}{found['seconds']:7.1f}"
            )


if __name__ == "__main__":
    main()
