"""How fast rows become batches, and how much memory that takes. python -m benchmarks.input

Images a second by worker processes and image size, at the image sizes of the main job and of
the Qwen2.5-VL-3B configs, beside what a training step of the main job's shapes consumes (a policy
of its size with random weights); then resident memory, worker processes included, over 50,000 rows.
Images are generated: smooth colours with noise, saved as JPEG.
"""

import io
import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import cpu_demo
from emor3_jax.config import base_policy, dataset
from emor3_jax.data.generic import open_json_lines
from emor3_jax.data.labels import label_set
from emor3_jax.data.pipeline import BatchSpec, TrainBatches, train_batches
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.embedded.base_policy import small_policy
from emor3_jax.embedded.emoscenes import tasks
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import LoadedPolicy, save
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.train import train

LABELS = label_set("mikels8")
IMAGES = 128
BATCH = 32
ROWS = 50_000
STEPS = 4

DEMO = ImageSettings(min_pixels=112**2, max_pixels=112**2)
HOST = ImageSettings(min_pixels=262_144, max_pixels=401_408)
"""As `configs/tpu_*.py` and `configs/gpu.py` scale images."""


def photo(seed: int, height: int, width: int) -> bytes:
    """Returns a JPEG of smooth colours with a little noise, about as large as a photograph's."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(cells.resize((width, height), Image.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_rows(folder: Path, count: int, height: int, width: int, images: int) -> str:
    """Writes JSON lines of `count` rows over `images` files; returns the file."""
    folder.mkdir(parents=True)
    for i in range(images):
        (folder / f"{i}.jpg").write_bytes(photo(i, height, width))
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(count):
            row = {"image": f"{i % images}.jpg", "answer": LABELS[i % len(LABELS)]}
            file.write(json.dumps(row) + "\n")
    return str(folder / "rows.jsonl")


def random_policy(images: ImageSettings) -> LoadedPolicy:
    """Returns a policy of the main job's size, untrained."""
    tokenizer = train_tokenizer(tasks.text_corpus(40), 1200)
    policy = small_policy(base_policy(), tokenizer)
    params = jax.device_get(policy.init(jax.random.key(0)))
    return LoadedPolicy(policy, params, Processor(tokenizer, images, policy.layout))


def batches_of(
    path: str, policy: LoadedPolicy, images: ImageSettings, workers: int
) -> TrainBatches:
    """Returns training batches as a run makes them."""
    return train_batches(
        open_json_lines(path),
        Processor(policy.processor.tokenizer, images, policy.processor.layout),
        PromptTemplates.load("tiny", "tiny", "tiny").set,
        LABELS,
        BatchSpec(BATCH, (128, 640, 896), (1, 32, 48), workers=workers),
        seed=0,
    )


def images_a_second(batches: TrainBatches, seconds: float = 8.0) -> float:
    """Returns the rate once the first batches are there."""
    for _ in range(4):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate


def resident() -> float:
    """Returns MiB that this process and its children have in memory, shared pages counted once
    for each of them."""
    pages = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            if os.getpid() in (int(status.parent.name), int(fields[1])):
                pages += int((status.parent / "statm").read_text().split()[1])
        except OSError:
            # It has ended meanwhile.
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def training_step(folder: Path, policy: LoadedPolicy) -> dict[str, float]:
    """Returns the medians of a training step's times at the shapes of the main job."""
    config = cpu_demo.get_config()
    save(policy, folder / "policy")
    config.policy.path = str(folder / "policy")
    rows = write_rows(folder / "rows", 256, 224, 224, 64)
    config.data.train = dataset(kind="jsonl", path=rows)
    config.data.prompt_lengths = (128,)
    config.evaluate.sets = ConfigDict()
    config.steps = STEPS
    config.log.compile_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    config.reward.table_cache = ""
    train(config, folder / "run")
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    # The first step compiles.
    warm = [step for step in steps if step["step"] > 1]
    return {
        name: float(np.median([s[name] for s in warm])) for name in ("time/step_s", "time/data_s")
    }


def main() -> None:
    """Prints the tables."""
    policy = random_policy(DEMO)
    print(f"{date.today()}, {os.cpu_count()} cores\n")
    print("| images | scaled to | workers | images a second | 512 of them, seconds |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for height, width, images, scaled in (
            (224, 224, DEMO, "112 x 112"),
            (480, 640, HOST, "at most 401,408 pixels"),
            (960, 1280, HOST, "at most 401,408 pixels"),
        ):
            path = write_rows(folder / f"{width}", IMAGES, height, width, IMAGES)
            for workers in (0, 1, 2):
                rate = images_a_second(batches_of(path, policy, images, workers))
                size = f"{width} x {height}"
                print(f"| {size} | {scaled} | {workers} | {rate:.0f} | {512 / rate:.1f} |")
        step = training_step(folder / "step", policy)
        wanted = cpu_demo.get_config().rollout.prompts
        print(
            f"\nA step of the main job's shapes takes {step['time/step_s']:.2f} s for {wanted} "
            f"images: {wanted / step['time/step_s']:.0f} a second. It waits "
            f"{1000 * step['time/data_s']:.0f} ms for them.\n"
        )
        print(f"Resident memory, MiB, while {ROWS} rows of 64 x 64 pixels are read once:\n")
        print(
            "| workers | " + " | ".join(f"{n // 1000}k rows" for n in range(5000, ROWS + 1, 5000))
        )
        path = write_rows(folder / "many", ROWS, 64, 64, 1000)
        for workers in (0, 2):
            batches = batches_of(path, policy, DEMO, workers)
            seen = []
            for batch in range(1, ROWS // BATCH + 1):
                next(batches)
                if batch * BATCH // 5000 > (batch - 1) * BATCH // 5000 or batch == ROWS // BATCH:
                    seen.append(resident())
            batches.close()
            print(f"| {workers} | " + " | ".join(f"{mib:.0f}" for mib in seen[:10]))


if __name__ == "__main__":
    main()
