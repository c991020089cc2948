"""Our heads tables against published ones: fakes made from a local model's table, and tiny ones by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from families import load_family, random_tokens

from selfrepair.analysis import published
from selfrepair.analysis.comparison import COLUMNS, QUANTITIES, compare_with_published, report, to_markdown
from selfrepair.analysis.head_table import heads_table
from selfrepair.analysis.published import HUB_IDS, published_heads, published_name
from selfrepair.errors import UserError
from selfrepair.measure.heads import MEASUREMENT
from selfrepair.measure.task import described
from selfrepair.measure.tokens import of_prompts
from selfrepair.text.corpora import Prompts

RUN = {"ablations": ["resample"], "fraction": 0.02, "amount": "40 prompts", "dataset": None}
PARTS = [f"self_repair_{part}" for part in ("layernorm", "heads", "mlps")]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The ablated heads of a small model that lies in a folder called ``gpt2``."""
    model = load_family("gpt2", tmp_path_factory.mktemp("gpt2"))
    inputs = {"tokens": of_prompts(Prompts(random_tokens(40).numpy(), "random"))}
    shards = MEASUREMENT.shards({"n_prompts": 40})
    parts = [MEASUREMENT.compute(model, {"ablation": "resample"}, inputs, shard) for shard in shards]
    return xr.concat(parts, "prompt").sortby("prompt").assign_attrs(described(model))


@pytest.fixture(scope="module")
def ours(sweep):
    return heads_table(sweep, 0.02)


def fake(ours, noise=0.0, shift=0.0, seed=0):
    """A published table: ``ours`` with noise, shifted down, heads in another order and no ``self_repair``."""
    table = ours[["model", "layer", "head", *(name for name in QUANTITIES if name != "self_repair")]].assign(
        model="gpt2-small"
    )
    rng = np.random.Generator(np.random.PCG64(seed))
    for name in table.columns[3:]:
        table[name] = table[name] + noise * rng.standard_normal(len(table)) - shift
    return table.sample(frac=1, random_state=seed)


def with_self_repair(table):
    return table.assign(self_repair=table[PARTS].sum(axis=1))


def by_hand(ours, theirs, quantity):
    """Correlation, mean and mean absolute difference, heads inside, with loops over heads and sums alone."""
    pairs = []
    for row in ours.itertuples():
        (other,) = [r for r in theirs.itertuples() if (r.layer, r.head) == (row.layer, row.head)]
        pairs.append(
            (getattr(row, quantity), getattr(other, quantity), row.self_repair_low, row.self_repair_high)
        )
    x, y, low, high = np.array(pairs, dtype=np.float64).T
    n = len(pairs)
    covariance = (x * y).sum() / n - x.sum() / n * y.sum() / n
    variances = [(v * v).sum() / n - (v.sum() / n) ** 2 for v in (x, y)]
    inside = (
        sum(a <= v <= b for a, v, b in zip(low, y, high, strict=True)) / n
        if quantity == "self_repair"
        else math.nan
    )
    return (
        covariance / math.sqrt(variances[0] * variances[1]),
        (x.sum() - y.sum()) / n,
        sum(abs(x - y)) / n,
        inside,
    )


