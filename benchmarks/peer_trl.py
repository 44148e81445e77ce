"""TRL's GRPOTrainer as the peer of `benchmarks.step`, which starts this file as a process.

    python -m benchmarks.peer_trl JOB        # JOB: a JSON object, see `Job`

Takes one training step for every line on its standard input and answers with a JSON object, so
that both sides take turns on one machine. Imports neither JAX nor `emor3_jax`.

How TRL gets its best: the whole batch is one micro-batch; no gradient checkpointing; attention by
scaled_dot_product_attention; fused AdamW; one optimizer step per batch, so TRL needs no pass for
old log-probabilities; no logging, no checkpoints, no progress bar. `cache` chooses the cache of
generation. No id that ends a response is ever drawn, on neither side, so both generate T tokens.

Images go through `peer_processor`; the seconds that it takes are reported apart.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peer_processor import load_processor
from benchmarks.peers import say
from benchmarks.plain_rules import accuracy_score, format_score, pattern_score


class Job(NamedTuple):
    """What the peer is asked to do.

    Attributes:
      policy: folder of the policy.
      rows: parquet file.
      question: what is asked of each image, without the image.
      prompts, responses, tokens: B, G, T.
      precision: "float32", "bfloat16" (autocast over float32 weights), or "bfloat16 weights".
      cache: TRL's `cache_implementation`; "" is its default, a growing one.
      micro: responses of a micro-batch; 0 is all.
      steps: at most so many.
      learning_rate, weight_decay, max_grad_norm, clip_low, clip_high, kl_coef: of the update.
      pattern: regular expression of the third reward.
      weights: of the rewards: format, accuracy, pattern.
      output: folder for TRL.
      record: file for the first batch and its results; "" writes none.
    """

    policy: str
    rows: str
    question: str
    prompts: int
    responses: int
    tokens: int
    precision: str
    cache: str
    micro: int
    steps: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    clip_low: float
    clip_high: float
    kl_coef: float
    pattern: str
    weights: tuple[float, float, float]
    output: str
    record: str


class Trainer(GRPOTrainer):
    """GRPOTrainer with a clock at its phases; the first batch is kept for `record`."""

    record = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spent: dict[str, float] = {}
        self.first: dict[str, np.ndarray] = {}
        processor = self.processing_class.image_processor
        clocked = type(processor).__call__

        # A call looks __call__ up on the class, so the class gets the clock.
        class Clocked(type(processor)):
            def __call__(inner, *a: Any, **k: Any) -> Any:
                return self._clock("images", lambda: clocked(inner, *a, **k))

        processor.__class__ = Clocked

    def _clock(self, name: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        out = function()
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started
        return out

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock(
            "generate", lambda: super(Trainer, self)._generate_single_turn(*args, **kwargs)
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        scores = super()._calculate_rewards(*args, **kwargs)
        if self.record and not self.first:
            self.first["scores"] = scores.numpy()
        return scores

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        out = super()._generate_and_score_completions(inputs)
        lengths = out["completion_mask"].sum(1)
        self.lengths = sorted(set(lengths.tolist()))
        if self.record and "tokens" not in self.first:
            self.first |= {
                "rows": np.array([each["row"] for each in inputs]),
                "prompts": out["prompt_ids"].numpy(),
                "tokens": out["completion_ids"].numpy(),
                "advantages": out["advantages"].numpy(),
                "reference": out["ref_per_token_logps"].float().numpy(),
            }
        return out


class Turns(TrainerCallback):
    """Waits for a line before each step and answers with the seconds that it took."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.started = trainer, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the go-ahead."""
        if not sys.stdin.readline():
            control.should_training_stop = True
            raise SystemExit
        self.trainer.spent = {}
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports."""
        seconds = time.perf_counter() - self.started
        say({"seconds": seconds, "phases": self.trainer.spent, "lengths": self.trainer.lengths})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
        """Writes down the first step's loss and gradient."""
        record = self.trainer.record
        if record and "loss" not in self.trainer.first and "loss" in logs:
            self.trainer.first["loss"] = np.array(logs["loss"])
            self.trainer.first["grad_norm"] = np.array(float(logs["grad_norm"]))
            np.savez(record, **self.trainer.first)


def read_rows(job: Job) -> Dataset:
    """Returns the rows as TRL wants them: a chat and its image."""
    table = pq.read_table(job.rows).to_pylist()
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": job.question}],
                "image": Image.open(io.BytesIO(row["images"][0]["bytes"])),
                "answer": row["answer"],
                "row": number,
            }
            for number, row in enumerate(table)
        ]
    )


def texts_of(completions: list) -> list[str]:
    """Returns the responses' texts."""
    return [turns[0]["content"] for turns in completions]


def make_trainer(job: Job) -> Trainer:
    """Returns the trainer at its best settings."""
    folder = Path(job.policy)
    processor = load_processor(folder)
    rows = job.prompts * job.responses
    micro = job.micro or rows

    def format_reward(completions: list, **_: Any) -> list[float]:
        return [format_score(text) for text in texts_of(completions)]

    def accuracy_reward(completions: list, answer: list[str], **_: Any) -> list[float]:
        pairs = zip(texts_of(completions), answer, strict=True)
        return [accuracy_score(text, label) for text, label in pairs]

    def pattern_reward(completions: list, **_: Any) -> list[float]:
        return [pattern_score(text, job.pattern) for text in texts_of(completions)]

    config = GRPOConfig(
        output_dir=job.output,
        use_cpu=True,
        bf16=job.precision == "bfloat16",
        model_init_kwargs={
            "dtype": "bfloat16" if job.precision == "bfloat16 weights" else "float32",
            "attn_implementation": "sdpa",
        },
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=job.responses,
        max_completion_length=job.tokens,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        cache_implementation=job.cache or None,
        # As `emor3_jax`: special ids are never drawn. Here those that end a response are among
        # them, so that every response has T tokens.
        generation_kwargs={"suppress_tokens": sorted(processor.tokenizer.added_tokens_decoder)},
        beta=job.kl_coef,
        epsilon=job.clip_low,
        epsilon_high=job.clip_high,
        loss_type="dapo",
        scale_rewards="group",
        reward_weights=list(job.weights),
        optim="adamw_torch_fused",
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        gradient_checkpointing=False,
        max_steps=job.steps,
        save_strategy="no",
        report_to="none",
        logging_strategy="steps",
        logging_first_step=bool(job.record),
        logging_steps=10**6,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        seed=0,
    )
    trainer = Trainer(
        model=str(folder),
        reward_funcs=[format_reward, accuracy_reward, pattern_reward],
        args=config,
        train_dataset=read_rows(job),
        processing_class=processor,
    )
    trainer.record = job.record
    return trainer


def main() -> None:
    """Takes steps until the input ends."""
    job = Job(**json.loads(sys.argv[1]))
    trainer = make_trainer(job)
    trainer.add_callback(Turns(trainer))
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say({"parameters": count})
    trainer.train()


if __name__ == "__main__":
    main()
