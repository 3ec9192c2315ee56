"""Clouds drawn from a trained model with a progress bar: what `generate` and `extract_features` share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.trained import Contexts, TrainedAR
from pointillist_jax.data.token_store import TokenStore
from pointillist_jax.sampling import Generation, Request, generate_many

DEFAULT_MAX_POINTS = 30_000


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How clouds are drawn; part of a card.

    Attributes:
      max_points: of a cloud, a prefix included.
      seed: of all; a person's own key is made of it and of the person's number, so nobody depends on who else is drawn.
      temperature, top_p, top_k, constrain: as `sampling.generate`.
    """

    max_points: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    constrain: bool


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
    settings, slots = dataclasses.asdict(drawing), min(at_once, len(people))
    limit, seed = settings.pop("max_points"), jax.random.PRNGKey(settings.pop("seed"))
    model = trained.params["transformer"], trained.model, trained.spec.tokenizer
    options = {**settings, "slots": slots, "return_hidden": return_hidden, "max_points": limit}
    print("compiling …", flush=True)
    context = contexts([people[0].condition])[0]
    # One more than there are places, so that the program which lets the next one in is compiled too.
    short = [Request(i, context, seed, max_points=1) for i in range(slots + (len(people) > slots))]
    for _ in generate_many(*model, short, **options):
        pass

    requests = (
        Request(i, contexts([p.condition])[0], jax.random.fold_in(seed, p.number), prefix=p.prefix)
        for i, p in enumerate(people)
    )
    bar = tqdm(total=limit * len(people), desc="draw", unit="point")
    at: dict[int, int] = {}
    began: dict[int, float] = {}
    start = last = time.perf_counter()
    paused = 0.0  # While the caller writes what has ended.

    def progress(points: dict[int, int]) -> None:
        nonlocal last
        for i in points:
            began.setdefault(i, last)
        at.update(points)
        last = time.perf_counter() - paused
        bar.set_postfix_str(f"{len(points)} at once", refresh=False)
        bar.update(sum(at.values()) - bar.n)

    for i, cloud in generate_many(*model, requests, progress=progress, **options):
        # Most clouds end before the limit: the time left counts what can still come.
        bar.total -= limit - int(cloud.num_points[0])
        bar.refresh()
        before = time.perf_counter()
        yield people[i], cloud, last - began[i]
        paused += time.perf_counter() - before
    bar.close()
    seconds, total = max(last - start, 1e-9), sum(at.values())
    rates = f"{total / seconds:.0f} points/s, {4 * total / seconds:.0f} tokens/s"
    print(f"{total:,} points of {len(people)} clouds, {slots} at once, in {seconds:.1f} s without compilation: {rates}")
