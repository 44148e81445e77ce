"""Seconds of a training step by phase: a roofline model, an estimate and no measurement.

A phase takes as long as the longest of three: its FLOPs by the peak of the chips, its bytes by the
bandwidth of their memory, and the bytes of weights and gradients that it receives by that of their
links; each bandwidth times the share of it that is reached. Sums over `tensor` come on top: a layer
waits for them. What is assumed stands in `Assumptions`; the figures of chips in `CHIPS`.

Left out, numbered:
 1. The host: reading images, dispatch, logs; they run beside the devices.
 2. Evaluation, checkpoints and compiling.
 3. Rewards, advantages, norms and activations' own traffic, which `flops_share` stands for.
 4. Waits between hosts, and the slower network between slices.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

from emor3_jax.errors import UserError
from emor3_jax.flops.cost import Cost
from emor3_jax.flops.step import StepShapes
from emor3_jax.models.family import Shapes

_GIGA = 10**9


class ChipSpeed(NamedTuple):
    """One jax device, by the pages of its makers.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes a second of HBM.
      links: bytes a second that it receives over all links to its neighbours, half of what is
        given for both directions.
    """

    flops: float
    memory: float
    links: float


CHIPS = {
    "v4": ChipSpeed(275e12, 1228 * _GIGA, 150 * _GIGA),
    "v5e": ChipSpeed(197e12, 819 * _GIGA, 100 * _GIGA),
    "v5p": ChipSpeed(459e12, 2765 * _GIGA, 300 * _GIGA),
    "v6e": ChipSpeed(918e12, 1640 * _GIGA, 224 * _GIGA),
    "tpu7x": ChipSpeed(2307e12 / 2, 3690 * _GIGA, 300 * _GIGA),
    "a100": ChipSpeed(312e12, 2039 * _GIGA, 300 * _GIGA),
    "h100": ChipSpeed(989e12, 3352 * _GIGA, 450 * _GIGA),
    "h200": ChipSpeed(989e12, 4800 * _GIGA, 450 * _GIGA),
}
"""Kind of a topology (`parallel.topology`) → its speed."""


class Lengths(NamedTuple):
    """How long responses are: log-normal, cut at `longest`.

    Attributes:
      mean: of the distribution before it is cut.
      cut: share of the responses that reach `most`.
      most: tokens.
      limit: tokens at which a run cuts responses, `rollout.max_tokens`; 0 for `most`.
    """

    mean: float = 265.0
    cut: float = 0.01
    most: int = 2048
    limit: int = 0

    @property
    def longest(self) -> int:
        """Tokens at which responses are cut."""
        return self.limit or self.most

    def quantiles(self, count: int = 4096) -> list[float]:
        """Returns the middles of `count` equally likely parts, rising.

        Raises:
          ValueError: if no log-normal distribution has this mean and this cut.
        """
        # log(mean) = mu + sigma²/2 and log(most) = mu + z sigma give a square equation of sigma.
        if not _LEAST_CUT <= self.cut < 0.5:
            raise ValueError(f"cut={self.cut:g}: must lie in [{_LEAST_CUT:g}, 0.5)")
        z = NormalDist().inv_cdf(1 - self.cut)
        inner = z**2 - 2 * math.log(self.most / self.mean)
        if inner < 0 or self.mean >= self.most:
            least = self.most * math.exp(-(z**2) / 2)
            raise ValueError(
                f"mean={self.mean:g}, cut={self.cut:g}, most={self.most}: of a log-normal "
                f"distribution with this cut the mean must lie in [{least:.0f}, {self.most})"
            )
        sigma = z - math.sqrt(inner)
        mu = math.log(self.most) - z * sigma
        normal = NormalDist(mu, sigma)
        middles = (normal.inv_cdf((i + 0.5) / count) for i in range(count))
        return [min(math.exp(x), float(self.longest)) for x in middles]

    @property
    def average(self) -> float:
        """Mean tokens of a response, once cut."""
        found = self.quantiles()
        return sum(found) / len(found)

    @property
    def age(self) -> float:
        """Mean tokens behind a token of a response: what it attends to, beside the prompt."""
        found = self.quantiles()
        return sum(x * (x + 1) / 2 for x in found) / sum(found)


_LEAST_CUT = 1e-9
_LENGTHS = ("mean", "cut", "most")
"""Fields of `Lengths` that are assumed; `limit` is of the config."""


class Assumptions(NamedTuple):
    """What the model assumes; `REASONS` says why.

    Attributes:
      prompt_tokens: of a prompt, its image included.
      lengths: of responses.
      padding: real over padded tokens, of prompts, images and responses.
      lanes: share of the decoded lanes that belong to a response, over a step.
      fill: the same while responses wait.
      tail: share of the longest response that is decoded after no response waits any more.
      places: places of the KV cache that are read, over those that are needed.
      chunk: tokens of a device whose logits exist at once.
      flops_share, memory_share, links_share: of the peak that is reached.
      latency: seconds of a collective of a few numbers, in decoding with `tensor`.
    """

    prompt_tokens: int = 1024
    lengths: Lengths = Lengths()
    padding: float = 0.8
    lanes: float = 0.77
    fill: float = 0.97
    tail: float = 1.0
    places: float = 1.31
    chunk: int = 1024
    flops_share: float = 0.5
    memory_share: float = 0.7
    links_share: float = 0.7
    latency: float = 5e-6

    def changed(self, text: str) -> "Assumptions":
        """Returns other assumptions, of a text such as "padding=0.13,lanes=0.38".

        Raises:
          AssumptionError: for a field that is not there or is given twice, or no positive number.
        """
        new, given = self, []
        for pair in filter(None, text.split(",")):
            field, _, value = pair.partition("=")
            if field in given:
                raise AssumptionError(f"assume={text!r}: {field} is given twice; give it once")
            given.append(field)
            inner = new.lengths if field in _LENGTHS else new._replace(lengths=None)
            try:
                number = type(getattr(inner, field))(float(value))
            except (AttributeError, TypeError, ValueError, OverflowError):
                number = 0
            most = 1 if field in _SHARES else _MOST
            if not 1 / _MOST <= number <= most:
                known = [*(x for x in self._fields if x != "lengths"), *_LENGTHS]
                raise AssumptionError(
                    f"assume={pair!r}: must be a positive number of {', '.join(known)}, as in "
                    f"padding=0.7, {1 / _MOST:g} to {_MOST:g}; {', '.join(_SHARES)} are at most 1"
                )
            changed = inner._replace(**{field: number})
            if field in _LENGTHS:
                new = new._replace(lengths=changed)
            else:
                new = changed._replace(lengths=new.lengths)
        try:
            new.lengths.quantiles(1)
        except ValueError as error:
            raise AssumptionError(f"assume={text!r}: {error}") from error
        return new


_MOST = 1e9
"""Numbers from 1 / _MOST to _MOST are assumed, so that no estimate overflows."""

_SHARES = ("padding", "lanes", "fill", "flops_share", "memory_share", "links_share")
"""Assumptions that are shares of a whole."""


class AssumptionError(UserError):
    """An assumption that there is not, or that cannot be."""


REASONS = {
    "prompt_tokens": (
        "an image of about 670,000 pixels (Qwen3-VL: 870,000); the release has 262,144 to 1.5 "
        "million"
    ),
    "lengths": "placeholder, no run of the 3B has been measured",
    "padding": "python -m benchmarks.simulate, responses on a v5e-64",
    "lanes": "python -m benchmarks.simulate on a v5e-64, the least of the slices there",
    "fill": "python -m benchmarks.simulate on one device, where there is hardly a tail",
    "tail": "a little more than in python -m benchmarks.simulate, where it is 0.8 to 1.2",
    "places": "python -m benchmarks.simulate on a v5e-64",
    "chunk": "log-probabilities are computed so many tokens of a device at once",
    "flops_share": "not measured; large products alone reach more",
    "memory_share": "not measured",
    "links_share": "not measured",
    "latency": "not measured",
}
"""Field of `Assumptions` → where its value comes from."""


class Machine(NamedTuple):
    """The devices and how a step lies on them.

    Attributes:
      chip: of each device.
      devices: that share the step.
      tensor: mesh.tensor.
      fsdp: mesh.fsdp.
      slots: prompts in flight.
      lanes: responses in flight.
      refill: prompts that are prefilled and judged at once.
      micro_batches: of all updates of a step.
      updates: optimizer steps.
      int8: the layers of the decoder are quantised while responses are sampled and judged.
    """

    chip: ChipSpeed
    devices: int
    tensor: int
    fsdp: int
    slots: int
    lanes: int
    refill: int
    micro_batches: int
    updates: int
    int8: bool = False

    @property
    def parts(self) -> int:
        """Number of parts that the mesh cuts a batch into."""
        return self.devices // self.tensor


class Phase(NamedTuple):
    """Seconds of a phase by each bound.

    Attributes:
      flops, memory, links: seconds that each takes alone; weights are gathered and gradients
        scattered (`links`) during the products of other layers.
      sums: seconds of the sums over `tensor`, and of the logits that it gathers, for which layers
        and tokens wait.
    """

    flops: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    sums: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the phase: the longest of the three that run at once, then the sums."""
        return max(self[:3]) + self.sums

    @property
    def bound(self) -> str:
        """Name of the longest of the four: "flops", "memory", "links" or "sums"."""
        return self._fields[self.index(max(self))]


