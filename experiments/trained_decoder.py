"""A trained Gaussian decoder, as scripts need it: parameters, config, head, and the AR model it belongs to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.heads import named_head
from experiments.trained import TrainedAR, trained_path
from pointillist_jax.configs import DecoderConfig, config_from_json
from pointillist_jax.data.token_store import StoreSpec, read_spec, spec_difference
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel, FlameParams
from pointillist_jax.gaussians import Avatar
from pointillist_jax.reconstruct import decode_avatar
from pointillist_jax.training.checkpoints import load_params, meta_path, newest_step

# The method and its ablations, as `train_decoder --compare` trains them in folders of these names: changes of the
# decoder's config.
VARIANTS = {
    "full": {"inputs": "both", "points": "ar"},
    "ar_only": {"inputs": "ar_only", "points": "ar"},
    "position_only": {"inputs": "position_only", "points": "ar"},
    "flame_vertices": {"inputs": "position_only", "points": "flame_vertices"},
    "mean_colour": {"inputs": "none", "points": "ar"},
}


@dataclasses.dataclass(frozen=True)
class TrainedDecoder:
    """What `experiments.train_decoder` left.

    Attributes:
      workdir: of the training.
      params, config: of the decoder.
      spec: of the token store of its features.
      checkpoint: identifies the AR model of its features.
      head: of the store.
    """

    workdir: str
    params: Any
    config: DecoderConfig
    spec: StoreSpec
    checkpoint: dict[str, Any]
    head: FlameModel

    def check_ar(self, trained: TrainedAR) -> None:
        """Raises UserError unless this is the AR model whose features the decoder was trained on."""
        trained.check_checkpoint(self.checkpoint, "the features the decoder was trained on")
        if difference := spec_difference(trained.spec, self.spec):
            raise UserError(
                f"{trained.workdir} was trained with {difference}, as the decoder: name the AR model it belongs to."
            )

    def avatar(self, canonical: FlameParams, points, binding, hidden=None, context=None) -> Avatar:
        """An avatar of points [P, 3], faces [P], hidden states [P, 4, E] and the AR model's context [S, C].

        What the decoder does not read may be None, and is not looked at. `canonical`: see `decode_avatar`.
        """
        return decode_avatar(
            self.params,
            self.config,
            self.head,
            canonical,
            np.asarray(points),
            np.asarray(binding),
            np.asarray(hidden) if self.config.uses_features and hidden is not None else None,
            context if self.config.cross_attention else None,
        )


def load_decoder(workdir: str | None, flame: str | None = None, *, template: bool = False) -> TrainedDecoder:
    """The newest checkpoint of a run of experiments.train_decoder.

    Args:
      workdir: of `--decoder`; also a file of weights, or "pretrained".
      flame: the user's FLAME file, if the decoder was trained with it.
      template: whether one that was trained on the head's vertices will do.

    Raises:
      UserError: no workdir named, the run of another script, one without clouds, or of a head that --flame is not.
      FileNotFoundError: no checkpoint there.
    """
    if workdir is None:
        raise UserError("--decoder is missing: name the workdir of a training (python -m experiments.train_decoder).")
    path = trained_path(workdir, "decoder")
    params, meta = load_params(path)
    meta, where = meta if isinstance(meta, dict) else {}, meta_path(path, newest_step(path))
    if not isinstance(meta.get("features"), dict) or "tokenizer" not in meta["features"]:
        raise UserError(f"{where} is of no training of the decoder (it names no features): check --decoder.")
    config = meta.get("config")
    config = config_from_json(DecoderConfig, config.get("decoder") if isinstance(config, dict) else None, str(where))
    if config.points == "flame_vertices" and not template:
        raise UserError(f"{workdir} was trained on the head's vertices, an ablation without clouds; name another one.")
    checkpoint = meta["features"].get("checkpoint")
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    spec = read_spec(path, meta["features"])
    head = named_head(spec.flame_source, spec.flame_sha256, workdir, flame)
    return TrainedDecoder(str(path), jax.tree.map(jnp.asarray, params), config, spec, checkpoint, head)
