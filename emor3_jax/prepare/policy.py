"""From a config to the policy, and to what of it is trained."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.config import EMBEDDED, ConfigError, base_policy
from emor3_jax.models import LoadedPolicy, Policy, find, load, read_config, read_processor
from emor3_jax.models.lora import Lora, LoraError, init_adapters
from emor3_jax.models.processor import Processor
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import (
    check_policy,
    param_shardings,
)
from emor3_jax.prepare.embedded_policy import embedded_folder
from emor3_jax.prepare.profile import resizes_twice


def load_policy(config: ConfigDict, say: Callable[[str], None], mesh: Mesh) -> LoadedPolicy:
    """Loads the policy onto the mesh, with the config's arithmetic and image sizes.

    Its parameters are in float32; the matrices that adapters stand beside, which never change, are
    in the compute type, to which each use would round them.

    Raises:
      ConfigError: if the image sizes contradict each other, or the attention has no kernel here.
      FileNotFoundError, WeightsError: as `ensure_policy` and `emor3_jax.models.load`.
      MeshError: if the mesh cannot cut the policy.
    """
    folder = ensure_policy(config, say)
    check_policy(mesh, read_config(folder).shapes)
    loaded = load(
        folder,
        matrix_dtype=jnp.dtype(config.policy.dtype) if config.policy.lora_rank else None,
        shardings=lambda shapes: param_shardings(shapes, mesh),
    )
    policy = with_attention(loaded.policy, config, mesh.devices.flat[0].platform)
    return LoadedPolicy(policy, loaded.params, sized(config, loaded.processor), folder)


def read_policy(config: ConfigDict, say: Callable[[str], None]) -> LoadedPolicy:
    """Returns the policy and its processor, without parameters.

    Raises:
      ConfigError: if the image sizes contradict each other.
      FileNotFoundError: as `ensure_policy`.
    """
    folder = ensure_policy(config, say)
    policy = read_config(folder)
    return LoadedPolicy(policy, {}, sized(config, read_processor(folder, policy)), folder)


def sized(config: ConfigDict, processor: Processor) -> Processor:
    """Returns a processor with the config's image sizes, its patches in the compute type.

    In the release's profile the policy's folder decides the last size alone.
    """
    folder = processor.images
    least = config.data.min_pixels or folder.min_pixels
    most = config.data.max_pixels or folder.max_pixels
    if least > most:
        rule = f"is over data.max_pixels={most} (0 takes what the policy's folder says)"
        raise ConfigError("data.min_pixels", least, rule)
    if resizes_twice(config):
        if config.data.min_pixels or config.data.max_pixels:
            processor = processor.with_first_resize(config.data.min_pixels, config.data.max_pixels)
    else:
        processor = processor.with_pixels(least, most)
    processor = processor.with_decode_limit(config.data.max_decoded_pixels)
    return processor.with_dtype(jnp.dtype(config.policy.dtype))


def with_attention(policy: Policy, config: ConfigDict, platform: str) -> Policy:
    """Returns the policy with the config's compute type and attention; raises ConfigError."""
    return policy.with_compute(
        dtype=jnp.dtype(config.policy.dtype),
        attention=attention_backend(config, platform),
        decode_attention=decode_backend(config, platform),
    )


def attention_backend(config: ConfigDict, platform: str) -> str:
    """Returns the back end of the attention, with "auto" replaced by the platform's own.

    Args:
      config: of the run.
      platform: "cpu", "gpu" or "tpu", of the devices that the program is compiled for.

    Raises:
      ConfigError: if a kernel is asked for that the platform does not have.
    """
    chosen = config.policy.attention
    if chosen == "auto":
        cudnn = "cudnn" if config.policy.dtype == "bfloat16" else "xla"
        return {"tpu": "splash", "gpu": cudnn}.get(platform, "xla")
    home = {"splash": "tpu", "cudnn": "gpu"}.get(chosen, platform)
    if home != platform:
        rule = f"is a kernel of platform {home!r}, this is {platform!r}; use 'auto'"
        raise ConfigError("policy.attention", chosen, rule)
    return chosen


def decode_backend(config: ConfigDict, platform: str) -> str:
    """Returns the back end of decoded tokens, with "auto" replaced by the platform's own.

    Args:
      config: of the run.
      platform: "cpu", "gpu" or "tpu", of the devices that the program is compiled for.

    Raises:
      ConfigError: if the TPU's kernel is asked for elsewhere.
    """
    chosen = config.policy.decode_attention
    if chosen == "auto":
        return "ragged" if platform == "tpu" else "xla"
    if chosen == "ragged" and platform != "tpu":
        rule = f"is a kernel of platform 'tpu', this is {platform!r}; use 'auto'"
        raise ConfigError("policy.decode_attention", chosen, rule)
    return chosen


def ensure_policy(config: ConfigDict, say: Callable[[str], None]) -> Path:
    """Returns the policy's folder; trains the embedded base policy if that is asked for and absent.

    Args:
      config: of the run.
      say: announces stages.

    Raises:
      ConfigError: if the embedded policy is there, but of another family.
      FileNotFoundError: if `policy.path` is neither a folder nor a policy on the hub.
    """
    path = config.policy.path
    with hosts.first_goes_first():
        if path == EMBEDDED:
            path = str(embedded_folder(config))
            if not (Path(path) / "config.json").is_file():
                if not hosts.is_first():
                    raise FileNotFoundError(
                        f"{path}: another host has made the base policy; give folders that all "
                        "hosts share, as policy.embedded_folder, data.folder and the workdir"
                    )
                say(f"no base policy in {path} yet: training one, some minutes on 2 cores")
                with hosts.on_own_devices():
                    _train_base_policy(config, Path(path))
            found = read_config(path).family.model_type
            if found != config.policy.embedded_family:
                raise ConfigError(
                    "policy.embedded_family",
                    config.policy.embedded_family,
                    f"{path} holds a policy of family {found!r}: take that, or another "
                    "policy.embedded_folder",
                )
        return find(path)


def _train_base_policy(config: ConfigDict, folder: Path) -> None:
    from emor3_jax.embedded.base_policy import train

    base = base_policy()
    base.data.folder, base.data.size = config.data.folder, config.data.scene_size
    base.compile_cache = config.log.compile_cache
    base.model.family = config.policy.embedded_family
    train(base, folder)


def make_lora(config: ConfigDict, params: dict) -> Lora | None:
    """Returns the base of adapters, or None where the weights themselves are trained."""
    rank = config.policy.lora_rank
    return Lora(params, jnp.float32(config.policy.lora_alpha / rank)) if rank else None


def trained_params(config: ConfigDict, params: dict) -> dict:
    """Returns what training changes: adapters of the config's modules, or the parameters.

    Args:
      config: of the run.
      params: of the policy, or their shapes; returned as they are without adapters.

    Raises:
      ConfigError: if a module does not exist.
    """
    if not config.policy.lora_rank:
        return params
    modules, key = config.policy.lora_modules, jax.random.key(config.seed)
    try:
        return init_adapters(params, modules, config.policy.lora_rank, key)
    except LoraError as error:
        raise ConfigError("policy.lora_modules", modules, str(error)) from error