class Moved(NamedTuple):
    """Bytes that a device receives in all calls of a program of a step.

    Attributes:
      gathered: of weights and gradients, while the device computes.
      summed: of sums over `tensor`; of compiled programs, of all sums, also those of gradients over
        `data`, which their text does not tell apart.
    """

    gathered: float = 0.0
    summed: float = 0.0


def phase_seconds(
    policy: Shapes,
    step: StepShapes,
    costs: Mapping[str, Cost],
    machine: Machine,
    assumed: Assumptions,
    parameters: int,
    moved: Mapping[str, Moved] | None = None,
) -> dict[str, Phase]:
    """Returns phase → seconds of a step.

    Args:
      policy: its shapes.
      step: shapes of the step at the mean lengths.
      costs: of its phases (`phase_costs`).
      machine: the devices.
      assumed: the assumptions.
      parameters: of the policy, all.
      moved: program → what a device receives, of compiled programs; that of others is counted from
        shapes.
    """
    chip, tensor, fsdp = machine.chip, machine.tensor, machine.fsdp
    flop_rate = chip.flops * assumed.flops_share * machine.devices
    byte_rate, link_rate = chip.memory * assumed.memory_share, chip.links * assumed.links_share
    # bfloat16, whole but for tensor.
    weights = 2 * parameters / tensor
    # As the rollout reads them.
    decoding = weights - machine.int8 * layer_weights(policy) / tensor
    # The share of a gathered weight that other devices have.
    away = (fsdp - 1) / fsdp

    def products(*names: str) -> float:
        padded = sum(costs[name].executed for name in names if name in costs)
        return padded / assumed.padding / flop_rate

    def received(name: str, gathered: float, summed: float = 0.0) -> dict[str, float]:
        found = (moved or {}).get(name, Moved(gathered, summed))
        return {"links": found.gathered / link_rate, "sums": found.summed / link_rate}

    def summed(tokens: float, passes: int, reader: Shapes = policy) -> float:
        """Bytes of the two sums of activations over `tensor` in each layer and pass."""
        each = 2 * 2 * reader.num_layers * reader.hidden_size * tokens / assumed.padding
        return 2 * (tensor - 1) / tensor * passes * each / machine.parts

    waves = step.prompts // machine.refill
    read = step.prompts * step.prompt_tokens
    written = step.prompts * step.responses * step.response_tokens
    every = parameters / (fsdp * tensor)
    found = {
        # The float32 weights are read, gathered ones of two bytes or one are written.
        "weight sync": Phase(
            memory=(4 * every + decoding) / byte_rate,
            **received("weight_sync", away * decoding),
        ),
        "vision and prefill": Phase(
            products("vision", "prefill"),
            waves * decoding / byte_rate,
            **received("prefill", 0.0, summed(read, 1)),
        ),
        "decode": _decode(policy, step, costs["decode"], machine, assumed, decoding),
    }
    asked = decoding
    if "judge" in costs:
        # Its weights are kept in bfloat16, and gathered anew for each step.
        asked = 2 * step.judge.parameters / tensor
        tokens = step.prompts * step.judge.tokens
        synced = received("judge.weight_sync", away * asked)
        read_by_it = received("judge.prefill", 0.0, summed(tokens, 1, step.judge.policy))
        found["judge"] = Phase(
            products("judge"),
            (waves + 1 + 1 / fsdp) * asked / byte_rate,
            **{name: synced[name] + read_by_it[name] for name in synced},
        )
    for name, question in step.questions.items():
        # The question is read once a wave; each further token of its reply reads all weights again.
        reads = waves * (question.reply if question.replies == 1 else 1)
        tokens = question.head * question.with_image + question.text + question.tail
        reader = step.judge.policy if "judge" in costs else policy
        sums = summed(step.prompts * step.responses * tokens, 1, reader)
        found[name] = Phase(products(name), reads * asked / byte_rate, **received(name, 0.0, sums))
    # Layers are gathered in bfloat16 for each micro-batch: forward, and in an update backward too,
    # from where float32 gradients are scattered.
    rounds = machine.micro_batches
    gathers = rounds * away * weights
    chunks = written / assumed.padding / machine.parts / assumed.chunk
    head = 4 * policy.vocab_size * policy.hidden_size / tensor
    for name in ("old", "reference"):
        if costs[name].flops:
            found[name] = Phase(
                products(name),
                rounds * weights / byte_rate,
                **received(name, gathers, summed(read + written, 1)),
            )
    # Weights, gradient and two moments of AdamW: read and written.
    adam = machine.updates * 2 * 4 * 4 * every
    found["update"] = Phase(
        products("update"),
        # Each chunk of logits adds to the head's gradient.
        (rounds * 2 * weights + chunks * 2 * head + adam) / byte_rate,
        **received("update", 2 * gathers + 2 * gathers, summed(read + written, 3)),
    )
    return found


