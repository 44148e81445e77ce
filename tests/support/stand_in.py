"""A server with a stand-in for the policy, for tests of what is around it."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.errors import UserError
from emor3_jax.inference.predictor import Prediction
from emor3_jax.inference.server import Server, Service
from support.serving import serving

FOUND = Prediction(
    label="joy",
    response="<step1> <b>sun</b> </step1> \\boxed{joy}",
    steps=("<b>sun</b>", "one feels glad"),
    complete=True,
    probabilities={"fear": 0.25, "joy": 0.75},
    coherence=0.5,
    consistency=1.0,
)


class StandIn:
    """Predicts without a policy."""

    def __init__(self) -> None:
        self.settings = InferenceSettings().changed(labels="joy,fear")
        tokenizer = SimpleNamespace(encode=lambda text: text.split())
        self.policy = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
        self.asked: list = []

    def predict(self, image: bytes, question: str | None = None) -> Prediction:
        self.asked.append((image, question))
        if image == b"bad":
            raise UserError("cannot decode an image")
        if image == b"bug":
            raise ZeroDivisionError
        return FOUND


@contextlib.contextmanager
def running(service: Service) -> Iterator[Server]:
    with Server(service, port=0) as listening, serving(listening):
        yield listening
