"""The recipes table, and what every scorer owes the engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from layer_inputs import observe, random_inputs

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies import RECIPES, make_scorer, scorer_class, scorers
from vllm_kvcompress.policies import budgets as budgets_package
from vllm_kvcompress.policies.base import NEEDS, LayerScores, Scorer
from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.common_options import CommonOptions, PublishedOption, RecentOption
from vllm_kvcompress.policies.method_options import option_specs, pair_problem
from vllm_kvcompress.policies.options import make_part, options_of
from vllm_kvcompress.policies.recipes import BUDGETS, SCOPES, SCORERS
from vllm_kvcompress.policies.scorer_checks import scorer_problem

NUM_CANDIDATES = 48
OPTIONAL_INPUTS = {
    "window_query": ("window_query",),
    "value": ("value",),
    "output_weight": ("output_weight",),
    "output_root": ("output_root",),
    "rotary": ("rotary",),
    "all_queries": ("observed",),
}
ALIKE = [name for name in SCORERS if scorer_class(name).scope == "head"]
UNLIKE = [name for name in SCORERS if name not in ALIKE]
# Weights of a model of two layers.
TABLE = (3.0, 1.0)


def inputs_for(scorer, **options):
    """Random inputs with what the scorer needs and nothing else."""
    full, query = random_inputs(num_tokens=64, window=4, num_candidates=NUM_CANDIDATES, **options)
    observed = observe(scorer, full, query, (20, 40)) if "all_queries" in scorer.needs else None
    missing = {
        name: None
        for need, names in OPTIONAL_INPUTS.items()
        for name in names
        if need not in scorer.needs
    }
    return dataclasses.replace(full, **{"observed": observed, **missing})


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_scores_every_candidate_with_what_it_asked_for(method, layer):
    scorer = make_scorer(KVCompressConfig(method))
    assert isinstance(scorer, Scorer)
    earlier = [LayerScores(torch.rand(2, NUM_CANDIDATES)) for _ in range(layer)]
    inputs = inputs_for(scorer, layer=layer, earlier_scores=earlier, dtype=torch.bfloat16)
    tensors = {
        name: value.clone() for name, value in vars(inputs).items() if torch.is_tensor(value)
    }
    scores = scorer.score(inputs)
    for part in (scores.first, scores.second):
        if part is None:
            continue
        assert part.shape == (2, NUM_CANDIDATES)
        assert part.dtype == torch.float32
        assert not part.isnan().any()
    # Two stages exactly where the recipe says how large the first is.
    assert (scores.second is not None) == ("first_stage" in option_specs(RECIPES[method]))
    for name, before in tensors.items():
        assert torch.equal(getattr(inputs, name), before), name


@pytest.mark.parametrize("name", SCORERS)
def test_scorer_classes(name):
    scorer = scorer_class(name)
    assert issubclass(scorer, Scorer)
    assert scorer.needs <= set(NEEDS)
    assert ("all_queries" in scorer.needs) == (scorer.observe is not Scorer.observe)
    assert scorer_problem(scorer) is None
    # Every option, and nothing else, is a field of the class.
    assert list(options_of(scorer)) == [f.name for f in dataclasses.fields(scorer)]
    values = {name: object() for name in options_of(scorer)}
    assert vars(make_part(scorer, {**values, "of_another_part": 1})) == values
    with pytest.raises(TypeError):
        scorer(no_such_option=1)


def test_unknown_scorer():
    with pytest.raises(KeyError):
        scorer_class("snapkw")


@pytest.mark.parametrize("name", ALIKE)
def test_scorers_that_score_all_heads_alike(name):
    """Why these scorers' heads cannot compete; the others' scores do differ."""
    scorer = scorer_class(name)()
    scores = scorer.score(inputs_for(scorer)).first
    assert torch.equal(scores, scores[:1].expand_as(scores))


@pytest.mark.parametrize("name", UNLIKE)
def test_scorers_whose_heads_differ(name):
    scorer = scorer_class(name)()
    first = scorer.score(inputs_for(scorer)).first
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_negative_where_the_class_says_so(name):
    scorer = scorer_class(name)()
    scores = scorer.score(inputs_for(scorer)).first
    assert bool((scores < 0).any()) == scorer.signed


@pytest.mark.parametrize("method", RECIPES)
def test_recipe_is_made_of_known_parts(method):
    recipe = RECIPES[method]
    assert recipe.name == method
    assert recipe.scorer in SCORERS
    assert recipe.budgets in BUDGETS
    assert recipe.summary
    assert recipe.paper
    assert pair_problem(recipe.scorer, recipe.budgets) is None
    assert set(recipe.defaults) <= set(option_specs(recipe))
    for text in (recipe.summary, *(spec.help for spec in option_specs(recipe).values())):
        assert text
        assert "\n" not in text
        # argparse expands percent signs in help texts.
        assert "%" not in text


@pytest.mark.parametrize("method", RECIPES)
def test_recipes_agree_with_the_classes_and_repeat_none_of_their_defaults(method):
    for form in (RECIPES[method], RECIPES[method].as_published()):
        scorer = scorer_class(form.scorer)
        own = [options_of(CommonOptions), options_of(PublishedOption), options_of(scorer)]
        own += [options_of(budgets_class(budgets)) for budgets in BUDGETS]
        specs = {name: spec for part in own for name, spec in part.items()}
        for name, value in form.defaults.items():
            assert specs[name].problem(value) is None
            assert specs[name].default != value
        assert type(form.window) is int
        recent = options_of(RecentOption)["recent_tokens"].default
        assert form.window > (recent if scorer.rates_window else 0)


def test_every_file_of_a_scorer_and_of_budgets_is_in_the_manifest():
    for folder, manifest in ((scorers, SCORERS), (budgets_package, BUDGETS)):
        (path,) = folder.__path__
        files = {file.stem for file in Path(path).glob("*.py")} - {"__init__", "base"}
        assert files == {place.partition(":")[0] for place in manifest.values()}


@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("method", RECIPES)
def test_default_options_are_allowed_values(method, budgets):
    recipe = RECIPES[method]
    specs = option_specs(recipe, budgets)
    defaults = {name: spec.default for name, spec in specs.items()}
    given = {"budgets": budgets}
    if budgets == "static":
        # The only option that must be given.
        assert defaults.pop("table") is None
        given["table"] = TABLE
    assert {name: specs[name].problem(value) for name, value in defaults.items()} == dict.fromkeys(
        defaults
    )
    options = tuple(given.items())
    if pair_problem(recipe.scorer, budgets):
        with pytest.raises(KVCompressConfigError, match=repr(budgets)):
            KVCompressConfig(method, options=options)
        return
    config = KVCompressConfig(method, options=options)
    assert dict(config.options) == {**defaults, **given}
    make_scorer(config)


@pytest.mark.parametrize("method", RECIPES)
def test_every_choice_and_bound_of_every_option_is_taken(method):
    for name, spec in option_specs(RECIPES[method]).items():
        if name == "budgets":
            continue
        values = [*(spec.choices or ()), spec.minimum, spec.maximum]
        for value in values:
            if value is None or (spec.kind is int and value != int(value)):
                continue
            value = spec.kind(value)
            config = KVCompressConfig(method, options=((name, value),))
            assert config.option(name) == value
            make_scorer(config)


def test_parts_of_a_recipe_take_options_of_different_names():
    for recipe in RECIPES.values():
        for budgets in BUDGETS:
            names = [
                *options_of(CommonOptions),
                *options_of(scorer_class(recipe.scorer)),
                *options_of(budgets_class(budgets)),
            ]
            if scorer_class(recipe.scorer).rates_window:
                names += options_of(RecentOption)
            if recipe.published is not None:
                names += options_of(PublishedOption)
            assert len(names) == len(set(names))
            assert set(names) == set(option_specs(recipe, budgets))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("kvc", {"score_power": 2, "window_reduce": "max", "group_reduce": "max"}),
        ("span", {"span_kernel": 11, "near_tokens": 8, "granularity": "token", "floor": 0.05}),
        ("defensivekv", {"mass_first": 0.0, "value_norm": True, "alpha": 0.2}),
        ("snapkv", {"pool_kernel": 11, "window_reduce": "max", "granularity": "token"}),
        ("ada-pyramidkv", {"alpha": 0.2, "beta": 2.0, "pool_kernel": 5, "span_kernel": 11}),
        ("criticalkv", {"epsilon": 1e-4, "first_stage": 0.5, "group_reduce": "max"}),
        ("expected-attention", {"num_future": 512, "num_sinks": 4, "covariance": True}),
        ("h2o", {"recent": 0.5, "normalize": False}),
        ("tova", {"span_kernel": 11, "granularity": "token"}),
        ("chunkkv", {"chunk_length": 10, "reuse_layers": 2, "granularity": "token"}),
        ("keydiff", {"granularity": "token"}),
    ],
)
def test_defaults(method, expected):
    config = KVCompressConfig(method)
    assert {name: config.option(name) for name in expected} == expected


_SNAPKV = {
    "pool_kernel": 7,
    "pool_kind": "max",
    "window_reduce": "mean",
    "group_reduce": "mean",
    "score_power": 1,
    "granularity": "token",
}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("snapkv", _SNAPKV),
        ("pyramidkv", {**_SNAPKV, "beta": 20.0}),
        ("ada-snapkv", {**_SNAPKV, "alpha": 0.2}),
        ("ada-pyramidkv", {**_SNAPKV, "alpha": 0.2, "beta": 20.0}),
        ("criticalkv", {**_SNAPKV, "epsilon": 1e-4, "first_stage": 0.5}),
        ("ada-criticalkv", {**_SNAPKV, "epsilon": 1e-4, "first_stage": 0.5, "alpha": 0.2}),
        (
            "kvc",
            {**_SNAPKV, "score_power": 2, "window_reduce": "sum", "group_reduce": "sum"},
        ),
    ],
)
def test_published_forms(method, expected):
    """One option gives the paper's form; what is given beside it still counts."""
    config = KVCompressConfig(method, options=(("published", True),))
    assert {name: config.option(name) for name in expected} == expected
    assert config.window == 32
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    assert config != KVCompressConfig(method)
    mixed = KVCompressConfig(method, window=8, options=(("published", True), ("pool_kernel", 3)))
    assert (mixed.window, mixed.option("pool_kernel")) == (8, 3)
    assert make_scorer(mixed).window_reduce == expected["window_reduce"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool_kind": "avg"}, "'pool_kind' (an option of the paper's form: set 'published' to"),
        (
            {"recent_tokens": 4, "published": True},
            "'recent_tokens' (not an option of the paper's form: leave out 'published')",
        ),
        ({"pool_knid": "avg"}, "'pool_knid' (did you mean 'pool_kind'?)"),
        ({"span_kernal": 5, "published": True}, "'span_kernal' (did you mean 'span_kernel'?)"),
    ],
)
def test_an_option_of_the_other_form_says_so(options, words):
    with pytest.raises(KVCompressConfigError) as error:
        KVCompressConfig("pyramidkv", options=tuple(options.items()))
    assert f"unknown option {words}" in str(error.value)