@pytest.mark.parametrize(("noise", "shift"), [(0.05, 0.3), (2.0, -1.0)])
def test_agreement_is_what_loops_over_heads_give(ours, noise, shift):
    theirs = with_self_repair(fake(ours, noise, shift))
    found = compare_with_published(ours, theirs)
    assert (
        found["quantity"].tolist() == list(QUANTITIES)
        and set(found["model"]) == {"gpt2"}
        and set(found["n_heads"]) == {12}
    )
    for row in found.itertuples():
        wanted = by_hand(ours, theirs, row.quantity)
        got = (
            row.correlation,
            row.mean_difference,
            row.mean_absolute_difference,
            row.published_in_our_interval,
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
        assert row.mean_ours == pytest.approx(
            ours[row.quantity].mean()
        ) and row.mean_published == pytest.approx(theirs[row.quantity].mean())
    shifts = {
        row.quantity: (3 if row.quantity == "self_repair" else 1) * shift for row in found.itertuples()
    }  # three parts, each shifted
    spread = found["quantity"].eq("self_repair").map({True: 3**0.5, False: 1}) * noise / 12**0.5
    assert ((found["mean_difference"] - found["quantity"].map(shifts)).abs() < 4 * spread).all()


def test_without_noise_the_tables_agree_wholly(ours):
    found = compare_with_published(ours, with_self_repair(fake(ours)))
    np.testing.assert_allclose(found["correlation"], 1, atol=1e-12)
    differences = found.set_index("quantity")[["mean_difference", "mean_absolute_difference"]]
    assert (differences.drop(index="self_repair") == 0).all(axis=None)
    np.testing.assert_allclose(
        differences.loc["self_repair"], 0, atol=1e-7
    )  # stored in float32; published as a sum of parts
    assert found.set_index("quantity")["published_in_our_interval"].dropna().to_dict() == {"self_repair": 1.0}
    opposite = compare_with_published(
        ours, with_self_repair(fake(ours)).assign(direct_effect=lambda t: -t["direct_effect"])
    )
    assert opposite.set_index("quantity")["correlation"]["direct_effect"] == pytest.approx(-1)


def test_two_heads_by_hand():
    table = pd.DataFrame(
        {"model": "gpt2", "layer": 0, "head": [0, 1], "direct_effect": [1.0, 2.0], "logit_change": [3.0, 3.0]}
    )
    released = pd.DataFrame(
        {
            "model": "gpt2-small",
            "layer": 0,
            "head": [1, 0],
            "direct_effect": [5.0, 0.5],
            "logit_change": [4.0, 1.0],
        }
    )
    found = compare_with_published(table, released).set_index("quantity")
    assert list(found.index) == ["direct_effect", "logit_change"] and list(COLUMNS) == [
        "model",
        "quantity",
        *found.columns[1:],
    ]
    assert found.loc["direct_effect"].tolist()[1:] == [
        "logits",
        2,
        pytest.approx(1),
        1.5,
        2.75,
        -1.25,
        1.75,
        pytest.approx(math.nan, nan_ok=True),
    ]
    assert (
        math.isnan(found.loc["logit_change", "correlation"])
        and found.loc["logit_change", "mean_difference"] == 0.5
    )
    assert "| gpt2  | 2     | r 1.000, -1.250 (2.750) | r undefined, +0.500 (2.500) |" in to_markdown(
        found.reset_index()
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("constant", [0.0, 0.1])
@pytest.mark.parametrize("side", ["ours", "published"])
def test_constant_columns_have_no_correlation_and_no_warning(ours, side, constant):
    tables = {"ours": ours, "published": with_self_repair(fake(ours, 0.1))}
    tables[side] = tables[side].assign(self_repair=constant)
    found = compare_with_published(*tables.values())
    assert found[found["correlation"].isna()]["quantity"].tolist() == ["self_repair"]
    assert "r undefined" in to_markdown(found)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2-small"),
        ("gpt2-small", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("gpt2-medium", "gpt2-medium"),
        ("openai-community/gpt2-medium", "gpt2-medium"),
        ("EleutherAI/pythia-160m", "pythia-160m"),
        ("pythia-160m", "pythia-160m"),
        ("EleutherAI/pythia-410m", "pythia-410m"),
        ("pythia-410m", "pythia-410m"),
        *(
            (other, other)
            for other in (
                "gpt2-large",
                "EleutherAI/pythia-160m-deduped",
                "pythia-160m-v0",
                "else/gpt2",
                "pocket-gpt2",
                "GPT2",
            )
        ),
    ],
)
def test_names(model, name):
    assert published_name(model) == name


def test_names_are_those_of_the_released_tables():
    assert set(published_heads()["model"]) == set(HUB_IDS) > set(published_heads("all_tokens")["model"])


def test_only_models_with_published_numbers_are_compared(ours):
    theirs = with_self_repair(fake(ours))
    both = pd.concat([ours.assign(model="gpt2-large"), ours, ours.assign(model="openai-community/gpt2")])
    assert compare_with_published(both, theirs)["model"].unique().tolist() == [
        "gpt2",
        "openai-community/gpt2",
    ]
    nothing = compare_with_published(ours.assign(model="pocket-gpt2"), theirs)
    assert nothing.empty and list(nothing.columns) == list(COLUMNS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t[t["head"] < 3],
            "gpt2: 9 heads in 3 layers were measured, but the released gpt2-small has 12 heads in 3 layers",
        ),
        (lambda t: t[t["layer"] < 2], "8 heads in 2 layers"),
        (lambda t: t.assign(layer=t["head"], head=t["layer"]), "12 heads in 4 layers"),
        (lambda t: pd.concat([t, t]), "24 heads in 3 layers"),
    ],
)
def test_another_model_of_the_same_name_is_refused(ours, change, said):
    with pytest.raises(UserError, match=said) as error:
        compare_with_published(change(ours), with_self_repair(fake(ours)))
    assert "\n" not in str(error.value)


