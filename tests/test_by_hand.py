"""Notebook 00: it stops at each of the mistakes that it warns of, its controls work, its figures show its
numbers."""

import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES, build_family
from nbclient import NotebookClient
from transformers import PreTrainedTokenizerFast

from selfrepair.paths import MODELS, NOTEBOOKS
from selfrepair.plots.by_hand import change_against_expected, components, idea, split
from selfrepair.run.notebooks import WIDGET
from selfrepair.run.study import Study

NOTEBOOK = NOTEBOOKS / "00_self_repair_by_hand.ipynb"
#: The cell of its last assert about numbers; the mistakes are shown after it.
LAST = "library"
#: By name, what is written instead of what: the cell, the right code, the wrong code.
MISTAKES = {
    "value bias left in the head": [("heads", "z - b_V[layer]", "z")],
    "value bias left in the head and in no bias": [
        ("heads", "z - b_V[layer]", "z"),
        ("heads", "moved if b_O is None else moved + b_O", "0 * moved if b_O is None else b_O"),
    ],
    "scale not frozen in the ablated run": [
        ("split", "all_effects(ablated)", "(x * scale_ratio(ablated) for x in all_effects(ablated))")
    ],
    "scale frozen nowhere": [
        ("split", "all_effects(ablated)", "(x * scale_ratio(ablated) for x in all_effects(ablated))"),
        ("split", 'direct_effect(ablated["ln_final.hook_in"]) + const', "new_logit"),
    ],
    "logits not centred": [("logit", "of_correct - logits[:, :-1].mean(-1)", "of_correct")],
    "neither logits nor directions centred": [
        ("logit", "of_correct - logits[:, :-1].mean(-1)", "of_correct"),
        ("u", " - bridge.W_U.mean(-1)", ""),
    ],
    "logits of the wrong position": [("logit", "logits[:, :-1].gather", "logits[:, 1:].gather")],
    "the token itself for the next token": [("prompts", "tokens[:, 1:]", "tokens[:, :-1]")],
    "the cache edited while it is summed": [("stream", ".clone()", "")],
    "the cache edited by the hook": [("hook", "z = z.clone()", "z = clean[place]")],
}


def code_cells(model="pocket-pythia-small", **parameters):
    """Sources by the cell's id, on the smallest model and few prompts."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    sources = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
    for name, value in {"model": model, "n_prompts": 4, **parameters}.items():
        sources["parameters"] += f"\n{name} = {value!r}"
    return sources


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """Where the prompts are kept."""
    return tmp_path_factory.mktemp("by_hand")


def run_to_the_last_assert(sources, out_dir):
    """Without figures, in this process: which loads the libraries once."""

    def scale_ratio(run):  # what makes of a frozen scale the run's own
        return names["sigma"] / run["ln_final.hook_scale"][:, :-1, 0]

    names = {"scale_ratio": scale_ratio}
    with torch.enable_grad():  # whatever a cell sets is gone again
        for cell, source in sources.items():
            if "style.save(" not in source:
                exec(compile(source, cell, "exec"), names)
            if cell == "parameters":
                names["out_dir"] = out_dir
            if cell == LAST:
                return
    raise ValueError(f"no cell {LAST}")


def test_without_a_mistake_it_runs(out_dir, capsys):
    run_to_the_last_assert(code_cells(), out_dir)
    assert re.search(r"all \d heads of layer 2 agree on 508 tokens", capsys.readouterr().out)


@pytest.mark.slow("notebook 00 holds for every architecture and kind of ablation")
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_it_holds_for_every_architecture(family, tmp_path, capsys):
    model = tmp_path / family
    build_family(family, 4096).save_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2").save_pretrained(model)
    profile = tmp_path / "short.yaml"
    profile.write_text("models: [pocket-gpt2]\nablations: [resample]\nn_prompts: 4\nprompt_len: 16\n")
    ablation = reference.KINDS[ALL_FAMILIES.index(family) % len(reference.KINDS)]
    cells = code_cells(str(model), profile=str(profile), ablation=ablation)
    run_to_the_last_assert(cells, tmp_path / "out")
    assert "all 4 heads of layer 1 agree on 60 tokens" in capsys.readouterr().out


@pytest.mark.slow("every mistake that notebook 00 shows is noticed")
@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_noticed(name, out_dir):
    sources = code_cells()
    for cell, right, wrong in MISTAKES[name]:
        assert sources[cell].count(right) == 1
        sources[cell] = sources[cell].replace(right, wrong)
    with pytest.raises(AssertionError, match="not close"):
        run_to_the_last_assert(sources, out_dir)


@pytest.mark.slow("the controls of notebook 00 change what is shown")
def test_controls_change_the_text_and_the_bars(out_dir):
    """In a kernel, without a browser: what a control does there is to set this value."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    sources = code_cells(out_dir=str(out_dir))
    notebook.cells = [nbformat.v4.new_code_cell(source, id=cell) for cell, source in sources.items()]
    client = NotebookClient(notebook, kernel_name="python3", timeout=None)
    (place,) = (index for index, cell in enumerate(notebook.cells) if cell.id == "widget-shown")

    def shown():
        controls, text, bars = (output["data"] for output in notebook.cells[place].outputs)
        assert WIDGET in controls
        return text["text/html"], bars["image/png"]

    def after(source):
        notebook.cells.append(nbformat.v4.new_code_cell(source))
        client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
        assert notebook.cells[-1].outputs == [], "nothing is shown elsewhere"
        return shown()

    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells[: place + 1]):
            client.execute_cell(cell, index)
        seen = [shown()]
        for change in (
            "head_box.value = (head + 1) % n_heads",
            "layer_box.value = layer + 1",
            "kind_box.value = 'zero'",
            "prompt_box.value = 3",
        ):
            seen.append(after(change))
        back = "head_box.value, layer_box.value, prompt_box.value, kind_box.value = head, layer, 0, kind"
        assert after(back)[0] == seen[0][0]
    for part in (0, 1):
        assert len({shown[part] for shown in seen}) == len(seen)
    assert all("logits" in text and "outline" in text for text, _ in seen)


