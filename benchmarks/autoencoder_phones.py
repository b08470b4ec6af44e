"""What latents of Whisper-tiny.en's encoder listen to, in speech whose phones are known.

    AUDIO_LENS_DATA=... python -m benchmarks.autoencoder_phones
    AUDIO_LENS_DATA=... python -m benchmarks.autoencoder_phones --keep kept --out phones.html

An autoencoder for every block, trained on speech without alignments (read sentences, one speaker's
ways of speaking) and evaluated on aligned speech of other recordings: what it loses there, with how
many latents. Then, of the last block, the 20 strongest moments of each latent in the aligned
speech: how many fall on one phone. The five shown are the purest of all that have 20 moments, save
those of silence, which is a choice; beside them stand five of all, drawn at random, the mean of
all, and 20 moments drawn at random from all frames, many times. One thread.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from audio_lens import HookedAudioTransformer, Item, Items, collect
from audio_lens.alignment import read_textgrid
from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Autoencoder, Firing
from audio_lens.items import Activations
from audio_lens.timeline import Span

SITE = "encoder.resid_post"
MOMENTS, SHOWN, DRAWS = 20, 5, 2000
SILENCE = ("SIL", "sil", "sp", "spn", "", "+SPN+", "+NSN+", "+BREATH+")
NOTHING = "(silence)"

out = Console(highlight=False)


def main(
    width: Annotated[int, typer.Option(help="Latents.")] = 1024,
    k: Annotated[int, typer.Option(help="Active ones.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 300,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    keep: Annotated[
        Path | None, typer.Option(help="A folder for what is computed; a run goes on from it.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--out", help="A page of the purest.")] = None,
) -> None:
    """Print what is lost in every block, and on which phones latents of the last one fall."""
    torch.set_num_threads(1)
    data = Path(os.environ.get("AUDIO_LENS_DATA", "../shared/data"))
    model, start = whisper_encoder(data), time.process_time()
    heard, (aligned, phones) = unaligned(data), with_phones(data)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    places = [None if keep is None else keep / name for name in ("heard", "aligned")]
    fitted, tested = (
        collect(model, items, SITE, to=place, size=1, shard_bytes=2**22)
        for items, place in zip((heard, aligned), places, strict=True)
    )
    out.print(
        f"{len(heard)} clips, {len(fitted)} frames to train on; {len(aligned)} aligned clips, "
        f"{len(tested)} frames ({time.process_time() - start:.0f} CPU s)"
    )
    out.print("block   FVU    L0  never active there  FVU trained on  CPU s")
    for layer in fitted.layers():
        start = time.process_time()
        file = None if keep is None else keep / f"{layer}-{width}-{k}-{steps}-{seed}.safetensors"
        made = autoencoders.train(
            *(fitted, width, k),
            steps=steps,
            layer=layer,
            seed=seed,
            to=file,
            every=50,
            progress=False,
        )
        took = time.process_time() - start
        new, old = (autoencoders.evaluate(made, acts) for acts in (tested, fitted))
        fvu, l0 = new.mean().values.tolist()
        own = old.mean().values[0].item()
        dead = float(new.meta["dead"])
        out.print(f"{layer:5} {fvu:5.3f} {l0:5.1f} {dead:19.2f} {own:15.3f} {took:6.0f}")
    told = purities(made, tested, phones)
    _print_purities(told, tested, phones, seed)
    if html is not None:
        from audio_lens.report import feature_page

        best = purest(told)[:SHOWN]
        found = autoencoders.features(model, aligned, tested, made, best, phones=phones)
        out.print(f"page written to {feature_page(found, html, title='Latents and phones')}")


# -------------------------------------------------------------------------------- material


def whisper_encoder(data: Path) -> HookedAudioTransformer:
    """Whisper-tiny.en, of which the encoder is whole; its decoder knows 13 tokens."""
    source = data / "models" / "whisper_tiny_en"
    weights = load_file(source / "digit13_token_embedding.safetensors")
    for part in ("encoder_fp16", "decoder_no_token_embedding_fp16"):
        held = load_file(source / f"{part}.safetensors")
        weights |= {f"model.{key}": tensor.float() for key, tensor in held.items()}
    control = {"decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    control |= {"pad_token_id": 2}
    config = json.loads((source / "config.json").read_text()) | control
    config |= {"vocab_size": 13, "begin_suppress_tokens": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
        (path / "generation_config.json").write_text(json.dumps(control))
        (path / "preprocessor_config.json").write_bytes(
            (source / "preprocessor_config.json").read_bytes()
        )
        return HookedAudioTransformer.from_pretrained(path)


def unaligned(data: Path) -> Items:
    """Speech of several speakers, in several ways."""
    folders = ("prosody/mfa", "speech", "speech/speechbrain_harvard", "speech/pocketsphinx_cards")
    endings = (".flac", ".wav", ".mp3")
    paths = [
        path
        for folder in folders
        for path in sorted((data / folder).iterdir())
        if path.suffix in endings
    ]
    return Items(Item(path, id=str(path.relative_to(data))) for path in paths)


def with_phones(data: Path) -> tuple[Items, dict[str, list[Span]]]:
    """Speech with words, and the phones of each clip."""
    items, phones = [], {}
    folder = data / "aligned" / "pocketsphinx_librivox"
    for path in sorted(folder.glob("*.wav")):
        told = json.loads(path.with_suffix(".phone.json").read_text())
        words = [_span(word) for word in told["w"]]
        phones[path.stem] = [_span(phone) for word in told["w"] for phone in word["w"]]
        items.append(Item(path, id=path.stem, words=[w for w in words if w.label]))
    clip = data / "aligned" / "mfa" / "acoustic_corpus.wav"  # the other there has other phones
    tiers = read_textgrid(clip.with_suffix(".TextGrid"))
    sounds, words = (
        next(spans for tier, spans in tiers.items() if name in tier) for name in ("phone", "word")
    )
    phones[clip.stem] = [Span(one.start_s, one.end_s, _plain(one.label)) for one in sounds]
    items.append(Item(clip, id=clip.stem, words=[word for word in words if word.label]))
    return Items(items), phones


def _span(told: dict[str, Any]) -> Span:
    end = told["b"] + max(told["d"], 0.01)
    return Span(told["b"], end, _plain(told["t"].partition("(")[0]))


def _plain(label: str | None) -> str:
    """A phone in capitals without its stress; nothing for silences."""
    bare = (label or "").rstrip("012").upper()
    return "" if bare in {one.upper() for one in SILENCE} or bare.startswith("<") else bare


# -------------------------------------------------------------------------------- phones


def purities(
    made: Autoencoder, acts: Activations, phones: dict[str, list[Span]]
) -> dict[int, tuple[str, float]]:
    """Of every latent with 20 moments, the phone on which most fall, and their share."""
    moments = autoencoders.firings(made, acts, range(made.width), most=MOMENTS, apart_s=0.04)
    return {
        latent: autoencoders.purity(held, phones, NOTHING)
        for latent, held in moments.items()
        if len(held) == MOMENTS
    }


def purest(told: dict[int, tuple[str, float]]) -> list[int]:
    """Latents of phones, but not of silence: those first whose moments share theirs most."""
    of_phones = [latent for latent, (label, _) in told.items() if label != NOTHING]
    return sorted(of_phones, key=lambda latent: -told[latent][1])


def _print_purities(
    told: dict[int, tuple[str, float]], acts: Activations, phones: dict, seed: int
) -> None:
    chance, common = by_chance(acts, phones, seed)
    draw = np.random.default_rng(seed)
    best = purest(told)
    random = draw.choice(sorted(told), SHOWN, replace=False).tolist()
    table = Table("latents", "latent", "phone", "share of 20", box=None)
    for name, chosen in (("purest", best[:SHOWN]), ("random", random)):
        for latent in chosen:
            label, share = told[latent]
            table.add_row(name, str(latent), label, f"{share:.2f}")
    out.print(table)
    shares = [share for _, share in told.values()]
    pure = sum(share >= 0.5 and label != NOTHING for label, share in told.values())
    out.print(
        f"{len(told)} latents have 20 moments: mean share {np.mean(shares):.2f}; {pure} of them "
        f"fall on one phone (no silence) at half of their moments or more; 20 random frames: "
        f"{chance:.2f} (95 % below {common:.2f})"
    )


def by_chance(acts: Activations, phones: dict[str, list[Span]], seed: int) -> tuple[float, float]:
    """The share of the commonest phone among 20 random frames: mean, and 95th percentile."""
    table, draw = acts.table(), np.random.default_rng(seed)
    frames = [
        Firing(str(name), 0, 0, float(second), 1.0)
        for name, second in zip(table["id"], table["second"], strict=True)
    ]
    shares = [
        autoencoders.purity(
            [frames[i] for i in draw.choice(len(frames), MOMENTS)], phones, NOTHING
        )[1]
        for _ in range(DRAWS)
    ]
    return float(np.mean(shares)), float(np.quantile(shares, 0.95))


if __name__ == "__main__":
    typer.run(main)