def test_an_option_of_the_published_form_is_taken_beside_it():
    options = (("pool_kind", "avg"), ("published", True))
    assert KVCompressConfig("pyramidkv", options=options).option("pool_kind") == "avg"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("tova", {"span_kernel": 1, "granularity": "token"}),
        ("chunkkv", {"chunk_length": 10, "reuse_layers": 2, "granularity": "token"}),
        ("defensivekv", {"mass_first": 0.9, "alpha": 0.0, "granularity": "token"}),
        ("layer-defensivekv", {"mass_first": 0.9, "floor": 0.0, "granularity": "token"}),
    ],
)
def test_other_published_forms(method, expected):
    config = KVCompressConfig(method, options=(("published", True),))
    assert {name: config.option(name) for name in expected} == expected
    assert (config.window, KVCompressConfig(method).window) == (32, 16)


@pytest.mark.parametrize("method", ["pyramidkv", "ada-snapkv", "ada-pyramidkv"])
def test_methods_about_budgets_have_the_scores_of_span(method):
    default = KVCompressConfig(method)
    published = KVCompressConfig(method, options=(("published", True),))
    assert (default.recipe.scorer, published.recipe.scorer) == ("span", "snapkv")
    assert (default.window, default.recent_tokens) == (16, 8)
    assert published.recent_tokens == published.window == 32
    assert type(make_scorer(published)) is type(make_scorer(KVCompressConfig("snapkv")))
    span, own = make_scorer(KVCompressConfig("span")), make_scorer(default)
    assert (type(own), vars(own)) == (type(span), vars(span))


