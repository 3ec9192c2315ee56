"""Of several clouds the one that suits the portrait is kept."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.drawing import Drawing, Person, draw_clouds, suitability
from experiments.trained import Contexts, load_ar
from pointillist_jax.files import UserError
from pointillist_jax.models.ar import output_tables
from pointillist_jax.models.condition import marginal_states
from tests.experiments.small_ar import CONFIG, write_ar, write_people

DRAWING = Drawing(max_points=12, seed=3, temperature=1.0, top_p=1.0, top_k=0, constrain=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawing")
    store = write_people(root / "store", 3)
    write_ar(
        root / "ar", store, dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, condition_loss=1.0))
    )
    write_ar(root / "plain", store)
    return load_ar(str(root / "ar")), load_ar(str(root / "plain")), store


def clouds(trained, store, drawing, names=("p0", "p1")) -> dict[str, np.ndarray]:
    contexts = Contexts(trained, store)
    people = [Person(name, contexts.condition(name), store.index(name)) for name in names]
    return {person.name: cloud for person, cloud, _ in draw_clouds(trained, people, contexts, drawing, 2)}


def test_the_best_candidate_is_kept_and_the_first_is_the_one_drawn_alone(trained):
    model, _, store = trained
    contexts, suits = Contexts(model, store), suitability(model)
    alone = clouds(model, store, DRAWING)
    best = clouds(model, store, dataclasses.replace(DRAWING, candidates=4))
    for name, cloud in best.items():
        context = contexts([contexts.condition(name)])
        assert suits(context, cloud) >= suits(context, alone[name])
    same = clouds(model, store, dataclasses.replace(DRAWING, candidates=1))
    for name in alone:
        np.testing.assert_array_equal(same[name].tokens, alone[name].tokens)
    assert any(not np.array_equal(best[name].tokens, alone[name].tokens) for name in best)


def test_a_cloud_like_the_marginals_suits_better_than_one_that_leaves_a_part_out(trained, rng):
    model, _, store = trained
    contexts, suits = Contexts(model, store), suitability(model)
    context = contexts([contexts.condition("p0")])
    tables = output_tables(model.params["transformer"], model.model)
    states = marginal_states(model.params["condition"], context)
    told = [np.asarray(jax.nn.softmax((s @ t.rows.T)[0, : t.num_classes])) for s, t in zip(states, tables, strict=True)]
    bins = model.spec.tokenizer.bins
    told[0] = told[0][:bins] / told[0][:bins].sum()
    cloud = next(iter(clouds(model, store, DRAWING, ["p0"]).values()))

    def of(classes: np.ndarray):
        tokens = np.zeros((1, 4 + 4 * len(classes)), np.int32)
        tokens[0, 4:] = (classes + np.array([0, 0, 0, bins])).reshape(-1)
        return dataclasses.replace(cloud, tokens=tokens, num_points=np.array([len(classes)]))

    drawn = np.stack([rng.choice(len(p), 4000, p=p / p.sum()) for p in told], axis=1)
    whole, half = suits(context, of(drawn)), suits(context, of(drawn[drawn[:, 1] < bins // 2]))
    assert -0.05 < whole <= 0
    assert half < whole - 0.05
    assert suits(context, of(drawn[:0])) == -np.inf


def test_without_marginals_there_is_nothing_to_choose_by(trained):
    _, plain, store = trained
    with pytest.raises(UserError, match="--candidates needs a model"):
        clouds(plain, store, dataclasses.replace(DRAWING, candidates=2))
