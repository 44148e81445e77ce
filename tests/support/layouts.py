"""Small folders in the exact layout of each data set."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from emor3_jax.data.labels import LABEL_SETS


def write_image(path: Path, seed: int, side: int = 24) -> None:
    """Writes noise as an image; its format follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    kind = {".png": "PNG"}.get(path.suffix.lower(), "JPEG")
    Image.fromarray(pixels).save(path, kind)


def emoset(root: Path, counts: dict[str, int]) -> dict[str, list[list[str]]]:
    """Writes EmoSet's layout; returns the rows of its split files."""
    labels = LABEL_SETS["mikels8"]
    splits, number = {}, 0
    for split, count in counts.items():
        rows = []
        for i in range(count):
            label = labels[i % len(labels)]
            name = f"{label}_{number:05d}"
            image, annotation = f"image/{label}/{name}.jpg", f"annotation/{label}/{name}.json"
            write_image(root / image, number)
            (root / annotation).parent.mkdir(parents=True, exist_ok=True)
            attributes = {"image_id": name, "emotion": label, "brightness": number % 11 / 10}
            (root / annotation).write_text(json.dumps(attributes))
            rows.append([label, name, image, annotation])
            number += 1
        splits[split] = rows
        (root / f"{split}.json").write_text(json.dumps(rows))
    order = {label: i for i, label in enumerate(labels)}
    (root / "info.json").write_text(json.dumps({"emotion": {"label2idx": order}}))
    return splits


def emotion6(root: Path, rows: list[tuple[str, list[float]]]) -> None:
    """Writes Emotion6's layout from (file, the seven probabilities)."""
    names = "anger disgust fear joy sadness surprise neutral"
    lines = [f"[image_filename]\t[valence]\t[arousal]\t{names}"]
    for number, (file, shares) in enumerate(rows):
        write_image(root / "images" / file, number)
        lines.append("\t".join([file, "4.5", "5.0", *map(str, shares)]))
    (root / "ground_truth.txt").write_text("\n".join(lines) + "\n")


def classes(root: Path, labels, per_class: int = 2, suffix: str = ".jpg", start: int = 0) -> None:
    """Writes `root/<label>/*`."""
    for i, label in enumerate(labels):
        for j in range(per_class):
            write_image(root / label / f"{j}{suffix}", start + i * per_class + j)


def fer_csv(root: Path, rows: list[tuple[int, str, str]]) -> None:
    """Writes Kaggle's csv from (emotion, pixels, Usage)."""
    root.mkdir(parents=True, exist_ok=True)
    lines = ["emotion,pixels,Usage", *(",".join(map(str, row)) for row in rows)]
    (root / "fer2013.csv").write_text("\n".join(lines) + "\n")
