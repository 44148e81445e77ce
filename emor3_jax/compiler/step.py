"""All programs of a run, on arrays that have shapes and shardings alone.

The programs come from the objects that run them (`Rollout.programs`, `Learner.programs`), so what
is compiled here is what runs. Every padded size is the largest that the config allows, so no step
of a run needs more.

Assumptions, numbered:
 1. The tokenizer is not read. Where the policy's folder is absent, the texts around images and
    judged texts are as long as Qwen2.5-VL's are on the built-in templates, and the reward tables
    are as large as those of a vocabulary of 151,936 ids, 23 MB.
 2. Custom reward terms are left out.
 3. Further rollouts of `rollout.resample` take the same programs again.
 4. A shrink of the batch is shown at its largest: from all slots to the most that are fewer.
 5. All evaluation sets have as many labels as the training set.
 6. A judge of another family whose folder is absent lacks tokens of the policy.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.data.labels import label_set
from emor3_jax.data.prefix import padded_length
from emor3_jax.learner.learner import Learner
from emor3_jax.learner.reference import FeatureCache, Reference
from emor3_jax.learner.scoring import compare_groups, terms_of
from emor3_jax.models.lora import Lora
from emor3_jax.models.params import cast_matrices
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.program import (
    Program,
    Programs,
    along,
    as_params,
    by_prompts,
    single,
    switched,
    whole,
)
from emor3_jax.prepare.shapes import JudgeToLoad, read_judge_shapes
from emor3_jax.rewards.automaton import Automaton
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.reward import Reward
from emor3_jax.rewards.spans import SpanTables
from emor3_jax.rewards.tables import Tables
from emor3_jax.rl.advantages import ESTIMATORS
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout.judge import Judge
from emor3_jax.rollout.label_likelihood import LabelLikelihood
from emor3_jax.rollout.likelihood import Candidates
from emor3_jax.rollout.reflect import PromptedQuestion, Reflection
from emor3_jax.rollout.retokenize import Retokenizer
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.types import Batch, ImagePrefix, Prompt

_BOXED_LABEL = 8
"""Tokens of a boxed label and the end of the turn."""

_STOP = (151645, 151643)
"""Ids that end a response; the compiler ignores their values."""

Around = tuple[int, int]
"""Tokens of a question before and behind the judged text."""


class AbstractScorer(NamedTuple):
    """The parts of a `rewards.Scorer` that programs read."""

    reward: Reward
    tables: Tables


def step_programs(
    mesh: Mesh, config: ConfigDict, policy: Policy, texts: dict[str, Around]
) -> Programs:
    """Yields every program of a run.

    Args:
      mesh: of the devices to compile for.
      config: of the run.
      policy: with the attention of the platform.
      texts: name of a question → tokens around the judged text.
    """
    maker = _Maker(mesh, config, policy, texts)
    asked, asked_in_evaluation = prepare.judge_names(config)
    learner, state = maker.learner()
    batch = maker.batch(config.rollout.prompts, asked)
    rollout = maker.rollout(asked, training=True)
    key = whole(mesh, jax.eval_shape(partial(jax.random.key, 0)))
    base = learner.lora.base if learner.lora else state.params
    loaded = {"parameters": [base, state.params]}
    # Made once a run; it replaces the float32 parameters that were loaded.
    reference = yield from along(learner.reference.cast_programs(base), loaded)
    if reference is base and learner.lora is None:
        # The state is donated to updates, so such a reference is a copy of it.
        reference = as_params(mesh, reference)
    judge = maker.judge(asked, reference)
    evaluation_judge = maker.judge(asked_in_evaluation, reference)
    kept = {
        "parameters": [base, state.params, reference, *maker.judges],
        "optimizer": state.opt_state,
        "data": [batch, rollout.scorer.tables],
    }
    params = yield from along(learner.merge_programs(state), kept)
    # Merged kernels lie beside base and adapters while responses are sampled and scored.
    sampling = {**kept, "parameters": [*kept["parameters"], params]}
    experience = yield from along(rollout.programs(params, batch, key, judge), sampling)
    terms = terms_of(experience, learner.step.weights)
    if config.rollout.resample:
        args, how = (terms,), {"name": learner.step.advantage}
        yield from along(single(Program("compare_groups", compare_groups, args, how)), sampling)
    found = {"data": [experience.samples, experience.replies]}
    # Put on the devices while they update, and there from then on.
    following = maker.batch(config.rollout.prompts, asked)
    updates = learner.programs(state, experience, reference, terms, params)
    kept["data"] = [rollout.scorer.tables]
    # The step's own batch is read until the last update.
    learned = experience.batch
    updates = switched(updates, "no_gradients", {"data": learned}, {"data": following})
    yield from along(along(updates, found), kept)
    evaluated = maker.batch(config.evaluate.prompts, asked_in_evaluation)
    kept = {**sampling, "data": [evaluated, following, rollout.scorer.tables]}
    evaluation = maker.rollout(asked_in_evaluation, training=False)
    evaluation = evaluation.programs(params, evaluated, key, evaluation_judge)
    answered = yield from along(evaluation, kept, "evaluate")
    if config.evaluate.likelihood:
        weighed = maker.label_likelihood().programs(params, evaluated, answered.samples)
        kept["data"] = [*kept["data"], answered.samples]
        yield from along(weighed, kept, "evaluate")


class _Maker:
    """Makes the objects of a run without weights, tokenizer or data."""

    def __init__(
        self, mesh: Mesh, config: ConfigDict, policy: Policy, texts: dict[str, Around]
    ) -> None:
        dtype = jnp.dtype(config.policy.dtype)
        self.mesh, self.config, self.texts = mesh, config, texts
        self._judges: dict[str, Judge] = {}
        self._read: dict[str, JudgeToLoad] = {}
        self.policy = policy.with_compute(dtype=dtype)
        self.labels = len(label_set(config.data.train.labels or prepare.PARQUET_LABELS))
        self.suppressed = whole(mesh, jax.ShapeDtypeStruct((policy.shapes.vocab_size,), bool))

    def learner(self) -> tuple[Learner, TrainState]:
        """Returns the learner with abstract arrays, and the state before the first update."""
        config, lora, cache = self.config, None, None
        params = as_params(self.mesh, self.policy.param_shapes())
        trained = jax.eval_shape(partial(prepare.trained_params, config), params)
        trained = as_params(self.mesh, trained)
        if config.policy.lora_rank:
            # As `prepare.load_policy` reads a base.
            params = self._in_compute_type(params)
            scale = jax.ShapeDtypeStruct((), jnp.float32)
            lora = Lora(params, whole(self.mesh, scale))
        else:
            trained = params
        settings = prepare.reference_settings(config)
        if config.reference.image_cache and settings["kind"] != "none":
            micro_prompts = config.policy_update.micro_prompts
            cache = FeatureCache(self.policy, config.reference.image_cache, micro_prompts)
        spec = prepare.make_update_spec(config, self.policy)
        reference = Reference({}, cache=cache, **settings)
        learner = Learner(
            spec,
            prepare.make_step_spec(config),
            self.mesh,
            self.suppressed,
            reference=reference,
            lora=lora,
        )
        moments = jax.eval_shape(partial(TrainState.create, optimizer=spec.optimizer), trained)
        state = as_params(self.mesh, moments)
        return learner, state._replace(params=trained)

    def rollout(self, asked: str, *, training: bool) -> Rollout:
        """Returns the rollout of training or of evaluation with abstract arrays.

        Args:
          asked: who is asked, of `judge_names`.
          training: not evaluation.
        """
        read = self._read_judge(asked)
        texts = read.texts.questions if read and read.reads_alone else self.texts
        c, reflect = self.config, self.config.reflect
        asks = reflect.enabled or (c.evaluate.reflect and not training)
        sampling = prepare.make_sampling(c, _STOP)
        reflection = Reflection(
            tuple(self._question(name, texts) for name in QUESTIONS),
            prepare.make_reply_sampling(c, _STOP),
            tuple(reflect.text_lengths),
            reflect.soft,
            Retokenizer() if read and read.retokenizes else None,
        )
        reward = prepare.make_reward(c, terms=())
        tables = whole(self.mesh, abstract_tables(self.policy.shapes.vocab_size, reward.patterns))
        common = self.policy, AbstractScorer(reward, tables), self.suppressed
        if training:
            return Rollout(
                *common,
                sampling,
                c.rollout.responses,
                reflection if asks else None,
                prepare.rollout_plan(c),
                ESTIMATORS[c.policy_update.advantage].greedy,
                self.mesh.shape["data"] * self.mesh.shape["fsdp"],
                c.rollout.weight_dtype == "int8",
            )
        return Rollout(
            *common,
            prepare.make_evaluation_sampling(c, _STOP),
            c.evaluate.votes,
            reflection if asks else None,
            prepare.evaluation_plan(c),
            num_shards=self.mesh.shape["data"] * self.mesh.shape["fsdp"],
        )

    def judge(self, name: str, reference: Any) -> Judge | None:
        """Returns who is asked about responses with abstract arrays; None for the policy.

        Args:
          name: of `config.judge_names`.
          reference: its parameters, abstract.
        """
        if name == "policy":
            return None
        if name == "reference":
            return Judge(self.policy, reference, self.suppressed)
        if name not in self._judges:
            policy = dataclasses.replace(self._read_judge(name).policy, compute=self.policy.compute)
            params = self._in_compute_type(policy.param_shapes())
            suppressed = jax.ShapeDtypeStruct((policy.shapes.vocab_size,), bool)
            self._judges[name] = Judge(policy, params, whole(self.mesh, suppressed))
        return self._judges[name]

    def _in_compute_type(self, params: Any) -> Any:
        cast = partial(cast_matrices, dtype=self.policy.dtype)
        return as_params(self.mesh, jax.eval_shape(cast, params))

    def _read_judge(self, name: str) -> JudgeToLoad | None:
        """Returns a judge that is neither the policy nor its reference; else None."""
        if name in ("policy", "reference"):
            return None
        if name not in self._read:
            named = self.config.evaluate.judge == name
            field = "evaluate.judge" if named else "reflect.judge"
            self._read[name] = read_judge_shapes(self.config, field, name)
        return self._read[name]

    @property
    def judges(self) -> list[Any]:
        """Abstract parameters of the judges beside policy and reference."""
        return [judge.params for judge in self._judges.values()]

    def label_likelihood(self) -> LabelLikelihood:
        """Returns the label likelihood of an evaluation, with two spellings of each label."""
        candidates = _candidates(2 * self.labels, self.labels, _BOXED_LABEL)
        return LabelLikelihood(self.policy, candidates, self.labels, self.suppressed)

    def _question(self, name: str, texts: dict[str, Around]) -> PromptedQuestion:
        head, tail = (np.zeros(n, np.int32) for n in texts[name])
        meanings = len(QUESTIONS[name].meanings(("",) * self.labels))
        # Two spellings each.
        return PromptedQuestion(QUESTIONS[name], head, tail, _candidates(2 * meanings, meanings))

    def batch(self, prompts: int, asked: str) -> Batch:
        """Returns prompts in the largest buckets of the config.

        Args:
          prompts: B.
          asked: who is asked about responses, of `judge_names`.
        """
        p, w = self.config.data.prompt_lengths[-1], self.config.data.image_windows[-1]

        def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((prompts, *shape), dtype)

        def prompt(p: int) -> Prompt:
            return Prompt(array(p), array(p, 3), array(p, dtype=bool), array(p))

        prefix, read = None, self._read_judge(asked)
        if read and read.reads_alone:
            layout, windows = read.policy.layout, prepare.prefix_windows(self.config)[-1]
            prefix = ImagePrefix(
                prompt(padded_length(layout, read.texts.before, windows)),
                layout.abstract_images(prompts, windows, self.policy.dtype),
                array(),
                array(),
            )
        batch = Batch(
            prompt=prompt(p),
            last_token=array(),
            next_position=array(),
            images=self.policy.layout.abstract_images(prompts, w, self.policy.dtype),
            shared_length=array(),
            shared_position=array(),
            answers=array(),
            grades=array(self.labels, dtype=jnp.float32),
            weight=array(dtype=jnp.float32),
            judge_prefix=prefix,
        )
        return by_prompts(self.mesh, batch)


def abstract_tables(vocabulary: int, patterns: tuple[str, ...] = ()) -> Tables:
    """Returns reward tables in the sizes that a vocabulary of Qwen's size gives."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def automaton(classes: int, *states: int) -> Automaton:
        return Automaton(
            tuple(array(n, classes) for n in states),
            array(vocabulary + 1),
            tuple(array(n) for n in states),
        )

    one = array(60, 145)
    spans = SpanTables(
        *(one, array(60, 145), array(60, 145), array(2), array(60), array(2)),
        *(array(vocabulary + 1), array(vocabulary + 1), array(vocabulary // 2, 31)),
    )
    replies = {name: automaton(101, 60) for name in QUESTIONS}
    return Tables(automaton(169, 167, 181, *[20] * len(patterns)), replies, spans)


def _candidates(n: int, meanings: int, length: int = 4) -> Candidates:
    return Candidates(
        np.zeros((n, length), np.int32),
        np.full(n, length, np.int32),
        np.arange(n, dtype=np.int32) % meanings,
    )