def layer_weights(policy: Shapes) -> int:
    """Returns the number of weights in the matrices of the decoder's layers."""
    heads = 2 * (policy.num_heads + policy.num_kv_heads) * policy.head_dim
    return policy.num_layers * policy.hidden_size * (heads + 3 * policy.intermediate_size)


def _decode(
    policy: Shapes,
    step: StepShapes,
    cost: Cost,
    machine: Machine,
    assumed: Assumptions,
    weights: float,
) -> Phase:
    """Returns the seconds of decoding: rounds of all lanes, each of which reads all weights."""
    chip = machine.chip
    tokens = step.prompts * step.responses * step.response_tokens
    # All lanes are busy until no response waits; then the longest one goes on to its end.
    rounds = tokens / (machine.lanes * assumed.fill) + assumed.tail * assumed.lengths.longest
    # Devices that share a head each have a copy of it (`parallel.mesh.share_heads`).
    heads = policy.num_kv_heads / math.gcd(policy.num_kv_heads, machine.tensor)
    token = 2 * 2 * policy.num_layers * heads * policy.head_dim
    # Of a device: the prompts of its slots in every round, and what its responses have written.
    prompts = machine.slots / machine.parts * step.prompt_tokens / assumed.padding
    own = tokens / machine.parts * assumed.lengths.age * assumed.places
    read = rounds * (weights + prompts * token) + own * token
    # A round sums two rows of bfloat16 features in each layer, and gathers float32 logits.
    each = 2 * 2 * 2 * policy.num_layers * policy.hidden_size + 4 * policy.vocab_size
    received = machine.lanes / machine.parts * each * (machine.tensor - 1) / machine.tensor
    waits = 2 * policy.num_layers * assumed.latency * (machine.tensor > 1)
    return Phase(
        cost.executed / assumed.lanes / (chip.flops * assumed.flops_share * machine.devices),
        read / (chip.memory * assumed.memory_share),
        sums=rounds * (received / (chip.links * assumed.links_share) + waits),
    )
