"""A trained autoregressive model, as scripts need it: parameters, config, head, and what identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.heads import named_head
from pointillist_jax.configs import DataConfig, DecoderConfig, ModelConfig, config_from_json
from pointillist_jax.data.token_store import StoreSpec, TokenStore, read_spec, spec_difference
from pointillist_jax.data.windows import split_subjects
from pointillist_jax.files import UserError
from pointillist_jax.flame import FlameModel
from pointillist_jax.models.condition import with_patch_colors
from pointillist_jax.pretrained import weights_file
from pointillist_jax.training.ar import encode
from pointillist_jax.training.checkpoints import load_params, meta_path, newest_step

# What --ar and --decoder say for the weights that this package ships.
PRETRAINED = "pretrained"


@dataclasses.dataclass(frozen=True)
class TrainedAR:
    """What `experiments.train_ar` left.

    Attributes:
      workdir: of the training.
      params: {"transformer": …, "condition": …}, on the device.
      model, data: their parts of the run's config.
      spec: of the token store it was trained on: tokenizer, head, canonical pose, portrait size.
      head: the head of the store.
      checkpoint: JSON that identifies the parameters: step, and a sha256 over all of them.
      encoders: which weights frozen encoders had, or None if the encoders were trained along.
    """

    workdir: Path
    params: Any
    model: ModelConfig
    data: DataConfig
    spec: StoreSpec
    head: FlameModel
    checkpoint: dict[str, Any]
    encoders: dict[str, str] | None = None

    def check_store(self, store: TokenStore) -> None:
        """Raises UserError unless the store was made as the one of the training: same tokens, same head."""
        if difference := spec_difference(store.spec, self.spec):
            raise UserError(f"{store.path} was made with {difference}, as {self.workdir} was trained: name its store.")

    def check_checkpoint(self, wanted: Mapping[str, Any], what: str) -> None:
        """Raises UserError unless these are the parameters that `what` ("the features", …) were made with."""
        if dict(wanted) != self.checkpoint:
            raise UserError(
                f"{what} were made with step {wanted.get('step')} of an AR model (sha256 "
                f"{str(wanted.get('sha256'))[:12]}), not with step {self.checkpoint['step']} of {self.workdir} (sha256 "
                f"{self.checkpoint['sha256'][:12]}): name that model and its step, or extract features anew."
            )

    def held_out(self, store: TokenStore) -> tuple[str, ...]:
        """Those of a store's subjects that the training on it kept back."""
        return split_subjects(store.subjects, min(self.data.held_out, len(store) - 1), self.data.split_seed)[1]


def trained_path(text: str, kind: str) -> Path:
    """Where a trained model lies: what a flag says, or for "pretrained" the weights that this package ships.

    Args:
      kind: "ar" or "decoder".
    """
    return weights_file(kind) if text == PRETRAINED else Path(text)


def load_ar(workdir: str | None, step: int | None = None, flame: str | None = None) -> TrainedAR:
    """Loads what lies in a workdir of `experiments.train_ar`.

    Args:
      workdir: of `--ar`; also a file of weights, or "pretrained".
      step: of the checkpoint; None is the newest.
      flame: the user's FLAME file, if the model was trained with it.

    Raises:
      UserError: no workdir named, or a head that is not the one of the training.
      FileNotFoundError: no such checkpoint.
      FileFormatError: its meta is damaged.
    """
    if workdir is None:
        raise UserError("--ar is missing: name the workdir of a training (python -m experiments.train_ar).")
    workdir = trained_path(workdir, "ar")
    params, meta = load_params(workdir, step)
    step = newest_step(workdir) if step is None else step
    where = str(meta_path(workdir, step))
    meta = meta if isinstance(meta, dict) else {}
    # Only what is used is read: parts of a config that have changed since do not make a model useless.
    config = meta.get("config")
    config = config if isinstance(config, dict) else {}
    model, data = (
        config_from_json(kind, config.get(n), where) for n, kind in (("model", ModelConfig), ("data", DataConfig))
    )
    spec = read_spec(Path(where), meta.get("store") if isinstance(meta.get("store"), dict) else {})
    head = named_head(spec.flame_source, spec.flame_sha256, workdir, flame)
    features = meta.get("features")
    return TrainedAR(
        workdir=workdir,
        params=jax.tree.map(jax.numpy.asarray, params),
        model=model,
        data=data,
        spec=spec,
        head=head,
        checkpoint={"step": step, "sha256": _sha256(params)},
        encoders=features.get("weights") if isinstance(features, dict) else None,
    )


class Contexts:
    """Conditions → contexts, by one program; knows how the model's encoders are to be had."""

    def __init__(
        self,
        trained: TrainedAR,
        store: TokenStore | None = None,
        image_weights: str | None = None,
        point_weights: str | None = None,
    ):
        """Args:
          store: whose people are meant; with frozen encoders its stored features serve, unless weights are given.
          image_weights, point_weights: of frozen encoders, to run them here.

        Raises:
          UserError: frozen encoders without features and without weights; weights for encoders that were trained along.
        """
        if not trained.model.encoder.frozen and (image_weights or point_weights):
            raise UserError(
                f"{trained.workdir} has encoders of its own, trained along: leave --image_weights and --point_weights "
                "out."
            )
        self._trained, self._store = trained, store
        self._features = self._frozen = None
        if trained.model.encoder.frozen and store is not None and not (image_weights or point_weights):
            from pointillist_jax.data.condition_features import feature_kind, open_features
            from pointillist_jax.models.condition import feature_shapes

            self._features = open_features(
                store, feature_kind(trained.model.encoder), feature_shapes(trained.model), trained.encoders
            )
        elif trained.model.encoder.frozen:
            from pointillist_jax.convert import load_frozen_encoders

            encoders = load_frozen_encoders(trained.model, image_weights, point_weights, expected=trained.encoders)
            self._frozen = {"frozen": encoders.params}
        self._encode = jax.jit(
            lambda params, frozen, condition: encode(params, trained.model, trained.head, condition, **frozen)
        )

    def condition(self, name: str) -> dict[str, Any]:
        """What the named person of the store is generated from. Raises UserError without portrait or features."""
        i = self._store.index(name)
        if not self._store.has_portrait[i]:
            raise UserError(f"{name} of {self._store.path} has no portrait; choose others with --subjects.")
        condition = self._store.condition(i)
        return condition if self._features is None else {**condition, "features": self._features[i]}

    def __call__(self, conditions: Sequence[dict[str, Any]]) -> jax.Array:
        """[B, S, D] of B conditions. B decides the program."""
        batch = jax.tree.map(lambda *x: np.stack(x), *conditions)
        return self._encode(self._trained.params, self._frozen or {}, batch)

    def for_decoder(self, config: DecoderConfig, condition: dict[str, Any]) -> jax.Array | None:
        """[S, C] that a decoder of this config reads beside one person's points; None if it reads none."""
        if not config.cross_attention:
            return None
        context = self([condition])
        if config.context_colors:
            context = with_patch_colors(context, jax.numpy.asarray(condition["portrait"])[None], self._trained.model)
        return context[0]


def _sha256(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(array)
    return digest.hexdigest()
