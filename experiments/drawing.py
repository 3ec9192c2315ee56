"""Clouds drawn from a trained model with a progress bar: what `generate` and `extract_features` share."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.trained import Contexts, TrainedAR
from pointillist_jax.data.token_store import TokenStore
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import output_tables
from pointillist_jax.models.condition import marginal_states
from pointillist_jax.sampling import Generation, Request, generate_many

DEFAULT_MAX_POINTS = 30_000
# Of the histograms that clouds are compared by.
_BARS = 32


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How clouds are drawn; part of a card.

    Attributes:
      max_points: of a cloud, a prefix included.
      seed: of all; a person's own key is made of it and of the person's number, so nobody depends on who else is drawn.
      temperature, top_p, top_k, constrain: as `sampling.generate`.
      candidates: clouds drawn for each person, of whom the one that suits the portrait best is kept (`suitability`).
    """

    max_points: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    constrain: bool
    candidates: int = 1


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody to draw. `condition`: as `Contexts` takes it; `number`: folded into the seed; `prefix`: tokens."""

    name: str
    condition: dict[str, Any]
    number: int
    prefix: np.ndarray | None = None


def define_drawing() -> Callable[[TokenStore | None], Drawing]:
    """Defines the flags of sampling; call at import. The result gives the settings, for people of a store or others."""
    flags.DEFINE_float("temperature", 1.0, "Of the logits; 0 takes the likeliest token.", lower_bound=0)
    # y never falls, so one unlikely leap upwards cuts off everything between: sampling the tail ends clouds early.
    flags.DEFINE_float("top_p", 0.9, "Keep the likeliest tokens of this mass; 1 keeps all.", 0, 1)
    flags.DEFINE_integer("top_k", 0, "Keep so many likeliest tokens; 0 is off.", lower_bound=0)
    flags.DEFINE_integer(
        "max_points",
        0,
        f"Hard limit. 0: half as many again as the store's largest person has; without a store {DEFAULT_MAX_POINTS}.",
        lower_bound=0,
    )
    flags.DEFINE_boolean("constrain", True, "Mask what would break the order of points.")
    flags.DEFINE_integer(
        "candidates", 1, "Draw so many clouds of each person and keep the one that suits the portrait best; for models "
        "trained with model.condition_loss.", lower_bound=1, upper_bound=1000,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)

    def drawing(store: TokenStore | None) -> Drawing:
        values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Drawing)}
        largest = DEFAULT_MAX_POINTS if store is None else int(1.5 * store.num_points.max())
        return Drawing(**values | {"max_points": values["max_points"] or largest})

    return drawing


def draw_clouds(
    trained: TrainedAR,
    people: Sequence[Person],
    contexts: Contexts,
    drawing: Drawing,
    at_once: int,
    return_hidden: bool = False,
) -> Iterator[tuple[Person, Generation, float]]:
    """Draws the people's clouds side by side, and yields (person, cloud, seconds it took) as they end.

    Args:
      at_once: clouds that grow side by side; a place that becomes free is taken by the next person.
      return_hidden: whether clouds come with their hidden states.
    """
    settings = dataclasses.asdict(drawing)
    limit, seed, tries = (
        settings.pop("max_points"),
        jax.random.PRNGKey(settings.pop("seed")),
        settings.pop("candidates"),
    )
    slots = min(at_once, len(people) * tries)
    suits = suitability(trained) if tries > 1 else None
    model = trained.params["transformer"], trained.model, trained.spec.tokenizer
    options = {**settings, "slots": slots, "return_hidden": return_hidden, "max_points": limit}
    print("compiling …", flush=True)
    context = contexts([people[0].condition])[0]
    # One more than there are places, so that the program which lets the next one in is compiled too.
    short = [Request(i, context, seed, max_points=1) for i in range(slots + (len(people) * tries > slots))]
    for _ in generate_many(*model, short, **options):
        pass

    def requests() -> Iterator[Request]:
        for i, p in enumerate(people):
            context, key = contexts([p.condition])[0], jax.random.fold_in(seed, p.number)
            for k in range(tries):
                # The first candidate is what is drawn without others.
                yield Request((i, k), context, jax.random.fold_in(key, k) if k else key, prefix=p.prefix)

    bar = tqdm(total=limit * len(people) * tries, desc="draw", unit="point")
    at: dict[tuple[int, int], int] = {}
    began: dict[int, float] = {}
    ended: dict[int, int] = {}
    best: dict[int, tuple[float, Generation]] = {}
    start = last = time.perf_counter()
    paused = 0.0  # While the caller writes what has ended.

    def progress(points: dict[tuple[int, int], int]) -> None:
        nonlocal last
        for i, _ in points:
            began.setdefault(i, last)
        at.update(points)
        last = time.perf_counter() - paused
        bar.set_postfix_str(f"{len(points)} at once", refresh=False)
        bar.update(sum(at.values()) - bar.n)

    for (i, _), cloud in generate_many(*model, requests(), progress=progress, **options):
        # Most clouds end before the limit: the time left counts what can still come.
        bar.total -= limit - int(cloud.num_points[0])
        bar.refresh()
        before = time.perf_counter()
        suited = 0.0 if suits is None else suits(contexts([people[i].condition]), cloud)
        ended[i] = ended.get(i, 0) + 1
        if i not in best or suited > best[i][0]:
            best[i] = suited, cloud
        if ended[i] == tries:
            yield people[i], best.pop(i)[1], last - began[i]
        paused += time.perf_counter() - before
    bar.close()
    seconds, total = max(last - start, 1e-9), sum(at.values())
    rates = f"{total / seconds:.0f} points/s, {4 * total / seconds:.0f} tokens/s"
    clouds = f"{len(people)} clouds" + (f" × {tries} candidates" if tries > 1 else "")
    print(f"{total:,} points of {clouds}, {slots} at once, in {seconds:.1f} s without compilation: {rates}")


def suitability(trained: TrainedAR) -> Callable[[jax.Array, Generation], float]:
    """How well a cloud suits a context: minus the distance between what it has and what the context tells of it.

    The marginals (`ModelConfig.condition_loss`) say what the portrait alone tells of the whole cloud: how much hair,
    how long. A cloud is written point by point and may miss that, or leap over a part of the head. Compared are coarse
    histograms of x, y, z and of the regions of the head that points are bound to, by their total variation: unlike the
    clouds' likelihood it counts what is missing, too.

    Raises:
      UserError: a model without marginals.
    """
    if "marginals" not in trained.params["condition"]:
        raise UserError(
            "--candidates needs a model that was trained with --config.model.condition_loss, which tells how well a "
            "cloud suits a portrait; leave it out."
        )
    tables = output_tables(trained.params["transformer"], dataclasses.replace(trained.model, loss_support="slot"))
    bins, regions = trained.spec.tokenizer.bins, np.asarray(trained.head.face_regions)
    # Which bar of its histogram a class belongs to.
    bars = [np.arange(bins) * _BARS // bins] * 3 + [regions]

    @jax.jit
    def marginals(context):
        states = marginal_states(trained.params["condition"], context)
        return [jax.nn.softmax((s @ t.rows.T)[0, : t.num_classes]) for s, t in zip(states, tables, strict=True)]

    def closeness(context: jax.Array, cloud: Generation) -> float:
        num = int(cloud.num_points[0])
        if not num:
            return -math.inf
        classes = cloud.tokens[0, 4 : 4 + 4 * num].reshape(-1, 4) - np.array([0, 0, 0, bins])
        total = 0.0
        for told, ids, bar in zip(marginals(context), classes.T, bars, strict=True):
            expected = np.bincount(bar, np.asarray(told)[: len(bar)])
            found = np.bincount(bar[ids], minlength=len(expected)) / num
            total += np.abs(expected / expected.sum() - found).sum() / 2
        return -total / len(bars)

    return closeness
