"""Benchmarks run, write their own section only, and count what they say. No test asserts a time."""

import importlib
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.fast import FirstMaps, fast_path
from selfrepair.engine.forward import Replay, run_clean
from selfrepair.engine.head_ablation import ablate_heads
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
engine, machine, operations, precision, report, scaling, shapes = (
    importlib.import_module(name)
    for name in ("engine", "machine", "operations", "precision", "report", "scaling", "shapes")
)
CPU = torch.device("cpu")
OTHER = "<!-- begin Other -->\n## Other\n\nkept \\1\n<!-- end Other -->\n"


def run_script(script, results, *arguments):
    """The section that the script wrote into ``results``, which held another one."""
    results.write_text(report.TITLE + "\n" + OTHER)
    command = [
        sys.executable,
        str(BENCHMARKS / script),
        "--results",
        str(results),
        "--threads",
        "1",
        "--device",
        "cpu",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    assert text.startswith(report.TITLE) and OTHER in text
    section = text.partition(OTHER)[2]
    assert section.strip() and f"benchmarks/{script}" in section and torch.__version__ in section
    return section


def rows_of(section, header):
    """Rows of cells of the table whose header begins with ``header``."""
    lines = section[section.index(f"| {header}") :].split("\n\n")[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")
    ]


@pytest.mark.slow("the benchmark of the engine runs")
def test_engine(tmp_path):
    arguments = (
        "--shape",
        "tiny-pythia",
        "--prompts",
        "2",
        "--prompt-len",
        "8",
        "--heads-timed",
        "2",
        "--repetitions",
        "1",
    )
    section = run_script("engine.py", tmp_path / "R.md", *arguments, "--sweep-prompts", "2")
    assert "## Engine: tiny-pythia, float32, cpu" in section
    assert "Sweep of all heads on 2 prompts × 8 = 16 tokens" in section
    ways = rows_of(section, "way")
    assert [row[0] for row in ways[:2]] == ["engine, fast path", "engine, plain path"] and len(ways) == 4
    ways = [row[0] for row in rows_of(section, "speed")]
    assert len(ways) == 2 and "64 rows" in ways[0]  # 4 heads × 2 prompts × 8 positions at once
    assert int(rows_of(section, "memory")[0][1]) > 100
    assert len(rows_of(section, "difference from the fast path")) == 4 + 3


@pytest.mark.slow("the benchmark of scaling runs")
def test_scaling(tmp_path):
    arguments = (
        "--shape",
        "tiny-gpt2",
        "--prompt-len",
        "8",
        "--prompts",
        "2",
        "4",
        "--heads",
        "2",
        "4",
        "--layers",
        "2",
        "3",
    )
    section = run_script(
        "scaling.py", tmp_path / "R.md", *arguments, "--sweep-prompts", "2", "4", "--repetitions", "1"
    )
    assert "## Scaling: tiny-gpt2, float32, cpu" in section
    memory = rows_of(section, "prompts of a sweep")
    assert [row[0] for row in memory] == ["2", "4"] and memory[0][4] == "1.000"
    assert all(int(row[3]) >= int(row[2]) > 100 for row in memory)
    assert [row[0] for row in rows_of(section, "layers above")] == ["0", "1"]
    for what, sizes in (("prompts |", ["2", "4"]), ("heads in", ["2", "4"]), ("layers |", ["2", "3"])):
        rows = rows_of(section, what)
        assert [row[0] for row in rows] == sizes and float(rows[1][4]) > 1


@pytest.mark.slow("the benchmark of precision runs")
def test_precision(tmp_path):
    arguments = ("--models", "pocket-pythia-small", "--prompts", "2", "--prompt-len", "16")
    section = run_script("precision.py", tmp_path / "R.md", *arguments)
    assert "## Precision: pocket-pythia-small, cpu" in section
    means, by_layer = (
        rows_of(part, "root mean square") for part in section.split("Error over all heads and tokens")
    )
    found = {
        row[0]: [float(cell.split(" / ")[0]) for cell in row[1:] if cell]
        for row in means
        if "not available" not in row[1]
    }
    assert list(found) == [
        "float64: size of the means",
        "float32",
        precision.LOW_RANK,
        "bfloat16",
        "float16",
        precision.ROUNDED,
    ]
    assert [row[0] for row in means if "not available on this device" in row[1]] == ["tf32"]
    for name, low, high in (
        ("float32", 1e-8, 1e-5),
        ("float16", 1e-5, 1e-2),
        ("bfloat16", 1e-4, 1e-1),
        (precision.ROUNDED, 1e-4, 1e-1),
    ):
        assert low < found[name][0] < high, name
    assert [row[0] for row in by_layer[:4]] == [f"float32: layer {layer}" for layer in range(4)]
    assert by_layer[3][3] == by_layer[3][4] == "–"  # nothing is above the last layer of a parallel model


def test_a_section_replaces_only_itself(tmp_path):
    path = tmp_path / "R.md"
    for name, text in (("A", "first"), ("A, longer", r"other \g<0>"), ("A", r"second \1"), ("B", "last")):
        report.write_section(path, name, text)
    parts = [report.TITLE]
    parts += [
        f"<!-- begin {n} -->\n## {n}\n\n{t}\n<!-- end {n} -->\n"
        for n, t in (("A", r"second \1"), ("A, longer", r"other \g<0>"), ("B", "last"))
    ]
    assert path.read_text() == "\n".join(parts)


FIRST_MAPS = {
    "tiny-gpt2": [(64, 256)],
    "tiny-llama": [(64, 172), (64, 172)],
    "tiny-pythia": [(64, 192), (64, 256)],
}


def counted(work):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FIRST_MAPS)
def test_needed_operations_are_those_of_running_every_part_by_itself(name):
    model = shapes.make_model(name, shapes.SHAPES[name], CPU, torch.float64)
    tokens = torch.randint(256, (4, 16))
    replay, residual = Replay(model, 16), torch.zeros(4, 16, 64, dtype=torch.float64)
    z, u = torch.zeros(64, 16, dtype=torch.float64), torch.zeros(60, 64, dtype=torch.float64)

    def whole(layers):
        run_clean(model, tokens)
        for layer in layers:
            for head in range(4):
                if not model.parallel:
                    replay.block_given_attention(layer, residual, residual)
                for above in range(layer + 1, model.n_layers):
                    replay.block(above, residual)
                z @ model.W_O(layer)[head]
                u @ model.W_O(layer)[head].T

    for layers in (range(2), range(1, 2)):
        full = counted(lambda layers=layers: whole(layers))
        assert operations.needed_flops(model, 4, 16, layers, low_rank=False) == full
        ablations = 4 * sum(not (model.parallel and layer == 1) for layer in layers)
        maps = [torch.zeros(shape, dtype=torch.float64) for shape in FIRST_MAPS[name]]
        dense = counted(lambda maps=maps: [residual.flatten(0, 1) @ weight for weight in maps])
        low = counted(lambda maps=maps: [z @ (model.W_O(0)[0] @ weight) for weight in maps])
        assert operations.needed_flops(model, 4, 16, layers, low_rank=True) == full - ablations * (
            dense - low
        )
        least = FirstMaps.pay(model, layers[0])
        here = find_ablation("resample").prepare(model, [], HEADS)
        with fast_path(model, on=True) as fast:
            done = counted(
                lambda fast=fast, layers=layers, here=here: ablate_heads(fast, tokens, here, layers)
            )
        assert operations.needed_flops(model, 4, 16, layers, low_rank=least) <= done