@pytest.fixture
def run(tmp_path, monkeypatch, sweep):
    """A results folder as notebook 01 leaves it, with fake released tables of both kinds of tokens."""

    def make(fraction=0.02, **released):
        monkeypatch.setattr(published, "PUBLISHED", tmp_path)
        everything = heads_table(sweep, 1).drop(
            columns=[f"clipped_share_{part}" for part in ("layernorm", "heads", "mlps")]
        )
        fake(heads_table(sweep, 0.02), **released).to_csv(
            tmp_path / "published_head_breakdown_top2pct.csv", index=False
        )
        columns = ["model", "layer", "head", "logit_change", "direct_effect", "ablated_direct_effect", *PARTS]
        everything.assign(model="gpt2-small")[columns].to_csv(
            tmp_path / "published_head_breakdown_all_tokens.csv", index=False
        )
        heads_table(sweep, fraction).to_csv(tmp_path / "heads_resample.csv", index=False, float_format="%.6g")
        return tmp_path

    return make


def test_report_of_a_run(run, ours):
    folder = run(noise=0.1, shift=0.25)
    said = report(folder, **RUN)
    theirs = with_self_repair(fake(ours, 0.1, 0.25))
    kept = pd.read_csv(folder / "comparison.csv").set_index("quantity")
    for quantity in QUANTITIES:
        correlation, difference, absolute, inside = by_hand(ours, theirs, quantity)
        wanted = [correlation, ours[quantity].mean(), theirs[quantity].mean(), difference, absolute, inside]
        np.testing.assert_allclose(kept.loc[quantity].tolist()[3:], wanted, atol=3e-5)
    correlation, difference, _, inside = by_hand(ours, theirs, "self_repair")
    mean = theirs["self_repair"].mean()
    assert f"| r {correlation:.3f}, {difference:+.3f} ({mean:.3f}), {inside:.0%} inside |" in said
    assert (
        "40 prompts of the held-out prose" in said
        and "the top 2% of tokens" in said
        and str(folder / "comparison.csv") in said
    )
    assert "No released numbers" not in said and max(map(len, said.splitlines())) < 180


def test_report_takes_the_released_table_of_the_same_tokens(run):
    folder = run(1.0, shift=5.0)
    said = report(folder, **RUN | {"fraction": 1.0, "dataset": "pile"})
    compared = pd.read_csv(folder / "comparison.csv")
    np.testing.assert_allclose(compared["correlation"], 1, atol=1e-6)
    assert compared["mean_absolute_difference"].max() < 1e-4 and "all tokens" in said and "of pile" in said
    assert not compared["quantity"].str.startswith("clipped").any() and "LayerNorm" not in said


def test_report_names_models_without_released_numbers(run):
    folder = run()
    table = pd.read_csv(folder / "heads_resample.csv")
    pd.concat([table, table.assign(model="gpt2-large"), table.assign(model="123")]).to_csv(
        folder / "heads_resample.csv", index=False
    )
    assert "No released numbers: 123, gpt2-large." in report(folder, **RUN).splitlines()
    assert set(pd.read_csv(folder / "comparison.csv")["model"]) == {"gpt2"}
    table.assign(model="123").to_csv(folder / "heads_resample.csv", index=False)
    assert report(folder, **RUN).endswith("this run is of 123.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ablations": ["mean", "zero"]}, "they are of resample ablation, this run is of mean and zero"),
        ({"fraction": 0.05}, "over the top 2% of tokens or all of them, this run is over the top 5%"),
        ({}, "they are of openai-community/gpt2, .*, this run is of pocket-gpt2"),
    ],
)
def test_report_says_in_one_line_why_nothing_is_compared(run, changes, said):
    folder = run()
    report(folder, **RUN)
    assert (folder / "comparison.csv").exists()
    table = pd.read_csv(folder / "heads_resample.csv").assign(model="pocket-gpt2")
    table.to_csv(folder / "heads_resample.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: pytest.fail("wrote a comparison"))
        found = report(folder, **RUN | changes)
    assert (
        pd.Series([found]).str.match(f"No comparison with the released numbers: .*{said}").all()
        and "\n" not in found
    )
    assert not (folder / "comparison.csv").exists()


def test_a_run_without_the_table_of_heads_is_said(tmp_path):
    assert "notebook 01" in report(tmp_path, **RUN)
