"""Serves a policy on this machine: a page to drop a photograph on, and OpenAI's chat completions.

    emor3 serve POLICY [--port=8000] [--labels=mikels8]

POLICY is as of `emor3 infer`, and so are the flags of what is asked. The page shows the steps, the
emotion, probabilities and both reflections. `http://localhost:8000/v1` is the base URL for clients
of OpenAI's API and for harnesses: the model `emor3` answers messages as they are, `emor3-set` asks
about the image as in training. It listens on this machine alone, unless `--host` says otherwise.
"""

import contextlib
import logging
import sys
from collections.abc import Sequence

from absl import app, flags

from emor3_jax import infer
from emor3_jax.errors import UserError
from emor3_jax.inference.server import Server, Service
from emor3_jax.io.console import tell
from emor3_jax.parallel.devices import expected_platform, find_devices
from emor3_jax.parallel.flags import set_flags
from emor3_jax.runtime import cli

FLAGS = flags.FLAGS


def main(arguments: Sequence[str]) -> None:
    """Runs the program until it is interrupted."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    # In the place of absl's handler.
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("emor3_jax").setLevel(logging.WARNING)
    logging.getLogger("emor3_jax.inference.server").setLevel(logging.INFO)
    set_flags(expected_platform())
    with cli.errors_told():
        names = [name for name in (FLAGS.policy, *arguments[1:]) if name]
        if len(names) != 1:
            raise UserError("give one policy: emor3 serve POLICY")
        tell(find_devices())
        predictor = infer.load(
            names[0], **infer.asked_changes(FLAGS), options=infer.options_of(FLAGS)
        )
        server = Server(Service(predictor, names[0], fetch=FLAGS.fetch), FLAGS.host, FLAGS.port)
        print(f"{names[0]} at {server.address}, for clients of OpenAI's API at", end=" ")
        print(f"{server.address}/v1; Ctrl-C ends it", flush=True)
        if not server.is_local:
            tell("whoever reaches this port can use the policy: there are no accounts")
        with server, contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    infer.define_flags()
    flags.DEFINE_string("host", "127.0.0.1", "To listen on; 0.0.0.0 is all of the network.")
    flags.DEFINE_integer("port", 8000, "0 takes any that is free.", lower_bound=0)
    flags.DEFINE_boolean(
        "fetch", False, "Fetch images by address, also from this machine's own network."
    )
    app.run(main, flags_parser=cli.parse_flags)