def test_low_rank_is_not_counted_where_it_is_more_work():
    model = shapes.make_model("tiny-gpt2", shapes.SHAPES["tiny-gpt2"], CPU, torch.float64)
    assert operations.needed_flops(model, 2, 5, range(2), True) == operations.needed_flops(
        model, 2, 5, range(2), False
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1b", 1_011_781_632),
        ("llama-7b", 6_738_415_616),
    ],
)
def test_shapes_have_as_many_parameters_as_the_models_they_are_named_after(name, parameters):
    assert shapes.weight_bytes(shapes.SHAPES[name], torch.bfloat16) == 2 * parameters


def test_pocket_shapes_are_the_models_that_ship():
    for path in (REPOSITORY / "shared" / "models").glob("pocket-*/config.json"):
        saved = json.loads(path.read_text())
        config = shapes.SHAPES[path.parent.name].config()
        for key in (
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            names = (key, config.attribute_map.get(key))
            assert getattr(config, key) == next(saved[name] for name in names if name in saved), (path, key)


def test_a_model_is_made_in_its_dtype_with_every_weight_random():
    model = shapes.make_model("tiny-llama", shapes.SHAPES["tiny-llama"], CPU, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, weight in model.hf.named_parameters():
        assert weight.float().std() > 0.05, name


def test_weights_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 200_000)
    said = r"^tiny-gpt2: weights in float32 take 0\.000499 GB, 0\.0002 GB are free on cpu; "
    said += "use --dtype bfloat16 or a device"
    with pytest.raises(UserError, match=said):
        shapes.make_model("tiny-gpt2", shapes.SHAPES["tiny-gpt2"], CPU, torch.float32)
    monkeypatch.setattr(shapes, "free_memory", lambda device: 600_000)
    shapes.make_model("tiny-gpt2", shapes.SHAPES["tiny-gpt2"], CPU, torch.float32)


BAD = [
    (engine, ["--prompts", "3"], "--prompts"),
    (engine, ["--shape", "gpt5"], "gpt5"),
    (engine, ["--shape", "tiny-gpt2", "--prompt-len", "129"], "between 2 and tiny-gpt2's context of 128"),
    (engine, ["--shape", "tiny-gpt2", "--heads-timed", "3"], "at most 2"),
    (engine, ["--shape", "tiny-gpt2", "--layer-step", "3"], "2 layers"),
    (engine, ["--device", "abacus"], "device 'abacus' is not available"),
    (scaling, ["--prompts", "8", "4"], "rising order"),
    (scaling, ["--sweep-prompts", "8"], "two numbers or more"),
    (scaling, ["--heads", "2", "3"], "d_model of 128 cannot be shared"),
    (precision, ["--models", "./nowhere"], "nowhere"),
    (precision, ["--prompts", "100000"], "100000 were asked for"),
]


@pytest.mark.parametrize(("script", "arguments", "said"), BAD)
def test_bad_arguments_are_told_in_one_line(script, arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        sys.exit(script.main([*arguments, "--results", str(tmp_path / "R.md")]))
    errors = capsys.readouterr().err
    assert raised.value.code in (1, 2) and errors.count("\n") == 1 and said in errors
    assert not (tmp_path / "R.md").exists()


def test_nothing_is_written_where_the_alternatives_disagree(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "in_fresh_process", lambda function, *arguments: function(*arguments))
    real = engine.run_engine

    def other(model, *arguments):
        found = real(model, *arguments)
        if model.fast:
            found.self_repair_mlps.mul_(1.001)
        return found

    monkeypatch.setattr(engine, "run_engine", other)
    arguments = [
        "--shape",
        "tiny-gpt2",
        "--prompts",
        "2",
        "--prompt-len",
        "8",
        "--heads-timed",
        "2",
        "--repetitions",
        "1",
        "--device",
        "cpu",
    ]
    assert engine.main([*arguments, "--results", str(tmp_path / "R.md")]) == 1
    assert "disagree" in capsys.readouterr().err and not (tmp_path / "R.md").exists()


def test_layers_swept_and_heads_timed():
    options = engine.argparse.Namespace(shape="llama-7b", layer_step=8)
    layers = engine.swept_layers(options)
    assert list(layers) == [3, 11, 19, 27]
    assert engine.sample_heads(layers, 32, 3) == [(3, 1), (11, 6), (27, 11)] or engine.sample_heads(
        layers, 32, 3
    ) == [
        (3, 1),
        (19, 6),
        (27, 11),
    ]
    assert engine.sample_heads(layers, 4, 4) == [(3, 1), (11, 2), (19, 3), (27, 0)]


@pytest.mark.slow("the benchmarks measure memory")
def test_memory_is_the_growth_of_the_peak():
    before, peak = machine.in_fresh_process(machine.memory_of, CPU, partial(np.ones, 8 << 20))
    assert 60 << 20 < peak - before < 90 << 20


def test_fits():
    assert scaling.power_law({2: 3.0, 4: 12.0, 8: 48.0}) == "Fitted: time ∝ n^2.00."
    case = engine.argparse.Namespace(model=engine.argparse.Namespace(n_heads=2))
    assert scaling.straight_line({0: case}, {0: 2.0, 1: 5.0, 2: 8.0}).startswith(
        "Fitted: 1e+03 ms per head, a share"
    )
    assert "1.5e+03 ms more" in scaling.straight_line({0: case}, {0: 2.0, 1: 5.0, 2: 8.0})


def test_relative_error():
    exact = np.array([[[3.0, -4.0], [0.0, 5.0]]])
    found = exact + np.array([[[0.0, 0.0], [0.0, np.sqrt(12.5) / 5]]])
    assert precision.relative_error(found, exact) == "1e-01 / 2e-01"
    assert precision.relative_error(found, 0 * exact) == "–"


def test_top_means_choose_by_the_exact_direct_effect():
    exact = {name: np.zeros((1, 1, 2, 50)) for name in precision.QUANTITIES}
    exact["direct_effect"][0, 0, 1, [3, 4]] = 2, 1
    found = {name: np.arange(100.0).reshape(1, 1, 2, 50) for name in precision.QUANTITIES}
    assert precision.top_means(found, exact)["self_repair"] == (53 + 54) / 2


def test_weights_rounded_to_bfloat16():
    model = precision.load_exact("pocket-llama", CPU)
    rounded = precision.rounded_to_bfloat16(model)
    assert rounded.dtype == torch.float64
    assert all(torch.equal(weight, weight.bfloat16().double()) for weight in rounded.hf.parameters())
    x = torch.randn(3, 192, dtype=torch.float64)
    wanted = (
        rounded.final_norm.weight
        * x
        / (x.square().mean(-1, keepdim=True) + rounded.final_norm.variance_epsilon).sqrt()
    )
    torch.testing.assert_close(rounded.final_norm(x), wanted, rtol=0, atol=1e-12)


def test_float64_that_differs_from_a_full_pass_is_refused():
    model = precision.load_exact("pocket-pythia-small", CPU)
    tokens = torch.randint(4096, (2, 8))
    exact = precision.measure(model, tokens)
    assert precision.check_against_full_passes(model, tokens, exact) < 1e-12
    exact["logit_change"][2, 2] += 1e-8
    with pytest.raises(UserError, match=r"differs by 1\.0e-08 logits"):
        precision.check_against_full_passes(model, tokens, exact)
