"""The base of every error that a user's input causes."""


class UserError(ValueError):
    """Input that the package cannot use: a config, a file, data, a policy, an image or a mesh.

    Each part of the package derives its own error from this one. The message names the input, its
    value, the rule that it breaks and the way out; it is all that a user needs, so programs print
    it without a traceback (`emor3_jax.runtime.cli`).
    """