def test_the_study_of_the_first_model_has_its_settings_alone():
    first = Study.of("paper", seed=3).of_first_model()
    assert (first.profile.models, first.profile.n_prompts, first.seed) == (["gpt2"], 7876, 3)
    assert Study.of("pocket", "pocket-llama").of_first_model().profile.models == ["pocket-llama"]


# --- figures
# -------------------------------------------------------------------------------------------------------


def test_components_stand_in_order_and_sum_to_the_logit():
    rng = np.random.default_rng(0)
    heads, mlps, biases = rng.normal(size=(2, 3)), rng.normal(size=2), rng.normal(size=2)
    logit = 0.5 + heads.sum() + mlps.sum() + biases.sum() - 0.25
    figure = components(heads, mlps, biases, 0.5, -0.25, logit, (1, 2))
    (axis,) = figure.axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axis.patches[:12]}
    in_order = [0.5, *heads[0], biases[0], mlps[0], *heads[1], biases[1], mlps[1], -0.25]
    np.testing.assert_allclose([bars[place] for place in range(12)], in_order)
    running, total = axis.lines[0].get_ydata(), axis.lines[1].get_ydata()
    np.testing.assert_allclose(running, np.cumsum(in_order))
    np.testing.assert_allclose([running[-1], *total], logit)
    (named,) = axis.texts
    assert (named.get_text(), named.xy[0]) == ("L1H2", 8)
    plt.close(figure)


def test_points_lie_at_their_changes_and_lines_to_them_are_self_repair():
    expected, change = np.array([-1.0, 0.5]), np.array([-0.4, 0.7])
    figure = idea(expected, change, [" $cat", "\n"])
    for axis, n in zip(figure.axes, (1, 2), strict=True):
        segments = [line for line in axis.lines if list(line.get_xdata()) == [line.get_xdata()[0]] * 2]
        assert [tuple(line.get_ydata()) for line in segments] == list(
            zip(expected[:n], change[:n], strict=True)
        )
        assert [text.get_text() for text in axis.texts] == ["“$cat”", "“↵”"][:n]
    figure.canvas.draw()
    plt.close(figure)


def test_every_token_is_a_point_and_the_lines_are_where_they_say():
    rng = np.random.default_rng(1)
    expected, change = rng.normal(size=(2, 3, 5))
    top = expected > 1
    figure = change_against_expected(expected, change, top, 0.02)
    (axis,) = figure.axes
    others, judged = (points.get_offsets().data for points in axis.collections)
    np.testing.assert_allclose(others, np.stack([expected[~top], change[~top]], 1))
    np.testing.assert_allclose(judged, np.stack([expected[top], change[top]], 1))
    none, whole = axis.lines
    assert list(none.get_xdata()) == list(none.get_ydata()) and set(whole.get_ydata()) == {0}
    low, high = axis.get_xlim()
    assert low < min(expected.min(), change.min()) and high > max(expected.max(), change.max())
    plt.close(figure)


def test_parts_follow_each_other_to_their_sum():
    parts = {"lost": -1.0, "norm": 0.25, "heads": 0.5, "MLPs": -0.125}
    figure = split({"here": parts, "mean": {name: value / 100 for name, value in parts.items()}})
    for axis, scale in zip(figure.axes, (1, 0.01), strict=True):
        spans = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axis.patches]
        wanted = np.array([(0, -1), (-1, -0.75), (-0.75, -0.25), (-0.25, -0.375), (0, -0.375)])
        np.testing.assert_allclose(spans, scale * wanted, atol=1e-12)
    assert next(text.get_text() for text in figure.axes[0].texts) == "−1.00"
    assert next(text.get_text() for text in figure.axes[1].texts) == "−0.010"
    plt.close(figure)