def test_every_published_form_differs_and_has_known_options():
    forms = {name: recipe for name, recipe in RECIPES.items() if recipe.published is not None}
    for recipe in forms.values():
        published = recipe.as_published()
        known = {name for budgets in BUDGETS for name in option_specs(recipe, budgets)}
        assert set(published.defaults) <= known
        assert (published.name, published.budgets) == (recipe.name, recipe.budgets)
        own, paper = (
            {name: spec.default for name, spec in option_specs(form).items()}
            for form in (recipe, published)
        )
        assert (published.scorer, published.window, paper) != (recipe.scorer, recipe.window, own)
        assert pair_problem(published.scorer, published.budgets) is None
    for name in RECIPES.keys() - forms.keys():
        assert RECIPES[name].as_published() is RECIPES[name]
        with pytest.raises(KVCompressConfigError, match="unknown option 'published'"):
            KVCompressConfig(name, options=(("published", True),))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("snapkv", {"pool_kernel": 5, "pool_kind": "avg", "group_reduce": "max"}),
        ("snapkv", {"window_reduce": "max", "score_power": 2, "pool_first": False}),
        ("ada-pyramidkv", {"pool_kernel": 1}),
        ("kvc", {"score_power": 1}),
        ("span", {"span_kernel": 9, "near_tokens": 3, "value_norm": False}),
        ("ada-criticalkv", {"epsilon": 0.25, "pool_kernel": 3}),
        ("expected-attention", {"num_future": 3, "num_sinks": 0, "covariance": False}),
        ("h2o", {"recent": 0.25, "normalize": True}),
        ("chunkkv", {"chunk_length": 3, "reuse_layers": 1}),
        ("keydiff", {"span_kernel": 5}),
        ("streamingllm", {"num_sinks": 9}),
        ("random", {"seed": 11}),
    ],
)
def test_options_reach_the_scorer(method, options):
    scorer = make_scorer(KVCompressConfig(method, options=tuple(options.items())))
    assert {name: getattr(scorer, name) for name in options} == options


def test_pairs():
    """Every pair of scorer and budgets that is refused, by the scopes they declare."""
    for scorer, budgets in (("tova", "ada"), ("knorm", "joint")):
        problem = pair_problem(scorer, budgets)
        assert repr(scorer) in problem
        assert repr(budgets) in problem
        assert problem.endswith(f"because {scorer_class(scorer).scope_reason}")
    refused = {
        (scorer, budgets)
        for scorer in SCORERS
        for budgets in BUDGETS
        if pair_problem(scorer, budgets)
    }
    alike = {(scorer, b) for scorer in ("tova", "streamingllm", "chunkkv") for b in BUDGETS}
    compete = {pair for pair in alike if budgets_class(pair[1]).scope != "head"}
    assert refused == compete | {("knorm", "joint")}
    assert {pair[1] for pair in compete} == {"ada", "ada-pyramid", "joint"}
    parts = [*map(scorer_class, SCORERS), *map(budgets_class, BUDGETS)]
    assert {part.scope for part in parts} == set(SCOPES)
