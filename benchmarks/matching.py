"""Where the time goes when cut-outs are named: 1,000 of them against 10,000 references.

    python benchmarks/matching.py

A round embeds the cut-outs (resize, encoder) and matches them (cosines, fusion over the references of each class,
margin, the references that decided); the share of matching is the median over rounds. The encoder is a
ViT-Tiny with random weights, the smallest that anyone would use, so any other makes the share of matching smaller.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch.nn.functional import normalize

from vicinal.data.images import Cutout
from vicinal.embedding import embed_cutouts
from vicinal.models.backbones import load_encoder
from vicinal.serving.matching import Matcher
from vicinal.types import Embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=2000)
    parser.add_argument("--each", type=int, default=5, help="References a class.")
    parser.add_argument("--side", type=int, default=96, help="Of a cut-out, in pixels.")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    cutouts = [
        Cutout.whole(
            torch.randint(0, 256, (a.side, a.side, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
        )
        for _ in range(a.crops)
    ]
    for size in (112, 224):
        encoder = load_encoder("timm:vit_tiny_patch16_224", size=size, random_init=True)
        mark = encoder.fingerprint()
        count = a.classes * a.each
        vectors = normalize(torch.randn(count, encoder.embedding_dim, generator=generator), dim=1)
        labels = torch.arange(count) % a.classes
        names = tuple(map(str, range(count))), tuple(map(str, range(a.classes)))
        references = Embeddings(vectors, labels, *names)
        matchers = {
            fusion: Matcher(references, fingerprint=mark, fusion=fusion, threshold=0.5)
            for fusion in ("max", "topk", "multi-ref")
        }
        spent: dict[str, list[float]] = {name: [] for name in ("embedded", *matchers)}
        for _ in range(a.rounds + 1):
            begin = time.process_time()
            queries = embed_cutouts(encoder, cutouts, batch_size=16)
            spent["embedded"].append(time.process_time() - begin)
            for fusion, matcher in matchers.items():
                begin = time.process_time()
                matcher.match(queries, fingerprint=mark)
                spent[fusion].append(time.process_time() - begin)
        embedded = np.array(spent["embedded"][1:])  # the first warms up
        print(f"{size} px: {a.crops:,} cut-outs embedded in {np.median(embedded):.2f} s of CPU time; matched against")
        for fusion in matchers:
            matched = np.array(spent[fusion][1:])
            share = matched / (embedded + matched)
            print(
                f"  {count:,} references of {a.classes:,} classes by {fusion} in {np.median(matched) * 1000:.0f} ms, "
                f"{np.median(share):.1%} of the whole [{share.min():.1%}, {share.max():.1%}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
